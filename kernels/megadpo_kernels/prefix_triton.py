"""Backward pass of `prefix.duplicate` as a Triton kernel: one program per row of the stream, no atomics."""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl
from torch import Tensor

from megadpo_kernels.configs import config_for


@triton.jit
def add_copies_kernel(gradients, places, starts, sums, size, BLOCK: tl.constexpr):
    """Add a row's copies, each of `size` elements, in their order; a row without a copy gets 0."""
    row = tl.program_id(0).to(tl.int64)
    start = tl.load(starts + row)
    end = tl.load(starts + row + 1)
    for at in range(0, size, BLOCK):
        lanes = at + tl.arange(0, BLOCK)
        inside = lanes < size
        total = tl.zeros((BLOCK,), tl.float32)
        for copy in range(start, end):
            source = tl.load(places + copy) * size
            total += tl.load(gradients + source + lanes, mask=inside, other=0.0).to(tl.float32)
        tl.store(sums + row * size + lanes, total.to(sums.dtype.element_ty), mask=inside)


def add_copies(gradient_KHW: Tensor, places_K: Tensor, starts_T1: Tensor) -> Tensor:
    """Gradients of the copies, contiguous [K, H, W] -> gradient of the rows [T, H, W]."""
    length, heads, width = len(starts_T1) - 1, *gradient_KHW.shape[1:]
    sums = gradient_KHW.new_empty(length, heads, width)
    if length:
        config = config_for("add_copies", gradient_KHW.device, heads * width, sums.dtype)
        add_copies_kernel[(length,)](
            gradient_KHW, places_K, starts_T1, sums, heads * width, BLOCK=config.block, num_warps=config.warps
        )
    return sums
