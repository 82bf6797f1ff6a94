"""Tensors of a torch_dist checkpoint, read box by box by one process, without Megatron-Core and without
unsafe pickles.

A torch_dist checkpoint (Megatron-Core's default, torch.distributed.checkpoint underneath) is a folder with
one pickle called .metadata, which says where each chunk of each tensor lies, and .distcp files that hold the
chunks as torch.save wrote them. torch's own reader unpickles .metadata without restriction, so a hostile
folder could run code. Here only the classes that a .metadata consists of are let in, and chunks are read with
weights_only.
"""

from __future__ import annotations

import collections
import io
import math
import pathlib
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, BinaryIO

import torch
from torch import Tensor
from torch.distributed.checkpoint import filesystem, metadata, planner

from megadpo.errors import CheckpointError

CLASSES = (
    *(metadata.Metadata, metadata.MetadataIndex, metadata.StorageMeta, metadata.TensorStorageMetadata),
    *(metadata.BytesStorageMetadata, metadata.ChunkStorageMetadata, metadata.TensorProperties),
    *(metadata._MEM_FORMAT_ENCODING, filesystem._StorageInfo, planner.SavePlan, planner.WriteItem),
    *(planner.WriteItemType, planner.TensorWriteData, planner.BytesIOWriteData),
    *(collections.OrderedDict, pathlib.PosixPath, pathlib.PurePosixPath),
)
ALLOWED: dict[tuple[str, str], Any] = {
    **{(cls.__module__, cls.__qualname__): cls for cls in CLASSES},
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
}
"""All that a .metadata may name, beside dtypes. None of it runs anything when called."""


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in ALLOWED:
            return ALLOWED[module, name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint needs")


def read_metadata(file: IO[bytes]) -> Any:
    """What a .metadata holds. UnpicklingError where it names anything that no checkpoint needs."""
    return _MetadataUnpickler(file).load()


class Window(io.RawIOBase):
    """Part of a file as a file of its own, so that a chunk is read once and straight to where it stays."""

    def __init__(self, file: BinaryIO, offset: int, length: int) -> None:
        self._file, self._offset, self._length, self._at = file, offset, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        self._at = max(base + offset, 0)
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._offset + self._at)
        view = memoryview(buffer).cast("B")
        count = self._file.readinto(view[: max(self._length - self._at, 0)])  # type: ignore[attr-defined]
        self._at += count
        return int(count)


class TorchDist:
    """A checkpoint folder. CheckpointError names the folder or file and what is wrong with it."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()
        path = self.folder / ".metadata"
        try:
            with path.open("rb") as file:
                found = read_metadata(file)
        except FileNotFoundError:
            raise CheckpointError(
                f"{self.folder}: no checkpoint (no .metadata in it): give the folder of one finished step"
            ) from None
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
        except Exception as error:  # a damaged pickle can raise anything
            raise CheckpointError(f"{path}: not a checkpoint's metadata: {error}") from error
        if not isinstance(found, metadata.Metadata):
            raise CheckpointError(f"{path}: holds a {type(found).__name__}, not a checkpoint's metadata")
        self._places = found.storage_data
        self.tensors: dict[str, metadata.TensorStorageMetadata] = {
            key: stored
            for key, stored in found.state_dict_metadata.items()
            if isinstance(stored, metadata.TensorStorageMetadata)
        }

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self.tensors[key].size)

    def dtype(self, key: str) -> torch.dtype:
        return self.tensors[key].properties.dtype

    def extents(self) -> dict[str, list[tuple[int, int]]]:
        """Where stored chunks begin and end in each file, in bytes."""
        found: dict[str, list[tuple[int, int]]] = {}
        for place in self._places.values():
            if not _plain(place):
                raise CheckpointError(
                    f"{self.folder}: .metadata names {place.relative_path!r}, not a file of the folder"
                )
            found.setdefault(place.relative_path, []).append((place.offset, place.offset + place.length))
        return {name: sorted(chunks) for name, chunks in found.items()}

    def read(self, key: str, start: Sequence[int], size: Sequence[int]) -> Tensor:
        """The box of a stored tensor that begins at `start`, as a new CPU tensor [*size] of the stored dtype.

        At most one stored chunk is in memory beside the box.
        """
        for chunk in self.tensors[key].chunks:
            if tuple(chunk.offsets) == tuple(start) and tuple(chunk.sizes) == tuple(size):
                return self._chunk(key, chunk)
        box = torch.empty(tuple(size), dtype=self.dtype(key))
        self.read_into(box, key, start)
        return box

    def read_into(self, box: Tensor, key: str, start: Sequence[int]) -> None:
        """Fill `box` with the part of a stored tensor that begins at `start` and is as large, in the box's dtype."""
        size = box.shape
        covered = 0
        for chunk in self.tensors[key].chunks:
            low = [max(a, b) for a, b in zip(start, chunk.offsets, strict=True)]
            high = [min(a + n, b + m) for a, n, b, m in zip(start, size, chunk.offsets, chunk.sizes, strict=True)]
            if any(a >= b for a, b in zip(low, high, strict=True)):
                continue
            stored = self._chunk(key, chunk)
            box[_slices(low, high, start)] = stored[_slices(low, high, chunk.offsets)]
            covered += math.prod(b - a for a, b in zip(low, high, strict=True))
        if covered != box.numel():
            raise CheckpointError(f"{self.folder}: {key} is incomplete: {covered} of {box.numel()} values are there")

    def _chunk(self, key: str, chunk: metadata.ChunkStorageMetadata) -> Tensor:
        place = self._places.get(metadata.MetadataIndex(key, chunk.offsets))
        if place is None or not _plain(place):
            raise CheckpointError(f"{self.folder}: .metadata does not say where {key} {list(chunk.offsets)} lies")
        path = self.folder / place.relative_path
        try:
            with path.open("rb") as file:
                window: Any = Window(file, place.offset, place.length)
                tensor = torch.load(window, map_location="cpu", weights_only=True)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
        except Exception as error:  # torch.load raises several kinds on damaged bytes
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise CheckpointError(f"{path}: {key}: the file is cut off or damaged ({reason})") from error
        if not isinstance(tensor, Tensor) or tensor.shape != chunk.sizes:
            raise CheckpointError(f"{path}: {key}: what is stored is not {list(chunk.sizes)}")
        return tensor


def _plain(place: Any) -> bool:
    """Whether a chunk is said to lie, as it is, in a file of the folder itself."""
    return Path(place.relative_path).name == place.relative_path and not place.transform_descriptors


def _slices(low: Sequence[int], high: Sequence[int], origin: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(a - o, b - o) for a, b, o in zip(low, high, origin, strict=True))
