"""Weights in pytorch_model*.bin: mapped, not read, and never unpickled without restriction.

torch.load with weights_only lets in nothing that could run code. It is not asked to do without, whatever a file needs.
"""

from __future__ import annotations

import pickle
import re
from errno import EINVAL
from pathlib import Path

import torch
from torch import Tensor

from megadpo.errors import ModelError

WHOLE_BIN, INDEX_BIN = "pytorch_model.bin", "pytorch_model.bin.index.json"
CODES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}
"""Names that safetensors has for the dtypes."""


def read_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of one .bin file, on memory-mapped storage: bytes are read when a tensor is looked at.

    ModelError: missing, damaged, of torch's format before 1.6, or anything but a dict of tensors.
    """
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise ModelError(f"{path} is missing; the folder's download is not complete, get the file again") from None
    except OSError as error:
        if error.errno == EINVAL:  # too short for what its own directory says
            raise ModelError(f"{path}: is cut off or damaged; get the file again") from error
        raise ModelError(f"{path}: cannot be read: {error.strerror or error}") from error
    except Exception as error:  # torch.load raises many kinds on damaged bytes
        raise ModelError(f"{path}: {_cause(error)}") from error
    if not isinstance(found, dict) or not found:
        raise ModelError(f"{path}: holds a {type(found).__name__}, not weights by name; convert it to safetensors")
    wrong = [name for name, value in found.items() if not isinstance(name, str) or not isinstance(value, Tensor)]
    if wrong:
        raise ModelError(f"{path}: {str(wrong[0])[:100]!r} is no tensor; keep only the model's weights in the file")
    strange = [name for name, value in found.items() if value.layout != torch.strided or value.is_quantized]
    if strange:
        raise ModelError(f"{path}: {strange[0]} is sparse or quantised; convert it to plain bfloat16 first")
    return found


def _cause(error: Exception) -> str:
    text = str(error)
    if "mmap can only be used with files saved with" in text:
        return (
            "is no zip archive, as torch has written since 1.6: damaged, or too old to be read in parts; get the file "
            "again, or the model as safetensors"
        )
    if isinstance(error, pickle.UnpicklingError) and (name := re.search(r"GLOBAL ([\w.]+)", text)):
        return f"names {name[1]}, which no weights need and which could run code: refused; get the model as safetensors"
    lines = [line for line in text.splitlines() if line.strip()]
    reason = lines[0].split(": ")[-1].strip()[:100] if lines else type(error).__name__
    if isinstance(error, pickle.UnpicklingError):
        return "is no file of plain weights, or damaged: refused; get the model as safetensors"
    return f"is cut off or damaged ({reason}); get the file again"
