"""Bytes of weights, gradients and optimizer state from the sizes of parameters: Megatron-Core's layout, as arithmetic.

For the light path of the planner, which cannot build every rank of every grid. tests/plan/test_profile.py holds it to
what `counts.held` finds in built ranks. Laid out in param_and_grad_buffer.py and distrib_optimizer.py of Megatron-Core.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

GRADIENT, MASTER, MOMENTS = 4, 4, 8
"""Bytes per parameter, in float32."""


@dataclass(frozen=True)
class Weight:
    """One parameter of a rank."""

    size: int
    """Numbers in it."""
    expert: bool
    """Whether its replicas are those of an expert."""
    shared: bool
    """Whether another stage has the same one (tied embeddings)."""
    summed: bool
    """Whether tensor-parallel ranks add up its gradient (norms, under sequence parallelism)."""
    fp8: bool = False
    """Whether it is kept in FP8 (fp8_param_gather)."""


@dataclass(frozen=True)
class Sharding:
    """How one kind of weights is kept by its replicas."""

    replicas: int
    rank: int
    """This one's number among them."""
    distributed: bool
    """Whether each keeps the optimizer state of a part only."""
    bucket: int | None
    """Parameters per bucket; None: one bucket."""
    width: int
    """Bytes of a weight."""


@dataclass(frozen=True)
class Bytes:
    """Of the weights of one kind in one model chunk."""

    weights: int
    gradients: int
    optimizer: int
    buckets: int
    gathered: int
    """Of what replicas send each other of the weights."""


def bytes_of(weights: Sequence[Weight], sharding: Sharding) -> Bytes:
    """weights: in the module's order."""
    own_masters = sharding.width < MASTER
    each = MOMENTS + (MASTER if own_masters else 0)
    if not sharding.distributed:
        size = sum(weight.size for weight in weights)
        count = len(_laid_out(weights, sharding)[1])
        return Bytes(size * sharding.width, size * GRADIENT, size * each, count, 0)
    places, buckets = _laid_out(weights, sharding)
    length = buckets[-1][1] if buckets else 0
    own = 0
    for start, end in buckets:
        part = (end - start) // sharding.replicas
        first = start + part * sharding.rank
        own += sum(max(min(b, first + part) - max(a, first), 0) for a, b in places)
    return Bytes(length * sharding.width, length * GRADIENT, own * each, len(buckets), gathered=length * sharding.width)


def _laid_out(weights: Sequence[Weight], sharding: Sharding) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """([start, end) of every weight, of every bucket), in numbers from the buffer's start: from the last weight to the
    first, padded where replicas keep parts."""
    padding = math.lcm(sharding.replicas, 128) if sharding.distributed else 1
    step = 64 if sharding.distributed else 1
    places: list[tuple[int, int]] = []
    buckets: list[tuple[int, int]] = []
    begun = at = 0
    empty = True

    def close(end: int) -> int:
        nonlocal begun, empty
        buckets.append((begun, _up(end, padding)))
        begun, empty = buckets[-1][1], True
        return begun

    for weight in reversed(weights):
        start = _up(at, step)
        alone = weight.shared and sharding.distributed
        if alone and not empty:
            start = close(start)
        places.append((start, start + weight.size))
        at, empty = start + weight.size, False
        if alone or (sharding.bucket is not None and at - begun >= sharding.bucket):
            at = close(at)
    if not empty:
        close(at)
    return places, buckets


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
