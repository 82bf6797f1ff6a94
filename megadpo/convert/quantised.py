"""Folders whose weights are stored in 8 or 4 bits, read as the float32 numbers that the bits mean.

* fp8 (DeepSeek-V3): e4m3, and beside a tensor `weight` a tensor `weight_scale_inv` with one float32 factor for every
  block of usually 128 x 128.
* mxfp4 (gpt-oss): for a tensor X that holds all experts, `X_blocks` with two e2m1 numbers a byte, the lower half first,
  and `X_scales` with a power of two for every 32 of them. OCP Microscaling Formats 1.0, sections 5.3.3 and 5.4.1.

Every such number is one of float32, so nothing is lost by the decoding. Nothing here writes.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megadpo.convert.config_json import ConfigJson
from megadpo.convert.hf_files import HFFiles, Stored, by
from megadpo.errors import ModelError

METHODS = ("fp8", "mxfp4")
FIELD = "quantization_config"
SCALE_INV = "_scale_inv"
BLOCKS, SCALES = "_blocks", "_scales"
GROUP = 32
"""Numbers of one mxfp4 scale."""
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitudes by the lower three bits; the fourth is the sign."""
E8M0 = (*(2.0 ** (code - 127) for code in range(255)), float("nan"))
"""What a scale's byte means."""


def check_method(config: ConfigJson, *methods: str) -> None:
    """ModelError unless the folder is not quantised, or by one of `methods`, which the family is stored in."""
    value = config.get(FIELD)
    if value is None:
        return
    if not isinstance(value, dict) or value.get("quant_method") not in methods:
        raise config.wrong(FIELD, f"quant_method {', '.join(methods)}, or none" if methods else "none")
    if value["quant_method"] == "fp8":
        _block_size(config)
        if value.get("fmt", "e4m3") != "e4m3":
            raise config.wrong(FIELD, "fmt e4m3")


def _block_size(config: ConfigJson) -> tuple[int, int]:
    size = config.get(FIELD).get("weight_block_size")
    if not isinstance(size, list) or len(size) != 2 or not all(type(x) is int and x > 0 for x in size):
        raise config.wrong(FIELD, "weight_block_size as two positive whole numbers")
    return size[0], size[1]


def open_folder(folder: str | Path) -> HFFiles:
    """The folder's tensors, decoded where its config.json says that they are quantised."""
    config = ConfigJson(folder)
    check_method(config, *METHODS)
    method = (config.get(FIELD) or {}).get("quant_method")
    if method == "fp8":
        return Fp8Files(folder, _block_size(config))
    return Mxfp4Files(folder) if method == "mxfp4" else HFFiles(folder)


class Fp8Files(HFFiles):
    """A folder in which some matrices are e4m3 with a factor per block."""

    def __init__(self, folder: str | Path, block: tuple[int, int]) -> None:
        super().__init__(folder)
        self.block = block

    @cached_property
    def where(self) -> dict[str, str]:
        factors = {name + SCALE_INV for name in self.located}
        return {name: file for name, file in self.located.items() if name not in factors}

    def stored(self, name: str) -> Stored:
        raw = super().stored(name)
        if raw.dtype != "F8_E4M3" or name + SCALE_INV not in self.located:
            return raw
        factors = super().stored(name + SCALE_INV)
        wanted = tuple(-(-size // block) for size, block in zip(raw.shape, self.block, strict=False))
        if len(raw.shape) != 2 or factors.shape != wanted or factors.dtype != "F32":
            raise ModelError(
                f"{self.folder}: {name + SCALE_INV} is {by(factors.shape)} of {factors.dtype}; for {name} "
                f"({by(raw.shape)}) it must be {by(wanted)} of F32"
            )
        return Stored("F32", raw.shape, raw.start, raw.end)

    def slice(self, name: str) -> Any:
        if super().stored(name).dtype != "F8_E4M3":
            return super().slice(name)
        return _Fp8(super().slice(name), super().slice(name + SCALE_INV), self.block)


class _Fp8:
    """Indexed by (rows, columns) like the slice of safetensors that it stands for."""

    def __init__(self, values: Any, factors: Any, block: tuple[int, int]) -> None:
        self.values, self.factors, self.block = values, factors, block

    def __getitem__(self, part: tuple[slice, slice]) -> Tensor:
        factors = self.factors[
            tuple(slice(x.start // n, -(-x.stop // n)) for x, n in zip(part, self.block, strict=True))
        ]
        for axis, (wanted, size) in enumerate(zip(part, self.block, strict=True)):
            places = torch.arange(wanted.start, wanted.stop) // size - wanted.start // size
            factors = factors.index_select(axis, places)
        result: Tensor = self.values[part].float() * factors
        return result


class Mxfp4Files(HFFiles):
    """A folder in which tensors of all experts are e2m1 with a power of two per 32."""

    @cached_property
    def where(self) -> dict[str, str]:
        found = dict(self.located)
        for name in self.located:
            base = name.removesuffix(BLOCKS)
            if base != name and base + SCALES in found and base not in found:
                found[base] = found.pop(name)
                del found[base + SCALES]
        return found

    def stored(self, name: str) -> Stored:
        if name in self.located:
            return super().stored(name)
        blocks, scales = super().stored(name + BLOCKS), super().stored(name + SCALES)
        if (
            len(blocks.shape) != 4
            or blocks.shape != (*scales.shape, GROUP // 2)
            or {blocks.dtype, scales.dtype} != {"U8"}
        ):
            raise ModelError(
                f"{self.folder}: {name + BLOCKS} is {by(blocks.shape)} of {blocks.dtype} and {name + SCALES} "
                f"{by(scales.shape)} of {scales.dtype}; must be experts x rows x groups x {GROUP // 2} and experts x "
                "rows x groups, both of U8"
            )
        experts, rows, groups, _ = blocks.shape
        return Stored("F32", (experts, groups * GROUP, rows), blocks.start, blocks.end)

    def slice(self, name: str) -> Any:
        if name in self.located:
            return super().slice(name)
        return _Mxfp4(super().slice(name + BLOCKS), super().slice(name + SCALES))


class _Mxfp4:
    """Indexed by (experts, columns, rows), as gpt-oss names its axes where it is not quantised."""

    def __init__(self, blocks: Any, scales: Any) -> None:
        self.blocks, self.scales = blocks, scales

    def __getitem__(self, part: tuple[slice, slice, slice]) -> Tensor:
        experts, columns, rows = part
        groups = slice(columns.start // GROUP, -(-columns.stop // GROUP))
        bytes_, scales = self.blocks[experts, rows, groups], self.scales[experts, rows, groups]
        table = torch.tensor([*E2M1, *(-x for x in E2M1)])
        numbers = torch.stack([table[(bytes_ & 15).long()], table[(bytes_ >> 4).long()]], -1).flatten(-2)
        powers = torch.tensor(E8M0)[scales.long()]
        start = columns.start - groups.start * GROUP
        values = (numbers * powers[..., None]).flatten(-2)[..., start : start + columns.stop - columns.start]
        return values.transpose(1, 2)
