"""Keys and values of a stream in which prompts stand once, laid out as one-call attention kernels want them: every
segment's own, after a copy of its prompt's. Keys get their rotary embedding on the way.

Axes: T rows of the stream, K gathered rows, H key/value heads, W head width, F = W / 2 rotary frequencies.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megadpo_kernels.backends import Backend, uses_triton


@dataclass(frozen=True)
class Duplication:
    """Which row of the stream each gathered row comes from, and the way back. Made once for a micro-batch."""

    rows_K: Tensor
    """int64, row of the stream."""
    places_K: Tensor
    """int64, gathered rows sorted by where they come from; copies of one row in the order in which they stand."""
    starts_T1: Tensor
    """int64 [T + 1], where the copies of each row start in `places_K`."""

    @staticmethod
    def of(rows_K: Tensor, length: int) -> Duplication:
        """For a stream of `length` rows. On the CPU, before the micro-batch is moved."""
        counts_T = torch.bincount(rows_K, minlength=length)
        starts_T1 = torch.cat([counts_T.new_zeros(1), counts_T.cumsum(0)])
        return Duplication(rows_K, torch.argsort(rows_K, stable=True), starts_T1)

    def to(self, device: torch.device) -> Duplication:
        parts = (self.rows_K, self.places_K, self.starts_T1)
        return Duplication(*(part.to(device, non_blocking=True) for part in parts))


def rotate(x_THW: Tensor, cos_TF: Tensor, sin_TF: Tensor) -> Tensor:
    """Rotary embedding, halves of a head paired (not neighbours), in float32; result in x's dtype."""
    first, second = x_THW.float().chunk(2, -1)
    cos, sin = cos_TF[:, None], sin_TF[:, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x_THW.dtype)


def rotate_and_duplicate(
    key_THW: Tensor,
    value_THW: Tensor,
    cos_TF: Tensor,
    sin_TF: Tensor,
    duplication: Duplication,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """(rotate(key)[rows], value[rows]), each [K, H, W] in its own dtype, with gradients to key and value.

    cos, sin: float32 [T, F] of each row's position. The triton back end adds the gradients of a row's copies in
    float32, always in the same order; torch's index_select (the other back ends) adds them in their dtype and, on a
    GPU, with atomics, in an order that may change from run to run. Raises ValueError for shapes that do not fit and
    for a back end that cannot run.
    """
    if key_THW.shape != value_THW.shape or key_THW.shape[2] != 2 * cos_TF.shape[1]:
        shapes = f"{list(key_THW.shape)}, {list(value_THW.shape)} and {list(cos_TF.shape)}"
        raise ValueError(f"key, value and cos are {shapes}: need twice [T, H, W] and [T, W / 2]")
    if uses_triton(backend, key_THW.device):
        return _RotateAndDuplicate.apply(key_THW, value_THW, cos_TF, sin_TF, duplication)
    rotated = rotate(key_THW, cos_TF, sin_TF)
    return rotated.index_select(0, duplication.rows_K), value_THW.index_select(0, duplication.rows_K)


class _RotateAndDuplicate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, key_THW: Tensor, value_THW: Tensor, cos_TF: Tensor, sin_TF: Tensor, duplication: Duplication
    ) -> tuple[Tensor, Tensor]:
        from megadpo_kernels import prefix_triton

        ctx.save_for_backward(cos_TF, sin_TF)
        ctx.duplication = duplication
        return prefix_triton.forward(key_THW.contiguous(), value_THW.contiguous(), cos_TF, sin_TF, duplication.rows_K)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        from megadpo_kernels import prefix_triton

        cos_TF, sin_TF = ctx.saved_tensors
        way = ctx.duplication
        key, value = (grad.contiguous() for grad in grads)
        return *prefix_triton.backward(key, value, cos_TF, sin_TF, way.places_K, way.starts_T1), None, None, None
