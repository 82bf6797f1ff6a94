"""From a model folder, Hugging Face's or one that `megadpo import` wrote, into this rank's parameters, reading only the
slices that the rank owns.

There is no collective and no whole model in memory: Megatron-Core's sharded_state_dict says which rows and
columns of which tensor every local parameter is, the family's table says which rows of which file those are.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megadpo.convert.families import HEAD, family_of, megatron_tensors
from megadpo.convert.hf_files import HFFiles, all_finite, is_imported
from megadpo.convert.imported import StoredWeights
from megadpo.convert.quantised import open_folder
from megadpo.convert.shape import ModelShape
from megadpo.convert.tables import MegatronTensor, hf_shapes
from megadpo.errors import ModelError


def check_hf(shape: ModelShape, folder: str | Path) -> None:
    """Everything that can be wrong with a folder's files except NaN, from their headers alone.

    For one process, before any rank starts. ModelError lists what is missing, extra, misshapen or of a wrong
    dtype, or names the file that is missing, cut off or damaged; CheckpointError does for an imported folder.
    """
    if is_imported(folder):
        StoredWeights(folder, shape)
        return
    files = open_folder(folder)
    wanted = hf_shapes(*_in_files(shape).values())
    files.check_duplicates()
    files.check(wanted, wanted, _ignored(shape))


@torch.no_grad()
def load_hf(
    model_chunks: Sequence[Any], shape: ModelShape, folder: str | Path, on_tensor: Callable[[], None] = lambda: None
) -> None:
    """Fill every parameter of this rank's GPTModel chunks in place, converted to the parameter's dtype.

    Rows that pad the vocabulary become 0. Tied models: the copy on the last pipeline stage is read from the
    embedding. ModelError as `check_hf` (names over the whole folder, shapes and dtypes of what this rank
    reads), and for NaN or Inf in a weight; CheckpointError for the same in an imported folder. Parameters may then be
    half filled. The head of a new reward model begins with zeros: every reward is 0.
    """
    tensors = megatron_tensors(shape)
    entries = [entry for chunk in model_chunks for entry in _entries(chunk)]
    pieces = [piece for entry in entries for piece in _pieces(_nowhere(entry))]
    unknown = sorted({piece.key for piece in pieces} - tensors.keys())
    if unknown:
        raise KeyError(f"the table of family {shape.family} has no row for the parameters {unknown}")
    for piece in pieces:
        _same_size(piece, tensors[piece.key])
    fill_piece = _reader(shape, folder, tensors, pieces)
    for entry in entries:
        with _plain(entry) as there:
            for piece in _pieces(there):
                if shape.head == "new scalar" and piece.key == HEAD:
                    piece.data.zero_()
                else:
                    fill_piece(piece)
                on_tensor()
    filled = sum(entry.data.numel() for entry in entries if not _is_buffer(entry, tensors))
    owned = sum(p.numel() for chunk in model_chunks for p in chunk.parameters())
    if filled != owned:
        raise KeyError(f"{owned - filled} of {owned} parameters are not in the model's sharded_state_dict")


def _reader(
    shape: ModelShape, folder: str | Path, tensors: dict[str, MegatronTensor], pieces: Sequence[Any]
) -> Callable[[Any], None]:
    """What fills a piece from the folder, once the folder is known to hold what the pieces need."""
    if (Path(folder).expanduser() / ".metadata").is_file():
        stored = StoredWeights(folder, shape)
        return lambda piece: stored.fill(piece.data, piece.key, piece.global_offset)
    files, here = open_folder(folder), _in_files(shape)
    mine = hf_shapes(*(here[piece.key] for piece in pieces if piece.key in here))
    files.check(hf_shapes(*here.values()), mine, _ignored(shape))
    return lambda piece: fill(piece, tensors[piece.key], files, shape)


def _ignored(shape: ModelShape) -> str:
    family = family_of(shape)
    spare = shape.tied or shape.head == "new scalar"
    patterns = [family.ignored, *([re.escape(family.output)] if spare else [])]
    patterns += [rf"model\.layers\.{shape.num_layers + i}\..*" for i in range(shape.prediction_layers)]
    return "|".join(patterns)


def _in_files(shape: ModelShape) -> dict[str, MegatronTensor]:
    """What a folder must hold; the head of a new reward model is in none."""
    tensors = megatron_tensors(shape)
    return {key: t for key, t in tensors.items() if shape.head != "new scalar" or key != HEAD}


def _entries(chunk: Any) -> list[Any]:
    """This chunk's parameters as Megatron-Core describes them."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    every = chunk.sharded_state_dict(metadata={"singleton_local_shards": True}).values()
    return [entry for entry in every if isinstance(entry, ShardedTensor | ShardedTensorFactory)]


