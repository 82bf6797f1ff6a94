"""Sizes of the kernels' blocks, read from configs.json: tuned offline, never at run time.

A kernel that tunes itself while ranks train lets them choose differently and wait for each other.
`tools/tune_kernels.py` adds rows for a GPU; what has no row of its own uses those of "any".
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

TABLE = Path(__file__).with_name("configs.json")
INTERPRETED_BLOCK = 64
"""Without a GPU kernels run in Triton's interpreter, where small blocks make small tests go through all branches."""


@dataclass(frozen=True)
class KernelConfig:
    """One row: for `kernel` on `arch` ("sm_90", or "any") in `dtype` where its length is at most `up_to`."""

    kernel: str
    arch: str
    up_to: int
    """Columns of a row, or what else the kernel's blocks divide."""
    block: int
    warps: int
    dtype: str = "any"
    """Of what the kernel writes: "bfloat16", "float16", "float32", "float64", or "any"."""


@cache
def shipped() -> tuple[KernelConfig, ...]:
    """All rows of the table, as they stand."""
    return tuple(KernelConfig(**row) for row in json.loads(TABLE.read_text()))


def choose(table: tuple[KernelConfig, ...], kernel: str, arch: str, length: int, dtype: str) -> KernelConfig:
    """The row with the smallest `up_to` that holds `length`; the architecture's own rows before those of "any", and
    among them the dtype's own."""
    fitting = [
        row
        for row in table
        if row.kernel == kernel and row.arch in (arch, "any") and row.dtype in (dtype, "any") and length <= row.up_to
    ]
    return min(fitting, key=lambda row: (row.arch == "any", row.dtype == "any", row.up_to))


def config_for(kernel: str, device: torch.device, length: int, dtype: torch.dtype) -> KernelConfig:
    """The row for a launch on this device; dtype is that of what the kernel writes."""
    if device.type != "cuda":
        return KernelConfig(kernel, "interpreter", length, INTERPRETED_BLOCK, 4)
    return choose(shipped(), kernel, architecture(device), length, str(dtype).removeprefix("torch."))


@cache
def architecture(device: torch.device) -> str:
    """Of a CUDA device, as in the table: sm_90."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"
