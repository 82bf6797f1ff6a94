"""From a torch_dist checkpoint to a Hugging Face folder: offline, one process or several, no model, no Megatron-Core,
no GPU.

The family's table says what must come out; the checkpoint is searched for each Megatron tensor in every way
that Megatron-Core stores it. One tensor is in memory at a time, whatever the size of the model and of the
files.
"""

from __future__ import annotations

import json
import re
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, groupby
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from megadpo.convert.config_json import ConfigJson
from megadpo.convert.families import family_of, megatron_tensors, read_shape, reward_architecture, with_head
from megadpo.convert.hf_files import INDEX, WHOLE, all_finite, by, is_imported, some
from megadpo.convert.out_folder import check_free, check_space, new_folder
from megadpo.convert.quantised import FIELD as QUANTISED
from megadpo.convert.shape import ModelShape
from megadpo.convert.small_files import small_files
from megadpo.convert.tables import MegatronTensor, hf_shapes
from megadpo.convert.torch_dist import TorchDist
from megadpo.convert.workers import Report, run_all
from megadpo.errors import CheckpointError

Dtype = Literal["bfloat16", "float16", "float32"]
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
CODES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
PREDICTION_FIELDS = ("num_nextn_predict_layers", "num_mtp_layers")
EXPERT = r"(.+\.experts\.experts\.)(\d+)\.(.+)"
"""Key of one expert's tensor; stored, the experts of a layer are usually one tensor."""
MODEL_KEYS = ("embedding.", "decoder.", "output_layer.")
"""How the keys of the model's own tensors begin; the others are the optimizer's and the trainer's."""


@dataclass(frozen=True)
class Source:
    """Where one Megatron tensor lies in the checkpoint: a box of a stored tensor."""

    tensor: MegatronTensor
    key: str
    start: tuple[int, ...]
    size: tuple[int, ...]

    @property
    def values(self) -> int:
        return prod(self.tensor.shape)

    def written(self, dtype: torch.dtype) -> torch.dtype:
        """Its dtype in an export to `dtype`."""
        return torch.float32 if self.tensor.float32 else dtype

    def bytes(self, dtype: torch.dtype) -> int:
        return self.values * self.written(dtype).itemsize


@dataclass(frozen=True)
class Reward:
    """pad_token_id: transformers takes the score at the last token that is not this one, so no text may end with it."""

    pad_token_id: int


def export_hf(
    checkpoint_dir: str | Path,
    source_folder: str | Path,
    out_dir: str | Path,
    dtype: Dtype | None = None,
    max_shard_bytes: int = 5_000_000_000,
    progress: Callable[[int, int], None] | None = None,
    reward: Reward | None = None,
    processes: int = 1,
    files: Mapping[str, Path | str] | None = None,
) -> None:
    """Write `out_dir`: safetensors of at most `max_shard_bytes` (one tensor, or one layer's q, k, v, may be
    larger) with their index, config.json, and the small files that make the folder usable.

    dtype: of the written weights; the source's config.json decides where not given, the checkpoint where that
    is silent.
    progress: called with (bytes written, bytes in all). reward: the checkpoint is a reward model's, which becomes a
    sequence classifier with one label.
    processes: writers; each writes whole files.
    files: what stands beside the weights, by name: a file to copy or a text; tokenizer and templates of the source
    (`small_files`) where not given.
    Nothing appears under `out_dir` before all is written. ModelError: the source folder; CheckpointError: the
    checkpoint is incomplete, damaged or another model's, or has NaN or Inf; StorageError: `out_dir` is not
    empty, too little space.
    """
    source, out = Path(source_folder).expanduser(), Path(out_dir).expanduser().resolve()
    shape, config = _shape(source, Path(checkpoint_dir), reward), ConfigJson(source)
    check_free(out, "export")
    checkpoint = TorchDist(checkpoint_dir)
    sources = find(checkpoint, shape, source)
    name = dtype or config.dtype() or _dtype_of(checkpoint.dtype(sources[0].key))
    shards = _shards(sources, DTYPES[name], max_shard_bytes)
    copies = small_files(source) if files is None else files
    total = sum(x.bytes(DTYPES[name]) for x in sources)
    report = _adding(progress, total)
    with new_folder(out, "export") as folder:
        check_space(out, total + sum(map(_size, copies.values())), "export")
        for title, file in copies.items():
            target = folder / title
            target.parent.mkdir(exist_ok=True)
            if isinstance(file, str):
                target.write_text(file, encoding="utf-8")
            else:
                shutil.copyfile(file, target)
        tasks = [
            partial(_write_shard, folder / title, shard, DTYPES[name], Path(checkpoint_dir))
            for title, shard in shards.items()
        ]
        run_all(tasks, processes, report)
        if len(shards) > 1:
            _write_index(folder / INDEX, shards, total)
        changes = {} if reward is None else _classifier(shape, reward)
        _write_config(folder / "config.json", config, name, changes)


