"""The weights of a Hugging Face folder, safetensors or .bin: lazy, and checked before anything is read from them."""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megadpo.convert.config_json import no_duplicates, read_json
from megadpo.convert.pickles import CODES, INDEX_BIN, WHOLE_BIN, read_pickle
from megadpo.convert.torch_dist import TorchDist
from megadpo.errors import ModelError

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ITEM_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "F8_E4M3": 1,
    "BOOL": 1,
}
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
READABLE = tuple(DTYPES)
"""What a weight may be stored as; the others are quantised or no weights."""
LARGEST_HEADER = 100_000_000
"""The safetensors format's own limit, in bytes."""
NAMED = 3
"""How many names of each kind one message gives."""


@dataclass(frozen=True)
class Stored:
    """One tensor as its file's header describes it. Bytes [start, end) count from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    size: int
    """Bytes of the whole file."""
    data: int
    """Where the data starts in the file."""
    tensors: dict[str, Stored]


def read_header(path: Path) -> Header:
    """The header of a safetensors file, checked: its tensors fill the file, without gap or overlap."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, LARGEST_HEADER):
                raise ModelError(
                    f"{path}: no safetensors file, or cut off: {size} bytes, of which {length} should be its "
                    "header; get the file again"
                )
            text = file.read(length)
    except FileNotFoundError:
        raise ModelError(f"{path} is missing; the folder's download is not complete, get the file again") from None
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        entries = json.loads(text, object_pairs_hook=no_duplicates)
        tensors = {name: _stored(entry) for name, entry in entries.items() if name != "__metadata__"}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ModelError(f"{path}: broken safetensors header ({error}); get the file again") from error
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if tensor.start != end:
            raise ModelError(f"{path}: broken safetensors header: {name} starts at {tensor.start}, not {end}")
        end = tensor.end
    if 8 + length + end != size:
        raise ModelError(
            f"{path}: has {size} bytes, its header describes {8 + length + end}: the file is cut off or "
            "damaged; get it again"
        )
    return Header(size, 8 + length, tensors)


def _stored(entry: dict[str, Any]) -> Stored:
    shape, (start, end), dtype = tuple(entry["shape"]), entry["data_offsets"], entry["dtype"]
    if not all(isinstance(n, int) and n >= 0 for n in (*shape, start, end)):
        raise ValueError("shapes and offsets must be whole numbers")
    if dtype in ITEM_BYTES and math.prod(shape) * ITEM_BYTES[dtype] != end - start:
        raise ValueError(f"{dtype} {list(shape)} does not fill {end - start} bytes")
    return Stored(str(dtype), shape, start, end)


