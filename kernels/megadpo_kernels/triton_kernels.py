"""Triton kernels of the head; `rows_triton` launches them, `rows` says what they mean.

Import this only where Triton can run (`backends.triton_problem`). Every kernel has one program per row, block of rows
or segment, so results do not depend on how programs are scheduled. No kernel uses atomics. Rows of logits start at
64-byte boundaries and have a length in memory that is a multiple of 16 (`stride`): they are read and written 16 bytes
at a time.
"""

# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: PLR0913

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-1e38)


@triton.jit
def _transformed(logit, multiplier, soft_cap, coolness, CAPPED: tl.constexpr):
    """(z, tanh): z = soft_cap * tanh(multiplier * logit / soft_cap) * coolness, or without the cap."""
    z = logit.to(tl.float32) * multiplier
    inner = z
    if CAPPED:
        x = z / soft_cap
        small = tl.exp2(tl.abs(x) * (-2 * LOG2E))
        inner = (1 - small) / (1 + small)
        inner = tl.where(x < 0, -inner, inner)
        # below 0.2 the difference 1 - small loses digits: the first five terms of the series instead, off by 2e-10 of x
        y = x * x
        series = 1 + y * (-1 / 3 + y * (2 / 15 + y * (-17 / 315 + y * (62 / 2835))))
        inner = tl.where(y < 0.04, x * series, inner)
        z = inner * soft_cap
    return z * coolness, inner


@triton.jit
def _log1p(x):
    """log(1 + x) for x >= 0 to the last digits of a small x: what rounding 1 + x takes away is made good."""
    u = 1 + x
    return tl.where(u == 1, x, tl.log(u) * (x / (u - 1)))


@triton.jit
def _fold(top, others, moment, whole, z, is_target, EXTRA: tl.constexpr):
    """One more block of a row: z of its columns, those beyond the row at LOWEST, where they weigh nothing.

    others: sum of exp(z - top) without the target. EXTRA: 1 keeps the entropy's moment, and for it the sum with the
    target (whole); 2 keeps the sum of squares in `moment`.
    """
    new_top = tl.maximum(top, tl.max(z, 0))
    step = top - new_top
    shrink = tl.exp2(step * LOG2E)
    below = z - new_top
    weight = tl.exp2(below * LOG2E)
    if EXTRA == 1:
        moment = shrink * (moment + whole * step) + tl.sum(weight * below, 0)
        whole = whole * shrink + tl.sum(weight, 0)
    if EXTRA == 2:
        moment = moment * (shrink * shrink) + tl.sum(weight * weight, 0)
    others = others * shrink + tl.sum(tl.where(is_target, 0.0, weight), 0)
    return new_top, others, moment, whole


