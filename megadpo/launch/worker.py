"""What happens inside one rank: the job runs, what libraries print goes to a log, and its end is recorded."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Literal

from megadpo.config import Config
from megadpo.errors import MegadpoError
from megadpo.files import storage_errors, write_text
from megadpo.observe.quiet import quiet
from megadpo.parallel.ranks import Rank
from megadpo.parallel.stop import ASKING
from megadpo.parallel.watchdog import STACKS, stacks_on_signal

Job = Callable[[Config, Rank], int]
"""What every rank runs; returns the exit code."""


@dataclass(frozen=True)
class Outcome:
    """How a rank ended.

    returned: the job gave `code`. refused: a MegadpoError, `text` its line. crashed: any other exception,
    `text` its traceback. interrupted: a signal came before the job listened for one itself.
    """

    rank: int
    kind: Literal["returned", "refused", "crashed", "interrupted"]
    code: int
    at: float
    """Seconds on the machine's monotonic clock; tells which rank failed first."""
    text: str = ""
    error: str = ""
    """Name of the exception."""


class Interrupted(BaseException):
    """A signal asked the process to end while nothing needed to be saved."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


def run_rank(config: Config, rank: Rank, job: Job, log: Path) -> Outcome:
    """Run the job as this rank; never raises.

    Standard error, and all that libraries print, goes to `log`; the terminal stays with rank 0's own lines.
    """
    try:
        with (
            interruptible(),
            redirected(log, keep_terminal=rank.rank == 0),
            stacks_on_signal(STACKS),
            quiet(),
        ):
            try:
                return Outcome(rank.rank, "returned", job(config, rank), time.monotonic())
            except Exception as error:
                if not isinstance(error, MegadpoError):
                    traceback.print_exc()
                raise
    except MegadpoError as error:
        return Outcome(rank.rank, "refused", error.exit_code, time.monotonic(), str(error), type(error).__name__)
    except Interrupted as stop:
        return Outcome(rank.rank, "interrupted", 128 + stop.signum, time.monotonic())
    except BaseException as error:
        text = "".join(traceback.format_exception(error))
        return Outcome(rank.rank, "crashed", 1, time.monotonic(), text, type(error).__name__)


@contextmanager
def interruptible() -> Iterator[None]:
    """Signals that ask for a stop raise Interrupted, so that half-written files are cleaned up.

    Those that came earlier, while they were blocked, do so now.
    """

    def stop(signum: int, frame: FrameType | None) -> None:
        for each in ASKING:
            signal.signal(each, signal.SIG_IGN)
        raise Interrupted(signum)

    before = {signum: signal.getsignal(signum) for signum in ASKING}
    try:
        for signum, handler in before.items():
            if handler != signal.SIG_IGN:
                signal.signal(signum, stop)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ASKING)
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


@contextmanager
def redirected(log: Path, keep_terminal: bool) -> Iterator[None]:
    """Append standard output and error to `log`, those of C++ libraries too. Raises StorageError.

    keep_terminal: sys.__stdout__ (descriptor 1) stays what it is; sys.stdout, where libraries print, moves.
    """
    with storage_errors(log):
        log.parent.mkdir(parents=True, exist_ok=True)
        file = log.open("a", encoding="utf-8", errors="replace", buffering=1)
    descriptors = (2,) if keep_terminal else (1, 2)
    before, streams = [os.dup(number) for number in descriptors], (sys.stdout, sys.stderr)
    try:
        for number in descriptors:
            os.dup2(file.fileno(), number)
        sys.stdout = sys.stderr = file
        yield
    finally:
        sys.stdout, sys.stderr = streams
        for number, kept in zip(descriptors, before, strict=True):
            os.dup2(kept, number)
            os.close(kept)
        with suppress(OSError):  # a full disk: what the run met on it is being raised already
            file.close()


def rank_main(config: Config, rank: Rank, job: Job, log: Path, folder: Path, parent: int, threads: int | None) -> None:
    """A process of a local start, from its first line to its last; it begins with the stop signals blocked.

    folder: where the Outcome is left for the parent. parent: its process id. threads: torch's, if limited.
    """
    _die_with(parent)
    os.setpgid(0, 0)  # Ctrl-C reaches the parent, which passes it on once; a rank's helpers never get it
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)  # so drawing on the terminal needs no foreground
    for signum in ASKING:
        if signal.getsignal(signum) != signal.SIG_IGN:
            signal.signal(signum, _nothing)  # what a fork inherited is the parent's
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    outcome = run_rank(config, rank, job, log)
    write_text(folder / f"{rank.rank}.json", json.dumps(asdict(outcome)))
    if outcome.kind != "returned":
        # Process groups with a dead peer may wait for it in their destructors.
        os._exit(outcome.code)


def read_outcome(folder: Path, rank: int) -> Outcome | None:
    """What rank_main left; None where the process did not come to that."""
    path = folder / f"{rank}.json"
    return Outcome(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None


def _nothing(signum: int, frame: FrameType | None) -> None:
    pass


def _die_with(parent: int) -> None:
    """Have Linux end this process when the parent is gone, however it went."""
    if sys.platform == "linux":
        die_with_parent = 1  # PR_SET_PDEATHSIG
        ctypes.CDLL(None).prctl(die_with_parent, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
