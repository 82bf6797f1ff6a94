"""Log-probability of given tokens under a linear head whose vocabulary is split over tensor-parallel ranks.

Axes: N scored tokens, D hidden, V rows of the head on this rank. Statistics and results are float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class VocabShard:
    """This rank's rows of the head: global rows [start, start + V), of which those below `valid` are real tokens.

    Rows at and over `valid` pad the vocabulary; they have probability 0 and get no gradient.
    """

    start: int
    valid: int
    group: dist.ProcessGroup | None
    """Tensor-parallel group; None where the head is not split."""


def linear_logprob(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, shard: VocabShard, chunk: int = 1024
) -> Tensor:
    """log softmax(hidden @ weight^T)[target] of every row, without holding the logits of more than `chunk` rows.

    hidden_ND: float, the same on every rank of the group. weight_VD: same dtype. targets_N: int64, global ids.
    Returns float32 [N], the same on every rank, with gradients to hidden and weight. The gradient to hidden is this
    rank's part: the caller sums it over the group (Megatron's copy_to / gather_from regions do). Collectives: two in
    the forward pass (maximum; sum and target logit), whatever N is, none in the backward pass. N may be 0.
    """
    return _LinearLogprob.apply(hidden_ND, weight_VD, targets_N, shard, chunk)


def _logits(hidden: Tensor, weight: Tensor, n_valid: int) -> Tensor:
    """float32 [rows, V] with padded columns at minus infinity."""
    logits = (hidden @ weight.t()).float()
    if n_valid < weight.shape[0]:
        logits[:, n_valid:] = -torch.inf
    return logits


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, shard: VocabShard, chunk: int) -> Tensor:
        n_valid = min(max(shard.valid - shard.start, 0), weight.shape[0])
        top, total, target = (torch.zeros(len(hidden), dtype=torch.float32, device=hidden.device) for _ in range(3))
        local, mine = _local_targets(targets, shard.start, n_valid)
        for rows in _chunks(len(hidden), chunk):
            logits = _logits(hidden[rows], weight, n_valid)
            top[rows] = logits.max(-1).values
            # A rank without a single valid column has a maximum of -inf; its terms must be 0, not NaN.
            shift = top[rows].clamp(min=torch.finfo(torch.float32).min)
            total[rows] = (logits - shift[:, None]).exp().sum(-1)
            target[rows] = logits.gather(1, local[rows, None])[:, 0]
        # torch.where, not a product: an invalid column's -inf times 0 would be NaN
        target = torch.where(mine, target, torch.zeros_like(target))
        if shard.group is not None and shard.group.size() > 1:
            local_top = top.clamp(min=torch.finfo(torch.float32).min)
            dist.all_reduce(top, op=dist.ReduceOp.MAX, group=shard.group)
            both = torch.stack([total * (local_top - top).exp(), target])
            dist.all_reduce(both, group=shard.group)
            total, target = both
        normaliser = top + total.log()
        ctx.save_for_backward(hidden, weight, targets, normaliser)
        ctx.shard, ctx.chunk = shard, chunk
        return target - normaliser

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        hidden, weight, targets, normaliser = ctx.saved_tensors
        n_valid = min(max(ctx.shard.valid - ctx.shard.start, 0), weight.shape[0])
        local, mine = _local_targets(targets, ctx.shard.start, n_valid)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        for rows in _chunks(len(hidden), ctx.chunk):
            # d logprob / d logits = onehot(target) - softmax, subtracted in float32 before any rounding
            slope = -(_logits(hidden[rows], weight, n_valid) - normaliser[rows, None]).exp()
            slope.scatter_add_(1, local[rows, None], mine[rows, None].float())
            slope = (slope * grads[0][rows, None]).to(hidden.dtype)
            grad_hidden[rows] = slope @ weight
            grad_weight += (slope.t() @ hidden[rows]).float()
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None


def _local_targets(targets: Tensor, start: int, n_valid: int) -> tuple[Tensor, Tensor]:
    """This rank's column of each target (0 where it is elsewhere) and whether it is here. No host synchronisation."""
    local = targets - start
    mine = (local >= 0) & (local < n_valid)
    return torch.where(mine, local, torch.zeros_like(local)), mine


def _chunks(n: int, size: int) -> list[slice]:
    return [slice(i, min(i + size, n)) for i in range(0, n, size)]