@triton.jit(do_not_specialize=["stats_stride", "columns"])
def row_stats_kernel(
    logits,
    stride,
    targets,
    stats,
    stats_stride,
    columns,
    multiplier,
    soft_cap,
    coolness,
    BLOCK: tl.constexpr,
    CAPPED: tl.constexpr,
    EXTRA: tl.constexpr,
):
    """One program per row: maximum, sum of the others' exponentials, target's z, the extra, in one pass."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    lanes = tl.arange(0, BLOCK)
    target = tl.load(targets + row)
    top = tl.full((), LOWEST, tl.float32)
    others = tl.full((), 0.0, tl.float32)
    moment = tl.full((), 0.0, tl.float32)
    whole = tl.full((), 0.0, tl.float32)
    for at in range(0, columns, BLOCK):
        # the row's memory goes on to `stride`, a multiple of 16: the mask allows 16-byte loads
        logit = tl.load(logits + at + lanes, mask=at + lanes < stride, other=0.0)
        z, _ = _transformed(logit, multiplier, soft_cap, coolness, CAPPED)
        z = tl.where(at + lanes < columns, z, LOWEST)
        top, others, moment, whole = _fold(top, others, moment, whole, z, at + lanes == target, EXTRA)
    here = (target >= 0) & (target < columns)
    z, _ = _transformed(tl.load(logits + target, mask=here, other=0.0), multiplier, soft_cap, coolness, CAPPED)
    tl.store(stats + row, top)
    tl.store(stats + stats_stride + row, others)
    tl.store(stats + 2 * stats_stride + row, tl.where(here, z, -float("inf")))
    if EXTRA:
        tl.store(stats + 3 * stats_stride + row, moment)


@triton.jit(do_not_specialize=["ranks", "rows"])
def combine_kernel(stats, logprobs, normaliser, extras, ranks, rows, BLOCK: tl.constexpr, EXTRA: tl.constexpr):
    """One program per block of rows: merge the ranks' statistics [ranks, 3 or 4, rows] in rank order."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = at < rows
    KINDS: tl.constexpr = 4 if EXTRA else 3
    top = tl.full((BLOCK,), LOWEST, tl.float32)
    target = tl.full((BLOCK,), -float("inf"), tl.float32)
    for rank in range(ranks):
        part = stats + rank * KINDS * rows + at
        top = tl.maximum(top, tl.load(part, mask=valid, other=0.0))
        target = tl.maximum(target, tl.load(part + 2 * rows, mask=valid, other=0.0))
    target -= top
    others = tl.zeros((BLOCK,), tl.float32)
    moment = tl.zeros((BLOCK,), tl.float32)
    for rank in range(ranks):
        part = stats + rank * KINDS * rows + at
        their_top = tl.load(part, mask=valid, other=0.0)
        below = their_top - top
        weight = tl.exp2(below * LOG2E)
        theirs = tl.load(part + rows, mask=valid, other=1.0)
        others += weight * theirs
        if EXTRA == 1:
            # the part's sum of z - its maximum becomes one of z - top, for which its target counts too
            whole = theirs + tl.exp2((tl.load(part + 2 * rows, mask=valid, other=0.0) - their_top) * LOG2E)
            moment += weight * (tl.load(part + 3 * rows, mask=valid, other=0.0) + whole * below)
        if EXTRA == 2:
            moment += weight * weight * tl.load(part + 3 * rows, mask=valid, other=0.0)
    total = others + tl.exp2(target * LOG2E)
    # where the target has the maximum, the sum is 1 and the others
    log_total = tl.where(target < 0, tl.log(total), _log1p(others))
    tl.store(logprobs + at, target - log_total, mask=valid)
    tl.store(normaliser + at, top, mask=valid)
    tl.store(normaliser + rows + at, log_total, mask=valid)
    tl.store(normaliser + 2 * rows + at, others / total, mask=valid)
    if EXTRA == 1:
        tl.store(extras + at, log_total - moment / total, mask=valid)
    if EXTRA == 2:
        tl.store(extras + at, moment / (total * total), mask=valid)


@triton.jit(do_not_specialize=["normaliser_stride", "upstream_stride", "columns"])
def slope_kernel(
    logits,
    stride,
    slopes,
    slope_stride,
    targets,
    normaliser,
    normaliser_stride,
    upstreams,
    upstream_stride,
    entropies,
    columns,
    multiplier,
    soft_cap,
    coolness,
    BLOCK: tl.constexpr,
    CAPPED: tl.constexpr,
    ENTROPY: tl.constexpr,
):
    """One program per row: gradient of the logits, written over them.

    Slopes may be half as wide as logits and start at the same address: a block is written where blocks up to itself
    were read, so only the block at hand needs the barrier between its loads and its stores.
    """
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    slopes += row * slope_stride
    lanes = tl.arange(0, BLOCK)
    target = tl.load(targets + row)
    top = tl.load(normaliser + row)
    log_total = tl.load(normaliser + normaliser_stride + row)
    missing = tl.load(normaliser + 2 * normaliser_stride + row)
    upstream = tl.load(upstreams + row)
    entropy_upstream = 0.0
    entropy = 0.0
    if ENTROPY:
        entropy_upstream = tl.load(upstreams + upstream_stride + row)
        entropy = tl.load(entropies + row)
    for at in range(0, columns, BLOCK):
        inside = at + lanes < stride
        logit = tl.load(logits + at + lanes, mask=inside, other=0.0)
        z, inner = _transformed(logit, multiplier, soft_cap, coolness, CAPPED)
        logprob = (tl.where(at + lanes < columns, z, LOWEST) - top) - log_total
        probability = tl.exp2(logprob * LOG2E)
        # the target's 1 - p keeps its digits: subtracted here, near probability 1, it would lose them
        slope = upstream * tl.where(at + lanes == target, missing, -probability)
        if ENTROPY:
            slope -= entropy_upstream * probability * (logprob + entropy)
        if CAPPED:
            slope *= 1 - inner * inner
        slope *= multiplier * coolness
        tl.debug_barrier()
        tl.store(slopes + at + lanes, slope.to(slopes.dtype.element_ty), mask=inside)


@triton.jit
def segment_sums_kernel(values, ends, sums, BLOCK: tl.constexpr):
    """One program per segment: float64 sum of values[ends[i - 1]:ends[i]]."""
    segment = tl.program_id(0)
    end = tl.load(ends + segment)
    start = tl.load(ends + segment - 1, mask=segment > 0, other=0)
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float64)
    for at in range(start, end, BLOCK):
        total += tl.load(values + at + lanes, mask=at + lanes < end, other=0.0).to(tl.float64)
    tl.store(sums + segment, tl.sum(total, 0))
