"""Starting again after a fault, a bounded number of times and never without progress."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from megadpo.checkpoint.folder import latest
from megadpo.launch.failure import RankFailedError


def restarted(start: Callable[[], int], run_dir: Path, most: int, tell: Callable[[str], None]) -> int:
    """`start()` again, at most `most` times, where a rank died or hung; it goes on from the newest checkpoint.

    A mistake of the user (MegadpoError) and a stop that was asked for are final. So is a fault with no newer checkpoint
    than at the restart before it: what happens twice in the same place will happen a third time.
    """
    done = 0
    at_last: str | None = None
    while True:
        try:
            return start()
        except RankFailedError as error:
            newest = latest(run_dir)
            reached = newest.name if newest else ""
            if done >= most or not str(error):
                raise
            if done and reached == at_last:
                raise RankFailedError(
                    f"{error}; not started again: no checkpoint was saved since the restart before (lower "
                    "train.save_steps if steps were done)",
                    error.exit_code,
                    error.traceback,
                ) from error
            done, at_last = done + 1, reached
            tell(f"{error}; restart {done} of {most}, from {reached or 'the beginning'}")
