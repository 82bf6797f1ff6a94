"""How the end of a rank is told to the user."""

from __future__ import annotations

import signal
from pathlib import Path

from megadpo import errors
from megadpo.config import Config
from megadpo.errors import MegadpoError
from megadpo.launch.worker import Outcome
from megadpo.parallel.owner import FILE as OWNER
from megadpo.parallel.watchdog import EXIT_CODE as HUNG


class RankFailedError(Exception):
    """A rank ended as no user mistake explains. It has words for the terminal, unless another rank spoke."""

    def __init__(self, text: str, exit_code: int, traceback: str = "") -> None:
        super().__init__(text)
        self.exit_code = exit_code
        self.traceback = traceback
        """The rank's, where it ended by an exception."""


def rank_log(config: Config, rank: int) -> Path:
    """The file that has what the rank's libraries print, and its traceback."""
    return Path(config.run_dir).expanduser() / "logs" / f"rank-{rank}.log"


def failure(outcome: Outcome, log: Path) -> MegadpoError | RankFailedError:
    """The exception for a rank that refused or crashed."""
    if outcome.kind == "refused":
        kind = getattr(errors, outcome.error, MegadpoError)
        return kind(outcome.text)
    line = f"rank {outcome.rank} failed with {outcome.error}, a fault of megadpo or of a library; see {log}"
    return RankFailedError(line, outcome.code, outcome.text)


def hung(ranks: list[int], logs: Path) -> RankFailedError:
    """The exception for ranks that made no progress."""
    who = f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
    return RankFailedError(
        f"{who} made no progress for longer than train.hang_timeout allows; the stacks of all ranks are in "
        f"{logs}/rank-*.log",
        HUNG,
    )


def killed(rank: int, exit_code: int, log: Path) -> RankFailedError:
    """The exception for a rank that ended without a word; exit_code as multiprocessing gives it."""
    if exit_code >= 0:
        return RankFailedError(
            f"rank {rank} ended with exit code {exit_code} and no message; its output is in {log}", 1
        )
    name = signal.Signals(-exit_code).name
    advice = f"a fault in compiled code; its output is in {log}"
    if -exit_code == signal.SIGKILL:
        advice = (
            "out of memory is the usual cause; lower batch.micro_batch_tokens or batch.micro_batch_size, set "
            "model.recompute = full, or use a larger grid"
        )
    if -exit_code == signal.SIGBUS:
        advice = "a full /dev/shm or a file cut short while it was read are the usual causes; free some space"
    return RankFailedError(f"rank {rank} was killed by {name}; {advice}", 128 - exit_code)


def tidy(logs: Path) -> None:
    """Remove empty logs and folders that this leaves empty: a run that never began leaves nothing.

    Not where someone trains: the logs may be that run's, which still writes them.
    """
    if (logs.parent / OWNER).exists():
        return
    for log in logs.glob("rank-*.log"):
        if log.stat().st_size == 0:
            log.unlink(missing_ok=True)
    for folder in (logs, logs.parent):
        try:
            folder.rmdir()
        except OSError:
            return
