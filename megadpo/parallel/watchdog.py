"""A rank that makes no progress ends itself, with the stacks of its threads in its log.

In a job of several ranks all wait in a collective for the one that hangs, so all of them notice within the same
second, and their stacks together show who waits for whom. What holds Python's lock stops a thread of Python's too, so a
timer of faulthandler's, which needs no lock, stands behind it. A stopped process (SIGSTOP) can do nothing itself: its
peers notice, and on one machine the parent (launch/local.py).
"""

from __future__ import annotations

import faulthandler
import os
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

EXIT_CODE = 75
"""Of a rank that hung: EX_TEMPFAIL of sysexits.h, try again."""
START = 600.0
"""Least seconds for what is slow once: the first two steps (kernels are compiled), saving, evaluating a part."""
BEHIND = 5.0
"""Seconds that faulthandler's timer comes after the thread."""
POLL = 0.5


class Watchdog:
    """For the length of a with-block. timeout: seconds without a step; 0: never.

    A limit is the timeout or three times the median of the last 50 steps, whichever is longer.
    """

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._seconds: deque[float] = deque(maxlen=50)
        self._began = self._until = 0.0
        self._doing = ""
        self._stepping = False
        self._ended = threading.Event()

    @property
    def limit(self) -> float:
        """Seconds that a step may take."""
        if len(self._seconds) < 2:
            return max(START, 3 * self._timeout)
        return max(self._timeout, 3 * statistics.median(self._seconds))

    def __enter__(self) -> Watchdog:
        if self._timeout > 0:
            self.step("the first step")
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._timeout > 0:
            faulthandler.cancel_dump_traceback_later()

    def step(self, doing: str) -> None:
        """A step begins; the one before it, if any, has ended."""
        if self._stepping:
            self._seconds.append(time.monotonic() - self._began)
        self._stepping = True
        self._begin(doing, self.limit)

    def slowly(self, doing: str) -> None:
        """Something begins that is no step and may take longer. Called again at each sign of progress."""
        if self._stepping:
            self._seconds.append(time.monotonic() - self._began)
        self._stepping = False
        self._begin(doing, max(START, self.limit))

    def _begin(self, doing: str, limit: float) -> None:
        if self._timeout <= 0:
            return
        self._doing, self._began = doing, time.monotonic()
        self._until = self._began + limit
        if not self._ended.is_set():
            faulthandler.dump_traceback_later(limit + BEHIND, exit=True, file=2)

    def _watch(self) -> None:
        while not self._ended.wait(POLL):
            now = time.monotonic()
            if now < self._until:
                continue
            sys.stderr.write(f"hung: {self._doing} has taken {now - self._began:.0f} s so far; this rank's threads:\n")
            sys.stderr.flush()
            faulthandler.dump_traceback(file=2, all_threads=True)
            os._exit(EXIT_CODE)


@contextmanager
def stacks_on_signal(signum: int) -> Iterator[None]:
    """Inside, the signal, and what crashes compiled code, write the stacks of all threads to descriptor 2."""
    faulthandler.enable(file=2)
    faulthandler.register(signum, file=2, all_threads=True)
    try:
        yield
    finally:
        faulthandler.unregister(signum)
        faulthandler.disable()
