"""Where checkpoints lie: RUN_DIR/checkpoints/step-00000020, written under another name and renamed when complete."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from megadpo.errors import CheckpointError
from megadpo.files import storage_errors

STATE = "state.json"
PARTIAL = ".partial"


@dataclass(frozen=True)
class Saved:
    """What a checkpoint says of itself beside its tensors (state.json)."""

    step: int
    consumed: int
    """Groups taken from the stream."""
    total_steps: int


def checkpoint_name(step: int) -> str:
    return f"step-{step:08d}"


def checkpoints(run_dir: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = (run_dir / "checkpoints").glob("step-*")
    return sorted(path for path in found if path.suffix != PARTIAL and (path / STATE).is_file())


def latest(run_dir: Path) -> Path | None:
    complete = checkpoints(run_dir)
    return complete[-1] if complete else None


def read_state(folder: Path) -> Saved:
    """Raises CheckpointError where state.json is missing or not what megadpo writes."""
    try:
        return Saved(**json.loads((folder / STATE).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{folder / STATE}: {error}; this is not a complete checkpoint of megadpo: remove the folder to go on "
            "from the one before it"
        ) from error


def begin(folder: Path) -> Path:
    """Make an empty folder to write into; it is no checkpoint until `finish` gives it its name. One process."""
    partial = folder.with_name(folder.name + PARTIAL)
    with storage_errors(partial):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    return partial


def finish(partial: Path, folder: Path, saved: Saved) -> None:
    """Bring everything to the disk, then give the folder its name. One process."""
    with storage_errors(partial), removed_on_failure(partial):
        (partial / STATE).write_text(json.dumps(asdict(saved), indent=1))
        sync(partial)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(partial, folder)
        _fsync(folder.parent)


@contextmanager
def removed_on_failure(folder: Path) -> Iterator[None]:
    """A half-written folder is no use to anyone, and takes room on what may be a full disk."""
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def keep_newest(run_dir: Path, count: int) -> None:
    """Remove older checkpoints; each loses its name before its files, so that none is ever half there."""
    for old in checkpoints(run_dir)[:-count] if count > 0 else []:
        doomed = old.with_name(old.name + ".removed" + PARTIAL)
        os.replace(old, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def sync(folder: Path) -> None:
    """Bring every file of the folder to the disk."""
    for path in [*folder.rglob("*"), folder]:
        _fsync(path)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
