"""Ctrl-C, SIGTERM and a cluster's warning: asked to stop, a rank goes on to the end of its step and saves."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType, TracebackType
from typing import Any

ASKING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
"""SIGUSR1 is what SLURM jobs ask for ahead of the time limit (sbatch --signal=USR1@300)."""


class StopSignal:
    """Whether a stop was asked for, for the length of a with-block.

    Repeated signals change nothing: torchrun and SLURM deliver them more than once. Only a second Ctrl-C,
    over a second after the first, ends the process at once.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._first = 0.0
        self._before: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        return self.signum is not None

    @property
    def exit_code(self) -> int:
        """What a process that stopped for it returns: 128 + the signal's number, as shells count.

        SIGTERM's number on a rank that got no signal itself.
        """
        return 128 + (self.signum or signal.SIGTERM)

    def __enter__(self) -> StopSignal:
        for signum in ASKING:
            if signal.getsignal(signum) != signal.SIG_IGN:  # nohup and shells ignore some on purpose
                self._before[signum] = signal.signal(signum, self._asked)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _asked(self, signum: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.signum is None:
            self.signum, self._first = signum, now
        elif signum == signal.SIGINT and now - self._first > 1:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