def _pieces(entry: Any) -> list[Any]:
    """A parameter as Megatron-Core's ShardedTensors: key, place in the whole, view of the data."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

    return entry.build() if isinstance(entry, ShardedTensorFactory) else [entry]  # a gated fc1: gate and up apart


def _nowhere(entry: Any) -> Any:
    """The entry without its data, to look at places and sizes."""
    return replace(entry, data=torch.empty(entry.data.shape, dtype=entry.data.dtype, device="meta"))


@contextmanager
def _plain(entry: Any) -> Iterator[Any]:
    """The entry with data that can be written in place. Weights that are held in FP8 alone, ours or Transformer
    Engine's, take what was written at the end; so only one of them is there in the model's dtype."""
    from megatron.core.fp8_utils import is_float8tensor

    held = getattr(entry.data, "held", None)
    if held is None and not is_float8tensor(entry.data):
        yield entry
        return
    plain = torch.empty(entry.data.shape, dtype=entry.data.dtype)
    yield replace(entry, data=plain)
    if held is not None:
        held.hold(plain)
        return
    entry.data.copy_(plain.to(entry.data.device))
    if hasattr(entry.data, "_high_precision_init_val"):  # what the optimizer makes its masters of
        entry.data._high_precision_init_val = plain


def _is_buffer(entry: Any, tensors: dict[str, MegatronTensor]) -> bool:
    """Whether it is none of the module's parameters."""
    return hasattr(entry.data, "held") or any(tensors[piece.key].float32 for piece in _pieces(_nowhere(entry)))


def _same_size(piece: Any, tensor: MegatronTensor) -> None:
    whole, expected = tuple(piece.global_shape), tensor.shape
    if whole[1:] != expected[1:] or whole[0] < expected[0] or (whole[0] > expected[0] and not tensor.padded):
        raise ValueError(f"{piece.key} was built as {whole}, its table says {expected}")


def _sources(piece: Any, tensor: MegatronTensor) -> Iterator[tuple[slice, str, tuple[slice, ...]]]:
    """(rows of the piece, HF name, part of that tensor) for everything that the piece is made of."""
    first, count = piece.global_offset[0], piece.local_shape[0]
    others = tuple(
        slice(start, start + size) for start, size in zip(piece.global_offset[1:], piece.local_shape[1:], strict=True)
    )
    if stacked := tensor.stacked:
        expert, step = slice(tensor.expert, tensor.expert + 1), stacked.step
        yield slice(0, count), tensor.rows[0].name, (expert, *others, slice(first * step, (first + count) * step))
        return
    at = 0
    for rows in tensor.rows:
        begin, end = max(first, at), min(first + count, at + rows.count)
        if begin < end:
            source = slice(rows.start + begin - at, rows.start + end - at)
            yield slice(begin - first, end - first), rows.name, (source, *others)
        at += rows.count


def fill(piece: Any, tensor: MegatronTensor, files: HFFiles, shape: ModelShape) -> None:
    """Fill piece.data, the part of a whole Megatron tensor at piece.global_offset, from the Hugging Face files."""
    if tensor.padded:
        piece.data[max(tensor.shape[0] - piece.global_offset[0], 0) :] = 0
    for place, name, part in _sources(piece, tensor):
        values = files.slice(name)[part]
        if not all_finite(values):
            raise ModelError(f"{files.folder}: {name} has NaN or Inf: the weights are damaged; get or make them again")
        if stacked := tensor.stacked:  # [1, (columns,) rows * step]
            values = values[0, ..., stacked.start :: stacked.step].t()
        piece.data[place].copy_(values)
    _compare_tied(piece, tensor, files, shape)


def _compare_tied(piece: Any, tensor: MegatronTensor, files: HFFiles, shape: ModelShape) -> None:
    """A tied folder that holds an output layer all the same: it must be the embedding, or one is lost."""
    family = family_of(shape)
    if not shape.tied or family.output not in files.where:
        return
    for _, name, part in _sources(piece, tensor):
        if name == family.embedding and not _equal(files, name, family.output, part):
            raise ModelError(
                f"{files.folder}: config.json says tie_word_embeddings, but {family.output} differs from "
                f"{name}; set tie_word_embeddings to false, or remove the one that is not meant"
            )


def _equal(files: HFFiles, one: str, other: str, part: tuple[slice, ...]) -> bool:
    same = files.stored(one).shape == files.stored(other).shape
    return same and torch.equal(files.slice(one)[part], files.slice(other)[part])