def _shape(source: Path, checkpoint_dir: Path, reward: Reward | None) -> ModelShape:
    """The model in the checkpoint: an imported folder's has the head that it came with, a run's the objective's."""
    shape = read_shape(source)
    return shape if is_imported(checkpoint_dir) else with_head(shape, "scalar" if reward else "logprob", source)


def _size(file: Path | str) -> int:
    return len(file.encode()) if isinstance(file, str) else file.stat().st_size


def find(checkpoint: TorchDist, shape: ModelShape, source: Path) -> list[Source]:
    """Every Megatron tensor of the model in the checkpoint, in the order of the network.

    CheckpointError lists all that is missing, of another shape, or not part of the model.
    """
    found, missing, misshapen, used = [], [], [], set()
    for tensor in megatron_tensors(shape).values():
        place = next((x for x in _spellings(tensor, shape.num_layers) if x[0] in checkpoint.tensors), None)
        if place is None:
            missing.append(tensor.key)
            continue
        key, stacks, half = place
        used.add(key)
        stored, dtype = checkpoint.shape(key), checkpoint.dtype(key)
        if dtype not in CODES or not _fits(stored, tensor, stacks, halved=half is not None):
            misshapen.append(f"{key} ({by(stored)}, {dtype})")
            continue
        start = (*(index for index, _ in stacks), (half or 0) * tensor.shape[0], *(0 for _ in tensor.shape[1:]))
        found.append(Source(tensor, key, start, (*(1 for _ in stacks), *tensor.shape)))
    extra = [key for key in checkpoint.tensors if key.startswith(MODEL_KEYS) and key not in used]
    problems = (
        some("missing: ", missing),
        some("of another shape or dtype: ", list(dict.fromkeys(misshapen))),
        some("not part of that model: ", sorted(extra)),
    )
    if any(problems):
        wrong = "; ".join(x for x in problems if x)
        raise CheckpointError(f"{checkpoint.folder} does not fit the model in {source}: {wrong}")
    return found


Stacks = tuple[tuple[int, int], ...]
"""Leading axes of a stored tensor that holds a weight of all layers, or of all experts: (which one, how many)."""


def _fits(stored: tuple[int, ...], tensor: MegatronTensor, stacks: Stacks, halved: bool) -> bool:
    """Whether a stored tensor holds this one: all layers or experts in front, as one of two halves, with padding."""
    if stored[: len(stacks)] != tuple(count for _, count in stacks):
        return False
    stored = stored[len(stacks) :]
    rows = tensor.shape[0] * (2 if halved else 1)
    same = stored[:1] == (rows,) or (tensor.padded and len(stored) > 0 and stored[0] > rows)
    return same and stored[1:] == tensor.shape[1:]


def _spellings(tensor: MegatronTensor, layers: int) -> Iterator[tuple[str, Stacks, int | None]]:
    """(stored key, what is stacked in it, 0 gate or 1 up where the two are one tensor)."""
    names: list[tuple[str, Stacks]] = [(tensor.key, ())]
    for pattern, count in ((r"(decoder\.layers\.)(\d+)\.(.+)", layers), (EXPERT, tensor.experts)):
        for name, stacks in tuple(names):
            if numbered := re.fullmatch(pattern, name):
                names.append((numbered[1] + numbered[3], (*stacks, (int(numbered[2]), count))))
    for name, stacks in names:
        yield name, stacks, None
        if name.endswith(("_w", "_v")):
            yield name[:-2], stacks, "wv".index(name[-1])


def _dtype_of(stored: torch.dtype) -> str:
    return next((name for name, dtype in DTYPES.items() if dtype == stored), "bfloat16")


def _shards(sources: Sequence[Source], dtype: torch.dtype, limit: int) -> dict[str, list[Source]]:
    """Files by name. What Megatron keeps as one tensor stays in one file."""
    files: list[list[Source]] = [[]]
    size = 0
    for group in _sharing(sources):
        count = sum(source.bytes(dtype) for source in group)
        if files[-1] and size + count > limit:
            files.append([])
            size = 0
        files[-1].extend(group)
        size += count
    if len(files) == 1:
        return {WHOLE: files[0]}
    return {f"model-{i:05d}-of-{len(files):05d}.safetensors": file for i, file in enumerate(files, 1)}


