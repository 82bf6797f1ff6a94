"""What `linear_logprob` means: plain torch in float64, rounded once at the end. Holds the logits of all rows and ranks:
for tests and small runs."""

from __future__ import annotations

import torch
from torch import Tensor

from megadpo_kernels.collectives import GatherColumns, GatherHidden
from megadpo_kernels.rows import Extra
from megadpo_kernels.shard import LogitOptions, VocabShard


def linear_logprob(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    rows_N: Tensor | None,
    shard: VocabShard,
    options: LogitOptions,
    extra: Extra,
) -> tuple[Tensor, Tensor | None]:
    """(log-probability, the extra or None), float32 [N] each, through torch's own derivatives."""
    logprob_NV = distributions(hidden_TD, weight_VD, rows_N, shard, options)
    # not a plain gather: a target outside the vocabulary has probability 0, as in the other back ends
    inside_N = (targets_N >= 0) & (targets_N < shard.valid)
    logprob_N = logprob_NV.gather(1, torch.where(inside_N, targets_N, 0)[:, None])[:, 0]
    logprob_N = logprob_N.masked_fill(~inside_N, -torch.inf).float()
    if extra == "entropy":
        return logprob_N, -(logprob_NV.exp() * logprob_NV).sum(-1).float()
    if extra == "collision":
        return logprob_N, (2 * logprob_NV).exp().sum(-1).detach().float()
    return logprob_N, None


def distributions(
    hidden_TD: Tensor, weight_VD: Tensor, rows_N: Tensor | None, shard: VocabShard, options: LogitOptions
) -> Tensor:
    """float64 [N, valid]: log-probability of every token after every scored row, the same on every rank."""
    hidden_ND = GatherHidden.apply(hidden_TD.double(), shard)
    if rows_N is not None:
        hidden_ND = hidden_ND.index_select(0, rows_N)
    z_NV = GatherColumns.apply(hidden_ND @ weight_VD.double().t(), shard) * options.multiplier
    if options.soft_cap is not None:
        z_NV = options.soft_cap * torch.tanh(z_NV / options.soft_cap)
    return (z_NV[:, : shard.valid] / options.temperature).log_softmax(-1)
