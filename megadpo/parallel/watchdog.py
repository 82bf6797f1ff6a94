"""A rank that makes no progress ends itself, with the stacks of its threads in its log.

In a job of several ranks all wait in a collective for the one that hangs, so all of them notice within the same
second, and their stacks together show who waits for whom. What holds Python's lock stops a thread of Python's too, so a
timer of faulthandler's, which needs no lock, stands behind it. A stopped process (SIGSTOP) can do nothing itself: its
peers notice, and on one machine the parent (launch/local.py).
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import TracebackType

EXIT_CODE = 75
"""Of a rank that hung: EX_TEMPFAIL of sysexits.h, try again."""
START = 600.0
"""Least seconds for what is slow once: the first two steps (kernels are compiled), saving, evaluating a part; and for
what shows no signs of progress, or not two of them yet."""
STACKS = signal.SIGUSR2
"""On this, ranks and the processes that help them write the stacks of their threads to descriptor 2."""
BEHIND = 5.0
"""Seconds that faulthandler's timer comes after the thread."""
POLL = 0.5


class Watchdog:
    """For the length of a with-block. timeout: seconds without a step; 0: never.

    A limit is the timeout or three times the median of the last 50 steps, whichever is longer; the same holds for signs
    of progress outside of training. Helpers that this
    process started through multiprocessing are ended with it, after their stacks.
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
        return self._limit(self._seconds)

    def _limit(self, seconds: deque[float]) -> float:
        """For the next, after those that took so long."""
        if len(seconds) < 2:
            return max(START, 3 * self._timeout)
        return max(self._timeout, 3 * statistics.median(seconds))

    def __enter__(self) -> Watchdog:
        if self._timeout > 0:
            self.slowly("the start")
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

    def phase(self, doing: str) -> Callable[[], None]:
        """Something long begins that shows signs of progress; call what this gives at each of them."""
        apart: deque[float] = deque(maxlen=50)
        self.slowly(doing)

        def sign() -> None:
            apart.append(time.monotonic() - self._began)
            self._begin(doing, self._limit(apart))

        return sign

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
            _end_helpers()
            os._exit(EXIT_CODE)


UNWATCHED = Watchdog(0)
"""For what runs without a limit: it never notices anything."""


def and_then(show: Callable[[int], None], sign: Callable[[], None]) -> Callable[[int], None]:
    """For what is told how much is done: shows it, and takes it for a sign of progress."""

    def told(done: int) -> None:
        show(done)
        sign()

    return told


def _end_helpers() -> None:
    """One that was stopped has to go on for its stack."""
    helpers = multiprocessing.active_children()
    for signum in (STACKS, signal.SIGCONT, signal.SIGKILL):
        for helper in helpers:
            with suppress(ProcessLookupError):
                os.kill(helper.pid or 0, signum)
        if helpers and signum == signal.SIGCONT:
            time.sleep(POLL)


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