def _sharing(sources: Sequence[Source]) -> list[list[Source]]:
    """Neighbours that are parts of the same Hugging Face tensor together, all others alone."""
    return [list(group) for _, group in groupby(sources, key=lambda source: source.tensor.rows[0].name)]


def _adding(progress: Callable[[int, int], None] | None, total: int) -> Callable[[int], None]:
    counts = [0]

    def report(count: int) -> None:
        counts[0] += count
        if progress:
            progress(counts[0], total)

    return report


def _write_shard(
    path: Path,
    sources: list[Source],
    dtype: torch.dtype,
    checkpoint_dir: Path,
    report: Report,
) -> None:
    """One safetensors file, tensor by tensor: length of the header, header as JSON, data."""
    checkpoint = TorchDist(checkpoint_dir)
    shapes = hf_shapes(*(source.tensor for source in sources))
    dtypes = {name: source.written(dtype) for source in sources for name in hf_shapes(source.tensor)}
    ends = list(accumulate(prod(dims) * dtypes[name].itemsize for name, dims in shapes.items()))
    header: dict = {"__metadata__": {"format": "pt"}}
    for (name, dims), start, end in zip(shapes.items(), [0, *ends], ends, strict=False):
        header[name] = {"dtype": CODES[dtypes[name]], "shape": dims, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for group in _sharing(sources):
            for tensor in _hf_tensors(group, group[0].written(dtype), checkpoint):
                file.write(tensor.flatten().view(torch.uint8).numpy().data)
                report(tensor.nbytes)


def _hf_tensors(sources: list[Source], dtype: torch.dtype, checkpoint: TorchDist) -> Iterator[Tensor]:
    """The Hugging Face tensors that these are all the parts of, contiguous, in the order of `hf_shapes`."""
    parts = [(x.tensor, checkpoint.read(x.key, x.start, x.size).view(x.tensor.shape)) for x in sources]
    for name, dims in hf_shapes(*(tensor for tensor, _ in parts)).items():
        if parts[0][0].stacked:
            values = torch.empty(dims, dtype=dtype)
            for tensor, whole in parts:
                assert tensor.stacked is not None
                values[tensor.expert, ..., tensor.stacked.start :: tensor.stacked.step] = whole.t()
        elif len(parts) == len(parts[0][0].rows) == 1:
            values = parts[0][1].to(dtype)
        else:
            values = torch.empty(dims, dtype=dtype)
            for tensor, whole in parts:
                ends = accumulate(rows.count for rows in tensor.rows)
                for rows, end in zip(tensor.rows, ends, strict=True):
                    if rows.name == name:
                        values[rows.start : rows.start + rows.count] = whole[end - rows.count : end]
        if not all_finite(values):
            stored = all(all_finite(whole) for _, whole in parts)
            reason = f" as {CODES[dtype]}, whose range is too small; use bfloat16" if stored else ""
            raise CheckpointError(f"{checkpoint.folder}: {name} has NaN or Inf{reason}; nothing was exported")
        yield values


def _write_index(path: Path, shards: dict[str, list[Source]], total: int) -> None:
    where = {name: title for title, shard in shards.items() for x in shard for name in hf_shapes(x.tensor)}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
    path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _classifier(shape: ModelShape, reward: Reward) -> dict[str, Any]:
    """What config.json says of a sequence classifier with one label."""
    return {
        "architectures": [reward_architecture(family_of(shape))],
        "id2label": {"0": "reward"},
        "label2id": {"reward": 0},
        "pad_token_id": reward.pad_token_id,
        "tie_word_embeddings": False,
    }


def _write_config(path: Path, config: ConfigJson, dtype: str, changes: dict[str, Any]) -> None:
    """The source's config.json with changes; byte for byte, unless there are some, or it says another dtype than what
    was written, weights that are quantised, or layers behind the last, which are not written.
    """
    spelled = [field for field in ("dtype", "torch_dtype") if config.get(field)] or ["torch_dtype"]
    extra = [field for field in PREDICTION_FIELDS if config.get(field)]
    quantised = config.get(QUANTISED) is not None
    if all(config.get(field) == dtype for field in spelled) and not (extra or quantised or changes):
        shutil.copyfile(config.path, path)
        return
    changed = config.values | changes | dict.fromkeys(spelled, dtype) | dict.fromkeys(extra, 0)
    if quantised:
        del changed[QUANTISED]
    path.write_text(json.dumps(changed, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
