"""The folder that `megadpo import` writes: a model folder whose weights are a Megatron checkpoint.

    config.json, tokenizer ...      copied byte for byte
    .metadata, __*_0.distcp         the weights, as torch_dist checkpoints keep them: any grid reads its own part
    common.pt, metadata.json        what Megatron-Core wants beside them to load the folder itself
    import.json                     where it came from

Every tensor stands under the key of the family's table, so a layer, an expert, and the gate and up halves of an MLP are
tensors of their own (Megatron-Core's `singleton_local_shards`). Tensors are cut into chunks of whole rows, so that a
rank that owns some rows reads little more than them. Nothing here needs Megatron-Core, a process group or a GPU.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import prod
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megadpo.convert.exporter import find
from megadpo.convert.families import read_shape
from megadpo.convert.hf_files import all_finite, is_imported
from megadpo.convert.shape import ModelShape
from megadpo.convert.tables import MegatronTensor
from megadpo.convert.torch_dist import TorchDist
from megadpo.errors import CheckpointError

CHUNK_BYTES = 32 * 2**20
"""A chunk has at most so many bytes, or one row."""
ABOUT = "import.json"

Places = dict[MetadataIndex, _StorageInfo]


class StoredWeights:
    """The weights of an imported folder, of the model that its config.json describes.

    CheckpointError where they are not that model's, or damaged.
    """

    def __init__(self, folder: str | Path, shape: ModelShape) -> None:
        self._checkpoint = TorchDist(folder)
        if is_imported(folder):  # it has the head that it was imported with, whichever the run wants
            shape = read_shape(folder)
        self._sources = {x.tensor.key: x for x in find(self._checkpoint, shape, Path(folder))}

    def fill(self, part: Tensor, key: str, offset: Sequence[int]) -> None:
        """Fill `part`, which begins at `offset` of the Megatron tensor `key`; rows beyond the vocabulary become 0."""
        source = self._sources[key]
        count = min(max(source.tensor.shape[0] - offset[0], 0), part.shape[0])
        part[count:] = 0
        ahead = len(source.start) - len(offset)  # axes of stacked layers, which checkpoints of runs may have
        start = (*source.start[:ahead], *(a + b for a, b in zip(source.start[ahead:], offset, strict=True)))
        wanted = part[:count]
        if wanted.numel():
            self._checkpoint.read_into(wanted[(None,) * ahead], source.key, start)
        if not all_finite(wanted):
            raise CheckpointError(f"{self._checkpoint.folder}: {key} has NaN or Inf; import the model again")


def chunks(tensor: MegatronTensor, dtype: torch.dtype) -> Iterable[tuple[int, int]]:
    """(first row, rows) of each chunk of a tensor."""
    row = prod(tensor.shape[1:]) * dtype.itemsize
    rows = max(CHUNK_BYTES // row, 1)
    return [(start, min(rows, tensor.shape[0] - start)) for start in range(0, tensor.shape[0], rows)]


def write_chunks(
    path: Path,
    tensors: Sequence[MegatronTensor],
    dtypes: Mapping[str, torch.dtype],
    read: Callable[[MegatronTensor, int, int, torch.dtype], Tensor],
    report: Callable[[int], None],
) -> Places:
    """One .distcp file with these tensors; where each chunk of them lies in it.

    read(tensor, first row, rows, dtype): the values. report: told the bytes of each chunk once it is written.
    """
    places: Places = {}
    with path.open("wb") as file:
        for tensor in tensors:
            for start, count in chunks(tensor, dtypes[tensor.key]):
                values = read(tensor, start, count, dtypes[tensor.key])
                offset = file.tell()
                torch.save(values, file)
                index = MetadataIndex(tensor.key, (start, *(0 for _ in tensor.shape[1:])))
                places[index] = _StorageInfo(path.name, offset, file.tell() - offset)
                report(values.nbytes)
    return places


def write_metadata(
    folder: Path, tensors: Sequence[MegatronTensor], dtypes: Mapping[str, torch.dtype], places: Places
) -> None:
    """What makes a folder of .distcp files a checkpoint, for torch, for Megatron-Core and for us."""
    stored: dict = {}
    for tensor in tensors:
        others = tuple(0 for _ in tensor.shape[1:])
        parts = [
            ChunkStorageMetadata(torch.Size((start, *others)), torch.Size((count, *tensor.shape[1:])))
            for start, count in chunks(tensor, dtypes[tensor.key])
        ]
        properties = TensorProperties(dtype=dtypes[tensor.key])
        stored[tensor.key] = TensorStorageMetadata(properties, torch.Size(tensor.shape), parts)
    names = {key: (key,) for key in stored}
    metadata = Metadata(stored, planner_data=names, storage_data=places, version=CURRENT_DCP_VERSION)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    torch.save({"content_metadata": {"singleton_local_shards": True}}, folder / "common.pt")
    backend = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    common = {"common_backend": "torch", "common_backend_version": 1}
    (folder / "metadata.json").write_text(json.dumps(backend | common))
