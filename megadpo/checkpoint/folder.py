"""Where checkpoints lie, and what makes one: complete and undamaged, or not there at all.

RUN_DIR/checkpoints/step-00000020          a checkpoint; it got this name when all of it was on the disk
RUN_DIR/checkpoints/step-00000040.partial  being written, or left by a process that died
RUN_DIR/checkpoints/step-00000030.damaged  found damaged and set aside
RUN_DIR/checkpoints/latest                 the newest one's name, for scripts; megadpo itself looks at the folders

In each: manifest.json with size and SHA-256 of every file, its own contents included.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from megadpo.errors import CheckpointError, StorageError
from megadpo.files import storage_errors

STATE = "state.json"
MANIFEST = "manifest.json"
POINTER = "latest"
PARTIAL = ".partial"
DAMAGED = ".damaged"
NAME = re.compile(r"step-(\d{8,12})")
MOST = 10**12
"""Steps and groups are fewer; a name has room for no more."""


@dataclass(frozen=True)
class Saved:
    """What a checkpoint says of itself beside its tensors (state.json)."""

    step: int
    consumed: int
    """Groups taken from the stream."""
    total_steps: int
    skipped: int = 0
    """Batches that gave no update, as their numbers were not finite."""

    def problem(self) -> str | None:
        """What of it no run can have written; None: nothing. It may come from a file."""
        for name, value in asdict(self).items():
            if type(value) is not int or not 0 <= value < MOST:
                return f"{name} = {str(value)[:40]!r} is no whole number from 0 to {MOST - 1}"
        if self.skipped > self.step:
            return f"skipped = {self.skipped}, more than the {self.step} steps that were done"
        return None


@dataclass(frozen=True)
class Entry:
    """What the manifest says of a file."""

    bytes: int
    sha256: str


Manifest = Mapping[str, Entry]
"""By file name; a checkpoint has no sub-folders."""


def checkpoint_name(step: int) -> str:
    return f"step-{step:08d}"


def checkpoints(run_dir: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = {}
    for path in (run_dir / "checkpoints").glob("step-*"):
        name = NAME.fullmatch(path.name)
        if name and (path / STATE).is_file():
            found[int(name[1])] = path
    return [found[step] for step in sorted(found)]


def latest(run_dir: Path) -> Path | None:
    complete = checkpoints(run_dir)
    return complete[-1] if complete else None


def read_state(folder: Path) -> Saved:
    """Raises CheckpointError where state.json is missing, not what megadpo writes, or of another step than the folder's
    name says."""
    path = folder / STATE
    try:
        saved = Saved(**json.loads(path.read_text()))
        problem = saved.problem()
    except (OSError, ValueError, TypeError, RecursionError) as error:
        problem = str(error)
    if problem is None:
        name = NAME.fullmatch(folder.name)
        if name is None or int(name[1]) == saved.step:
            return saved
        problem = f"step = {saved.step}, and the folder's name says {int(name[1])}"
    raise CheckpointError(
        f"{path}: {problem}; this is not a complete checkpoint of megadpo: remove the folder to go on from the one "
        "before it"
    )


# ---- is it whole?


def read_manifest(folder: Path) -> Manifest:
    """Raises CheckpointError where manifest.json is missing or does not fit its own checksum."""
    path = folder / MANIFEST
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise CheckpointError(f"{path}: is no file")
    try:
        found = json.loads(path.read_bytes())
        files = {str(name): Entry(**entry) for name, entry in found["files"].items()}
        checksum = found["sha256"]
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from error
    if checksum != _checksum(files):
        raise CheckpointError(f"{path}: damaged: its checksum does not fit")
    outside = [name for name in files if Path(name).name != name]
    if outside:
        raise CheckpointError(f"{path}: names {outside[0]!r}, which is no file of this folder")
    return files


def damage(folder: Path, part: int = 0, parts: int = 1) -> list[str]:
    """What is wrong with a checkpoint, a line per file; none means every byte is as it was written.

    Of `parts` processes that share the work, number `part` reads every parts-th file, and all look at all sizes.
    """
    try:
        manifest = read_manifest(folder)
    except CheckpointError as error:
        return [str(error)]
    found = []
    for name, entry in manifest.items():
        try:
            status = (folder / name).stat()
        except OSError as error:
            found.append(f"{folder / name}: {error.strerror}")
            continue
        size = status.st_size
        if not stat.S_ISREG(status.st_mode):
            found.append(f"{folder / name}: is no file")
        elif size != entry.bytes:
            found.append(f"{folder / name}: {size} bytes, {entry.bytes} were written")
    found += [f"{folder / name}: not in {MANIFEST}" for name in (STATE,) if name not in manifest]
    if found:
        return found
    by_size = sorted(manifest, key=lambda name: (-manifest[name].bytes, name))
    for name, read in hashed(folder, by_size[part::parts]).items():
        if isinstance(read, OSError):
            found.append(f"{folder / name}: {read.strerror}")
        elif read != manifest[name]:
            found.append(f"{folder / name}: damaged: its SHA-256 is not the one that was written")
    return found or _unlikely(folder)


def _unlikely(folder: Path) -> list[str]:
    """What is wrong with a state whose bytes are those of the manifest."""
    try:
        read_state(folder)
    except CheckpointError as error:
        return [str(error).partition("; this is not")[0]]
    return []


def hashed(folder: Path, names: Iterable[str]) -> dict[str, Entry | OSError]:
    """Size and SHA-256 of the folder's files, or why one cannot be read. hashlib lets go of Python's lock, so threads
    help."""

    def one(name: str) -> Entry | OSError:
        try:
            with (folder / name).open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                return Entry(os.fstat(file.fileno()).st_size, digest)
        except OSError as error:
            return error

    names = list(names)
    with ThreadPoolExecutor(min(8, len(os.sched_getaffinity(0)))) as pool:
        return dict(zip(names, pool.map(one, names), strict=True))


def _checksum(files: Manifest) -> str:
    text = json.dumps({name: asdict(entry) for name, entry in sorted(files.items())}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


# ---- writing


def begin(folder: Path) -> Path:
    """Make an empty folder to write into; it is no checkpoint until `finish` gives it its name. One process.

    What dead processes left beside it goes.
    """
    partial = folder.with_name(folder.name + PARTIAL)
    with storage_errors(partial):
        for left in folder.parent.glob(f"*{PARTIAL}"):
            shutil.rmtree(left, ignore_errors=True)
        partial.mkdir(parents=True, exist_ok=True)
    return partial


def finish(partial: Path, folder: Path, saved: Saved, known: Mapping[str, Entry] | None = None) -> None:
    """Write state and manifest, bring everything to the disk, then give the folder its name. One process.

    known: files that were hashed by those who wrote them; the others are hashed here. A checkpoint of the same step
    that is there and whole stays, so that there is no instant without it; a damaged one gives way.
    """
    with storage_errors(partial), removed_on_failure(partial):
        (partial / STATE).write_text(json.dumps(asdict(saved), indent=1))
        files = dict(known or {})
        rest = [path.name for path in sorted(partial.iterdir()) if path.name not in files]
        for name, read in hashed(partial, rest).items():
            if isinstance(read, OSError):
                raise read
            files[name] = read
        for name, entry in files.items():
            if not (partial / name).is_file() or (partial / name).stat().st_size != entry.bytes:
                raise StorageError(
                    f"{partial / name}: a rank wrote {entry.bytes} bytes that this machine does not see; run_dir must "
                    "be on a file system that all machines share"
                )
        described = {"files": {name: asdict(entry) for name, entry in files.items()}, "sha256": _checksum(files)}
        (partial / MANIFEST).write_text(json.dumps(described, indent=1))
        sync(partial)
        if folder.exists():
            if not damage(folder):
                shutil.rmtree(partial)
                return _point_to(folder)
            set_aside(folder)
        os.replace(partial, folder)
        _fsync(folder.parent)
        _point_to(folder)


def _point_to(folder: Path) -> None:
    pointer, fresh = folder.parent / POINTER, folder.parent / (POINTER + PARTIAL)
    fresh.write_text(folder.name + "\n")
    _fsync(fresh)
    os.replace(fresh, pointer)
    _fsync(folder.parent)


def set_aside(folder: Path) -> Path:
    """Give a damaged checkpoint a name under which nothing takes it for one."""
    number, aside = 1, folder.with_name(folder.name + DAMAGED)
    while aside.exists():
        number += 1
        aside = folder.with_name(f"{folder.name}.{number}{DAMAGED}")
    with storage_errors(folder):
        os.replace(folder, aside)
        _fsync(folder.parent)
    return aside


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
        with storage_errors(old):
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
