"""Collectives of the head over the tensor-parallel group. A group of one rank, or none, moves nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megadpo_kernels.shard import VocabShard


def gather_hidden(hidden_TD: Tensor, shard: VocabShard) -> Tensor:
    """All rows of the stream: one all-gather where they are split over the group, nothing elsewhere."""
    if not shard.sequence_parallel or shard.ranks == 1:
        return hidden_TD
    whole = hidden_TD.new_empty(shard.ranks * len(hidden_TD), hidden_TD.shape[1])
    dist.all_gather_into_tensor(whole, hidden_TD.contiguous(), group=shard.group)
    return whole


def start_sum(partial_TD: Tensor, shard: VocabShard) -> Callable[[], Tensor]:
    """Begin to add up a gradient over the group; the returned function waits and gives it in the input's layout.

    One collective: a reduce-scatter where hidden is split, an all-reduce (in place) elsewhere. What is launched between
    start and wait overlaps with it.
    """
    if shard.ranks == 1:
        return lambda: partial_TD
    total = partial_TD
    if shard.sequence_parallel:
        total = partial_TD.new_empty(len(partial_TD) // shard.ranks, partial_TD.shape[1])
        work = dist.reduce_scatter_tensor(total, partial_TD, group=shard.group, async_op=True)
    else:
        work = dist.all_reduce(total, group=shard.group, async_op=True)

    def finish() -> Tensor:
        work.wait()
        return total

    return finish


def gather_ranks(values: Tensor, shard: VocabShard) -> Tensor:
    """[ranks, *shape]: every rank's values, in rank order."""
    if shard.ranks == 1 or values.numel() == 0:
        return values.expand(shard.ranks, *values.shape)
    # side by side in the first axis: gloo takes no new axis
    everyone = values.new_empty(shard.ranks * len(values), *values.shape[1:])
    dist.all_gather_into_tensor(everyone, values, group=shard.group)
    return everyone.unflatten(0, (shard.ranks, len(values)))


class GatherHidden(torch.autograd.Function):
    """`gather_hidden`, whose backward pass sums the gradient over the group (`start_sum`)."""

    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, shard: VocabShard) -> Tensor:
        ctx.shard = shard
        return gather_hidden(hidden_TD, shard)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return start_sum(grads[0].clone(memory_format=torch.contiguous_format), ctx.shard)(), None


class GatherColumns(torch.autograd.Function):
    """[N, V] of every rank side by side. All ranks go on alike, so a rank's gradient is its own columns'."""

    @staticmethod
    def forward(ctx: Any, part_NV: Tensor, shard: VocabShard) -> Tensor:
        everyone = gather_ranks(part_NV.contiguous(), shard)
        ctx.width, ctx.rank = part_NV.shape[1], 0 if shard.group is None else shard.group.rank()
        return everyone.transpose(0, 1).reshape(len(part_NV), len(everyone) * ctx.width)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        start = ctx.rank * ctx.width
        return grads[0][:, start : start + ctx.width], None