class HFFiles:
    """The tensors of a folder by name. Headers are read when first needed, data only by `slice`."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()
        self._headers: dict[str, Header] = {}
        self._open: dict[str, Any] = {}

    @property
    def where(self) -> dict[str, str]:
        """File of every tensor under the name and in the form that a model knows."""
        return self.located

    @cached_property
    def located(self) -> dict[str, str]:
        """File of every tensor as it is stored; as transformers does it, one file comes before an index, safetensors
        before .bin."""
        if (self.folder / self.source).exists() and self.source in (WHOLE, WHOLE_BIN):
            return dict.fromkeys(self.header(self.source).tensors, self.source)
        index = self.folder / self.source
        suffix = ".bin" if self.source == INDEX_BIN else ".safetensors"
        where = read_json(index).get("weight_map")
        if not isinstance(where, dict) or not where:
            raise ModelError(f"{index}: has no weight_map that says which tensor is in which file")
        for name, file in where.items():
            if not isinstance(file, str) or Path(file).name != file or not file.endswith(suffix):
                raise ModelError(
                    f"{index}: {name} is said to be in {str(file)[:200]!r}; must be the "
                    f"name of a {suffix} file in the same folder"
                )
        return where

    @cached_property
    def source(self) -> str:
        """The file that says where the tensors are: an index, or the one file that holds them all."""
        found = next((x for x in (WHOLE, INDEX, WHOLE_BIN, INDEX_BIN) if (self.folder / x).exists()), None)
        if found is None:
            raise ModelError(f"{self.folder}: has neither {WHOLE} nor {INDEX}, nor {WHOLE_BIN} or its index")
        return found

    @property
    def files(self) -> list[str]:
        """Names of the files that hold the tensors."""
        return sorted(set(self.located.values()))

    def header(self, file: str) -> Header:
        if file not in self._headers:
            path = self.folder / file
            self._headers[file] = self._pickle_header(file) if file.endswith(".bin") else read_header(path)
        return self._headers[file]

    def _pickle_header(self, file: str) -> Header:
        """A .bin file's tensors as a header; there is no order of bytes in it to speak of."""
        tensors = self._open[file] = read_pickle(self.folder / file)
        stored = {
            name: Stored(CODES.get(x.dtype, str(x.dtype)), tuple(x.shape), 0, x.nbytes) for name, x in tensors.items()
        }
        return Header((self.folder / file).stat().st_size, 0, stored)

    def stored(self, name: str) -> Stored:
        """dtype, shape and place of one tensor."""
        file = self.located[name]
        tensors = self.header(file).tensors
        if name not in tensors:
            raise ModelError(f"{self.folder / self.source}: says that {name} is in {file}, which does not hold it")
        return tensors[name]

    def dtype(self, name: str) -> torch.dtype:
        """What `slice` gives."""
        return DTYPES[self.stored(name).dtype]

    def slice(self, name: str) -> Any:
        """One tensor, not yet read: index it to read just that part, as a CPU tensor of the stored dtype."""
        HFFiles.stored(self, name)
        file = self.located[name]
        if file.endswith(".bin"):
            return self._open[file][name]
        try:
            if file not in self._open:
                self._open[file] = safe_open(self.folder / file, "pt")
            return self._open[file].get_slice(name)
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{self.folder / file}: {error}; get the file again") from error

    def check(self, wanted: Mapping[str, tuple[int, ...]], look_into: Iterable[str], ignored: str) -> None:
        """Compare with the model's tensors (name -> shape) and report all that is wrong as one ModelError.

        Names are compared over the whole folder; the headers of just the tensors named by `look_into` are
        read. Names that match the regular expression `ignored` may be there or not.
        """
        extra = sorted(n for n in self.where.keys() - wanted.keys() if not re.fullmatch(ignored, n))
        missing = sorted(wanted.keys() - self.where.keys())
        misshapen, unreadable = [], []
        for name in look_into:
            if name not in self.where:
                continue
            stored = self.stored(name)
            if stored.dtype not in READABLE:
                unreadable.append(f"{name} ({stored.dtype})")
            elif stored.shape != wanted[name]:
                misshapen.append(f"{name} ({by(stored.shape)}, not {by(wanted[name])})")
        problems = (
            some("missing: ", missing),
            some("not part of the model that config.json describes: ", extra),
            some("wrong shape: ", misshapen),
            some(f"dtype other than {', '.join(READABLE)} (convert to bfloat16 first): ", unreadable),
        )
        if any(problems):
            raise ModelError(f"{self.folder}: {'; '.join(p for p in problems if p)}")

    def check_duplicates(self) -> None:
        """Read every header; a tensor in a file that the index does not give it is an error: which one is
        meant?
        """
        for file in self.files:
            for name in self.header(file).tensors:
                if self.located.get(name) != file:
                    other = self.located.get(name)
                    said = f"says it is in {other}" if other else "does not name it"
                    raise ModelError(f"{self.folder / file}: holds {some('', [name])}, but {self.source} {said}")


def weights_warnings(folder: str | Path) -> list[str]:
    """What to tell the user, a line each, where a folder's weights can be read but should not stay as they are."""
    if is_imported(folder) or HFFiles(folder).source not in (WHOLE_BIN, INDEX_BIN):
        return []
    return [
        f"warning    {folder}: has no safetensors, so its .bin files are read (weights only, no code is run); "
        "safetensors are safer and can be checked before they are read"
    ]


