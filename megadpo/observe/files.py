"""Small files of a run folder: written whole or not at all; what the disk refuses becomes one line."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from errno import EACCES, EDQUOT, ENOSPC, EPERM, EROFS
from pathlib import Path

from megadpo.errors import StorageError

ADVICE = {
    ENOSPC: "the disk is full: free some space or give another run_dir",
    EDQUOT: "the quota is used up: free some space or give another run_dir",
    EROFS: "the file system is read-only: give another run_dir",
    EACCES: "no permission to write there: give another run_dir or mend the permissions",
    EPERM: "no permission to write there: give another run_dir or mend the permissions",
}


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """An OSError while `path` is written becomes a StorageError that names it and says what to do."""
    try:
        yield
    except OSError as error:
        advice = ADVICE.get(error.errno or 0, f"{error.strerror or error}: give another run_dir")
        raise StorageError(f"{error.filename or path}: cannot be written; {advice}") from error


def write_text(path: Path, text: str) -> None:
    """Write the file whole, or leave what was there. Raises StorageError."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(text, encoding="utf-8")
            os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
