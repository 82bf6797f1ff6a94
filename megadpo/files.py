"""Files that megadpo writes: small ones whole or not at all; what the disk refuses becomes one line."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from errno import EACCES, EDQUOT, EFBIG, ENOSPC, EPERM, EROFS
from pathlib import Path

from megadpo.errors import StorageError

CAUSES = {
    ENOSPC: "the disk is full: free some space",
    EDQUOT: "the quota is used up: free some space",
    EFBIG: "the file would be larger than allowed: raise the limit (ulimit -f)",
    EROFS: "the file system is read-only: mount it for writing",
    EACCES: "no permission to write there: mend the permissions",
    EPERM: "no permission to write there: mend the permissions",
}


@contextmanager
def storage_errors(path: Path, setting: str = "run_dir") -> Iterator[None]:
    """An OSError while `path` is written becomes a StorageError: what, why, and which setting names another place."""
    try:
        yield
    except OSError as error:
        cause = CAUSES.get(error.errno or 0, str(error.strerror or error))
        raise StorageError(
            f"{error.filename or path}: cannot be written; {cause}, or set {setting} to another place"
        ) from error


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