def all_finite(values: Tensor) -> bool:
    """Whether there is neither NaN nor infinity. aminmax passes both on, without a temporary."""
    return not values.numel() or all(bool(torch.isfinite(x)) for x in torch.aminmax(values))


def by(shape: tuple[int, ...]) -> str:
    """A shape in words."""
    return " x ".join(map(str, shape)) or "a single number"


def some(what: str, names: list[str]) -> str:
    """The first few names and how many more; what a damaged file calls a name stays on the line."""
    if not names:
        return ""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return what + ", ".join(x if x.isprintable() else repr(x) for x in (x[:200] for x in names[:NAMED])) + more


SAMPLES, SAMPLE_BYTES, TENSOR_BYTES = 64, 65536, 4096


def weights_digest(folder: str | Path) -> str:
    """sha256, hexadecimal, that tells one set of weights from another in seconds, whatever its size.

    It covers config.json and, of every file of weights: name, size, header (an imported folder's .metadata), 64
    blocks of 64 KiB evenly spaced over its data, and 4 KiB from the middle of every tensor. Bytes between the samples
    are not read: a full hash of 140 GB takes minutes. Training, merging or converting a model changes every sample of
    the tensors that it touches.
    """
    digest = hashlib.sha256()
    folder = Path(folder).expanduser()
    try:
        for part in _of_checkpoint(folder) if is_imported(folder) else _identity(HFFiles(folder)):
            digest.update(struct.pack("<Q", len(part)))
            digest.update(part)
    except OSError as error:
        raise ModelError(f"{error.filename}: cannot be read: {error.strerror}") from error
    return digest.hexdigest()


def is_imported(folder: str | Path) -> bool:
    """Whether a model folder was written by `megadpo import`: config.json and tokenizer beside a checkpoint's
    tensors."""
    folder = Path(folder).expanduser()
    return (folder / ".metadata").is_file() and (folder / "config.json").is_file()


def _identity(files: HFFiles) -> Iterator[bytes]:
    yield (files.folder / "config.json").read_bytes()
    for name in files.files:
        header = files.header(name)
        yield name.encode()
        yield struct.pack("<Q", header.size)
        middles = [(x.start, x.end) for x in header.tensors.values()] if name.endswith(".safetensors") else []
        yield from _samples(files.folder / name, header.size, header.data, middles)
        if not middles:
            for tensor in header.tensors:
                values = files.slice(tensor).reshape(-1)
                middle = values[len(values) // 2 :][: TENSOR_BYTES // values.itemsize]
                yield middle.contiguous().view(torch.uint8).numpy().tobytes()


def _of_checkpoint(folder: Path) -> Iterator[bytes]:
    yield (folder / "config.json").read_bytes()
    yield (folder / ".metadata").read_bytes()
    for name, chunks in sorted(TorchDist(folder).extents().items()):
        size = (folder / name).stat().st_size
        yield name.encode()
        yield struct.pack("<Q", size)
        yield from _samples(folder / name, size, 0, chunks)


def _samples(path: Path, size: int, data: int, tensors: list[tuple[int, int]]) -> Iterator[bytes]:
    """The file's first `data` bytes, blocks of what follows, and the middle of each tensor [start, end) in it."""
    with path.open("rb") as file:
        yield file.read(data)
        last = max(size - data - SAMPLE_BYTES, 0)
        for sample in range(SAMPLES):
            yield _at(file, data + last * sample // (SAMPLES - 1), SAMPLE_BYTES)
        for start, end in tensors:
            middle = (start + max(end - TENSOR_BYTES, start)) // 2
            yield _at(file, data + middle, min(TENSOR_BYTES, end - middle))


def _at(file: BinaryIO, offset: int, count: int) -> bytes:
    file.seek(offset)
    return file.read(count)
