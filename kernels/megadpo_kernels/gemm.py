"""The head's three matrix products: 16-bit or float32 in, float32 inside, nothing rounded to 16 bits on the way.

On CUDA they are cuBLAS calls with float32 output. A CPU has no such call: there 16-bit operands are widened, a few
thousand rows of the vocabulary at a time.

The gradient of the logits (slope) must be 16 bits wide for the tensor cores. Over many rows the roundings cancel out;
of few rows one number may carry the whole gradient, and its rounding (up to 2^-8 in bfloat16) with it. So few rows come
as float32 and go through the same products in two 16-bit parts, one below the other: with so few, reading the weight
takes longer than either.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

TILE = 4096
"""Rows of the vocabulary that a CPU widens at a time."""

FEW = 64
"""Rows up to which a slope keeps more digits. Twice as many, at 1 FLOP per byte of 16-bit weight and row, are still
below what an H200 computes per byte that it reads (700 TFLOP/s over 4.8 TB/s: 146)."""


def slope_dtype(rows: int, dtype: torch.dtype) -> torch.dtype:
    """In which the slope of so many rows is wanted, for operands of `dtype`."""
    return torch.float32 if rows <= FEW else dtype


def operands(slope_MV: Tensor, hidden_MD: Tensor) -> tuple[Tensor, Tensor]:
    """Both in hidden's dtype, with M rows, or 2M where the slope has more digits: its parts, and hidden twice."""
    if slope_MV.dtype == hidden_MD.dtype:
        return slope_MV, hidden_MD
    high_MV = slope_MV.to(hidden_MD.dtype)
    low_MV = (slope_MV - high_MV).to(hidden_MD.dtype)
    return torch.cat([high_MV, low_MV]), hidden_MD.repeat(2, 1)


def logits_into(out_MV: Tensor, hidden_MD: Tensor, weight_VD: Tensor) -> None:
    """out = hidden @ weight^T; out is float32 and may have a longer row stride."""
    if hidden_MD.dtype == torch.float32:
        torch.mm(hidden_MD, weight_VD.t(), out=out_MV)
    elif hidden_MD.is_cuda:
        torch.ops.aten.mm.dtype_out(hidden_MD, weight_VD.t(), torch.float32, out=out_MV)
    else:
        wide = hidden_MD.float()
        for tile in _tiles(len(weight_VD)):
            torch.mm(wide, weight_VD[tile].float().t(), out=out_MV[:, tile])


def hidden_gradient(slope_MV: Tensor, weight_VD: Tensor) -> Tensor:
    """slope @ weight, float32 [M, D]: parts of other ranks and rows are added before anything is rounded."""
    if slope_MV.dtype == torch.float32:
        return slope_MV @ weight_VD
    if slope_MV.is_cuda:
        return torch.ops.aten.mm.dtype(slope_MV, weight_VD, torch.float32)
    total = torch.zeros(len(slope_MV), weight_VD.shape[1], device=slope_MV.device)
    for tile in _tiles(len(weight_VD)):
        total.addmm_(slope_MV[:, tile].float(), weight_VD[tile].float())
    return total


def add_weight_gradient(total_VD: Tensor, slope_MV: Tensor, hidden_MD: Tensor) -> None:
    """total += slope^T @ hidden, in place; total is float32."""
    if slope_MV.dtype == torch.float32:
        total_VD.addmm_(slope_MV.t(), hidden_MD)
    elif slope_MV.is_cuda:
        torch.ops.aten.addmm.dtype_out(total_VD, slope_MV.t(), hidden_MD, torch.float32, out=total_VD)
    else:
        wide = hidden_MD.float()
        for tile in _tiles(len(total_VD)):
            total_VD[tile].addmm_(slope_MV[:, tile].float().t(), wide)


def _tiles(rows: int) -> Iterator[slice]:
    return (slice(at, min(at + TILE, rows)) for at in range(0, rows, TILE))
