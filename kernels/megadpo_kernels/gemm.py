"""The head's three matrix products: 16-bit or float32 in, float32 inside, nothing rounded to 16 bits on the way.

On CUDA they are cuBLAS calls with float32 output. A CPU has no such call: there 16-bit operands are widened, a few
thousand rows of the vocabulary at a time.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

TILE = 4096
"""Rows of the vocabulary that a CPU widens at a time."""


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
    """slope @ weight, [M, D], rounded once to the operands' dtype."""
    if slope_MV.dtype == torch.float32 or slope_MV.is_cuda:
        return slope_MV @ weight_VD
    total = torch.zeros(len(slope_MV), weight_VD.shape[1], device=slope_MV.device)
    for tile in _tiles(len(weight_VD)):
        total.addmm_(slope_MV[:, tile].float(), weight_VD[tile].float())
    return total.to(slope_MV.dtype)


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
