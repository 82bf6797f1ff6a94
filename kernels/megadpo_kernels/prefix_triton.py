"""`prefix.rotate_and_duplicate` as Triton kernels: one program per written row, no atomics."""

# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: PLR0913

import triton
import triton.language as tl
from torch import Tensor

from megadpo_kernels.configs import config_for


@triton.jit(do_not_specialize=["pairs"])
def duplicate_kernel(
    keys, values, cos, sin, rows, new_keys, new_values, pairs, HALF: tl.constexpr, BLOCK: tl.constexpr
):
    """One program per gathered row; `pairs` = heads * HALF pairs of elements (i, i + HALF) of a head."""
    place = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + place)
    source = row * pairs * 2
    target = place * pairs * 2
    for at in range(0, pairs, BLOCK):
        lanes = at + tl.arange(0, BLOCK)
        inside = lanes < pairs
        angle = lanes % HALF
        first = lanes // HALF * (2 * HALF) + angle
        c = tl.load(cos + row * HALF + angle)
        s = tl.load(sin + row * HALF + angle)
        a = tl.load(keys + source + first, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(keys + source + first + HALF, mask=inside, other=0.0).to(tl.float32)
        tl.store(new_keys + target + first, (a * c - b * s).to(new_keys.dtype.element_ty), mask=inside)
        tl.store(new_keys + target + first + HALF, (b * c + a * s).to(new_keys.dtype.element_ty), mask=inside)
        tl.store(new_values + target + first, tl.load(values + source + first, mask=inside), mask=inside)
        tl.store(new_values + target + first + HALF, tl.load(values + source + first + HALF, mask=inside), mask=inside)


@triton.jit(do_not_specialize=["pairs"])
def add_copies_kernel(
    new_keys, new_values, cos, sin, places, starts, keys, values, pairs, HALF: tl.constexpr, BLOCK: tl.constexpr
):
    """One program per row of the stream: add the gradients of its copies in their order, then turn the key's back."""
    row = tl.program_id(0).to(tl.int64)
    start = tl.load(starts + row)
    end = tl.load(starts + row + 1)
    target = row * pairs * 2
    for at in range(0, pairs, BLOCK):
        lanes = at + tl.arange(0, BLOCK)
        inside = lanes < pairs
        angle = lanes % HALF
        first = lanes // HALF * (2 * HALF) + angle
        ka = tl.zeros((BLOCK,), tl.float32)
        kb = tl.zeros((BLOCK,), tl.float32)
        va = tl.zeros((BLOCK,), tl.float32)
        vb = tl.zeros((BLOCK,), tl.float32)
        for copy in range(start, end):
            source = tl.load(places + copy) * pairs * 2
            ka += tl.load(new_keys + source + first, mask=inside, other=0.0).to(tl.float32)
            kb += tl.load(new_keys + source + first + HALF, mask=inside, other=0.0).to(tl.float32)
            va += tl.load(new_values + source + first, mask=inside, other=0.0).to(tl.float32)
            vb += tl.load(new_values + source + first + HALF, mask=inside, other=0.0).to(tl.float32)
        c = tl.load(cos + row * HALF + angle)
        s = tl.load(sin + row * HALF + angle)
        tl.store(keys + target + first, (ka * c + kb * s).to(keys.dtype.element_ty), mask=inside)
        tl.store(keys + target + first + HALF, (kb * c - ka * s).to(keys.dtype.element_ty), mask=inside)
        tl.store(values + target + first, va.to(values.dtype.element_ty), mask=inside)
        tl.store(values + target + first + HALF, vb.to(values.dtype.element_ty), mask=inside)


def forward(
    key_THW: Tensor, value_THW: Tensor, cos_TF: Tensor, sin_TF: Tensor, rows_K: Tensor
) -> tuple[Tensor, Tensor]:
    """Contiguous inputs; see `prefix.rotate_and_duplicate`."""
    heads, width = key_THW.shape[1:]
    new_key, new_value = (x.new_empty(len(rows_K), heads, width) for x in (key_THW, value_THW))
    if len(rows_K):
        config = config_for("prefix", key_THW.device, heads * width // 2)
        duplicate_kernel[(len(rows_K),)](
            key_THW,
            value_THW,
            cos_TF,
            sin_TF,
            rows_K,
            new_key,
            new_value,
            heads * width // 2,
            HALF=width // 2,
            BLOCK=config.block,
            num_warps=config.warps,
        )
    return new_key, new_value


def backward(
    key_KHW: Tensor, value_KHW: Tensor, cos_TF: Tensor, sin_TF: Tensor, places_K: Tensor, starts_T1: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of the copies -> gradients [T, H, W] of the rows; a row without a copy gets 0."""
    heads, width = key_KHW.shape[1:]
    length = len(starts_T1) - 1
    key, value = (x.new_empty(length, heads, width) for x in (key_KHW, value_KHW))
    if length:
        config = config_for("prefix", key_KHW.device, heads * width // 2)
        add_copies_kernel[(length,)](
            key_KHW,
            value_KHW,
            cos_TF,
            sin_TF,
            places_K,
            starts_T1,
            key,
            value,
            heads * width // 2,
            HALF=width // 2,
            BLOCK=config.block,
            num_warps=config.warps,
        )
    return key, value
