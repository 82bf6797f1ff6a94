"""A folder that is written under another name and gets its own when it is whole."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megadpo.errors import StorageError


@contextmanager
def new_folder(out: Path, what: str) -> Iterator[Path]:
    """An empty folder OUT.partial to write into, renamed to `out` at the end of the with-block.

    An error removes it; a killed process leaves it, and the next start replaces it. what: "export" or "import", for the
    message. StorageError: `out` is not empty, or the disk refuses.
    """
    check_free(out, what)
    partial = out.with_name(out.name + ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        os.replace(partial, out)
    except OSError as error:
        raise StorageError(f"{error.filename or out}: {error.strerror}; the {what} was not written") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_free(out: Path, what: str) -> None:
    """StorageError where `out` is there and not an empty folder."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise StorageError(f"{out} exists and is not an empty folder: give a new path for the {what}, or empty it")


def check_space(out: Path, needed: int, what: str) -> None:
    """StorageError where fewer than `needed` bytes are free there."""
    folder = next(x for x in (out, *out.parents) if x.exists())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise StorageError(f"{out}: the {what} needs {needed} bytes, {free} are free there; give another path")
