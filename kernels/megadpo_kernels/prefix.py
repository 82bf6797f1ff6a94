"""Keys and values of a stream in which prompts stand once, laid out as one-call attention kernels want them: every
segment's own, after a copy of its prompt's. The backward pass adds the copies' gradients up in a fixed order.

Axes: T rows of the stream, K gathered rows, H key/value heads, W head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megadpo_kernels.backends import Backend, uses_triton


@dataclass(frozen=True)
class Copies:
    """Which row of the stream each gathered row comes from, and the way back. Made once for a micro-batch."""

    rows_K: Tensor
    """int64, row of the stream."""
    places_K: Tensor
    """int64, gathered rows sorted by where they come from; copies of one row in the order in which they stand."""
    starts_T1: Tensor
    """int64 [T + 1], where the copies of each row start in `places_K`."""

    @staticmethod
    def of(rows_K: Tensor, length: int) -> Copies:
        """For a stream of `length` rows. On the CPU, before the micro-batch is moved."""
        counts_T = torch.bincount(rows_K, minlength=length)
        starts_T1 = torch.cat([counts_T.new_zeros(1), counts_T.cumsum(0)])
        return Copies(rows_K, torch.argsort(rows_K, stable=True), starts_T1)

    def to(self, device: torch.device) -> Copies:
        parts = (self.rows_K, self.places_K, self.starts_T1)
        return Copies(*(part.to(device, non_blocking=True) for part in parts))


def duplicate(x_THW: Tensor, copies: Copies, backend: Backend = "auto") -> Tensor:
    """x[rows], [K, H, W], with gradient to x.

    The triton back end adds the gradients of a row's copies in float32, always in the same order, and rounds once;
    torch's index_select (the other back ends) adds them in their dtype and, on a GPU, with atomics, in an order that
    may change from run to run. Raises ValueError for a back end that cannot run.
    """
    if uses_triton(backend, x_THW.device):
        return _Duplicate.apply(x_THW, copies)
    return x_THW.index_select(0, copies.rows_K)


class _Duplicate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_THW: Tensor, copies: Copies) -> Tensor:
        ctx.copies = copies
        return x_THW.index_select(0, copies.rows_K)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        from megadpo_kernels import prefix_triton

        return prefix_triton.add_copies(grads[0].contiguous(), ctx.copies.places_K, ctx.copies.starts_T1), None
