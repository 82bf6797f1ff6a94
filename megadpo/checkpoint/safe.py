"""Reading a stranger's checkpoint without running his code.

Megatron-Core reads through torch.distributed.checkpoint, which unpickles .metadata without restriction
(filesystem.py:FileSystemReader.read_metadata) and objects that are no tensors with weights_only=False
(default_planner.py:load_bytes). Inside `no_raw_pickle` neither happens.
"""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

from torch.distributed.checkpoint import filesystem, metadata

from megadpo.checkpoint.folder import read_manifest
from megadpo.convert.torch_dist import read_metadata
from megadpo.errors import CheckpointError

FORMAT = {"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch"}
"""What metadata.json must say; other backends would be other code of Megatron-Core's."""
FORCE, FORBID = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
"""Environment variables that torch.load reads at every call; the first wins over what the caller asks for."""


@contextmanager
def no_raw_pickle(folder: Path) -> Iterator[None]:
    """torch.load loads weights only, and .metadata may name only what a checkpoint of megadpo consists of: its classes,
    and files of this folder that the manifest lists. Raises CheckpointError for another format."""
    files = set(read_manifest(folder))
    try:
        found = json.loads((folder / "metadata.json").read_text())
        known = all(found.get(name) == value for name, value in FORMAT.items())
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{folder / 'metadata.json'}: cannot be read ({error})") from error
    if not known:
        raise CheckpointError(f"{folder / 'metadata.json'}: another format than {FORMAT}")

    def load(file: IO[bytes]) -> metadata.Metadata:
        found: Any = read_metadata(file)
        if not isinstance(found, metadata.Metadata) or not isinstance(found.storage_data, dict):
            raise pickle.UnpicklingError("it is not a checkpoint's metadata")
        strange = {place.relative_path for place in found.storage_data.values()} - files
        if strange:
            raise pickle.UnpicklingError(f"it names {sorted(map(str, strange))[0]!r}, which is no file of it")
        return found

    module: Any = filesystem
    before = {name: os.environ.pop(name, None) for name in (FORCE, FORBID)}
    os.environ[FORCE] = "1"
    module.pickle = SimpleNamespace(load=load)
    try:
        yield
    finally:
        module.pickle = pickle
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
