"""`megadpo import`: from a Hugging Face folder to one that any grid starts from, chunk by chunk.

A chunk of 32 MiB is in memory at a time, as read and as written, in each process, whatever the size of the model.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from megadpo.convert.adapters import MergedFiles, read_peft
from megadpo.convert.config_json import ConfigJson
from megadpo.convert.families import megatron_tensors, read_shape
from megadpo.convert.hf_files import HFFiles, all_finite, is_imported, weights_digest, weights_warnings
from megadpo.convert.imported import ABOUT, Places, write_chunks, write_metadata
from megadpo.convert.importer import check_hf, fill
from megadpo.convert.out_folder import check_space, new_folder
from megadpo.convert.quantised import open_folder
from megadpo.convert.shape import ModelShape
from megadpo.convert.small_files import small_files
from megadpo.convert.tables import MegatronTensor, hf_shapes
from megadpo.convert.workers import Report, run_all
from megadpo.data.tokenizer import FILES as TOKENIZER_FILES
from megadpo.data.tokenizer import check_vocabulary, load_tokenizer
from megadpo.errors import ModelError

Dtype = Literal["bfloat16", "float16", "float32"]
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Part:
    """A part of a whole Megatron tensor, as `importer.fill` takes it."""

    data: Tensor
    global_offset: tuple[int, ...]

    @property
    def local_shape(self) -> tuple[int, ...]:
        return tuple(self.data.shape)


def import_hf(
    folder: str | Path,
    out_dir: str | Path,
    dtype: Dtype | None = None,
    adapter: str | Path | None = None,
    processes: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Write `out_dir` (megadpo/convert/imported.py says what it holds); returns warnings, a line each.

    dtype: of the written weights; each keeps its own where not given, and quantised ones become float32, which holds
    them exactly. adapter: a PEFT LoRA folder to merge into the weights. processes: writers, with a file each.
    progress: called with (bytes written, bytes in all).

    Nothing appears under `out_dir` before all is written. ModelError and TokenizerError: what is wrong with the
    folder; StorageError: `out_dir` is not empty, too little space.
    """
    source, out = Path(folder).expanduser(), Path(out_dir).expanduser().resolve()
    if is_imported(source):
        raise ModelError(f"{source}: was written by megadpo import already; give the Hugging Face folder")
    shape = read_shape(source)
    check_hf(shape, source)
    files = open_files(source, adapter, shape)
    tensors = list(megatron_tensors(shape).values())
    dtypes = {x.key: DTYPES[dtype] if dtype and not x.float32 else _stored(x, files) for x in tensors}
    warnings = [*weights_warnings(source), *_check_tokenizer(source, shape)]
    copies = {"config.json": source / "config.json", **small_files(source)}
    sizes = [prod(tensor.shape) * dtypes[tensor.key].itemsize for tensor in tensors]
    total = sum(sizes)
    with new_folder(out, "import") as partial_folder:
        check_space(out, total + sum(file.stat().st_size for file in copies.values()), "import")
        for name, file in copies.items():
            target = partial_folder / name
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, target)
        done = 0

        def report(count: int) -> None:
            nonlocal done
            done += count
            if progress:
                progress(done, total)

        tasks = [
            partial(_write, source, adapter, shape, partial_folder / f"__{number}_0.distcp", share, dtypes)
            for number, share in enumerate(_shares(tensors, sizes, processes))
        ]
        places: Places = {}
        for found in run_all(tasks, processes, report):
            places |= found
        write_metadata(partial_folder, tensors, dtypes, places)
        (partial_folder / ABOUT).write_text(json.dumps(_about(source, dtype, adapter), indent=1) + "\n")
    return warnings


def open_files(folder: Path, adapter: str | Path | None, shape: ModelShape) -> HFFiles:
    """The folder's weights, with an adapter merged into what is read of them. ModelError where it does not fit."""
    files = open_folder(folder)
    if adapter is None:
        return files
    if type(files) is not HFFiles:
        raise ModelError(f"{folder}: is quantised; import and export it as bfloat16 first, then merge the adapter")
    return MergedFiles(folder, read_peft(adapter), shape)


def _write(
    folder: Path,
    adapter: str | Path | None,
    shape: ModelShape,
    path: Path,
    tensors: Sequence[MegatronTensor],
    dtypes: dict[str, torch.dtype],
    report: Report,
) -> Places:
    files = open_files(folder, adapter, shape)

    def read(tensor: MegatronTensor, start: int, count: int, dtype: torch.dtype) -> Tensor:
        data = torch.empty(count, *tensor.shape[1:], dtype=dtype)
        fill(Part(data, (start, *(0 for _ in tensor.shape[1:]))), tensor, files, shape)
        if not all_finite(data):
            raise ModelError(f"{folder}: {tensor.key} has values beyond the range of {dtype}; use --dtype bfloat16")
        return data

    return write_chunks(path, tensors, dtypes, read, report)


def _stored(tensor: MegatronTensor, files: HFFiles) -> torch.dtype:
    """The dtype that holds all the Hugging Face tensors that a Megatron tensor is made of."""
    first, *others = (files.dtype(name) for name in hf_shapes(tensor))
    for other in others:
        first = torch.promote_types(first, other)
    return first


def _shares(tensors: Sequence[MegatronTensor], sizes: Sequence[int], count: int) -> list[list[MegatronTensor]]:
    """The tensors in up to `count` runs of about as many bytes each, in the order of the network."""
    shares: list[list[MegatronTensor]] = [[]]
    total, before = sum(sizes), 0
    for tensor, size in zip(tensors, sizes, strict=True):
        if shares[-1] and before * count >= total * len(shares) and len(shares) < count:
            shares.append([])
        shares[-1].append(tensor)
        before += size
    return shares


def _check_tokenizer(folder: Path, shape: ModelShape) -> list[str]:
    if not any(file.is_file() for pattern in TOKENIZER_FILES for file in folder.glob(pattern)):
        return [f"warning    {folder}: has no tokenizer; name one in the run file (data.tokenizer)"]
    check_vocabulary(load_tokenizer(str(folder), None), shape.vocab_size)
    return []


def _about(source: Path, dtype: str | None, adapter: str | Path | None) -> dict[str, str | None]:
    return {
        "source": ConfigJson(source).get("_name_or_path") or source.resolve().name,
        "source_weights": weights_digest(source),
        "dtype": dtype,
        "adapter": Path(adapter).expanduser().resolve().name if adapter else None,
        "megadpo": version("megadpo"),
    }
