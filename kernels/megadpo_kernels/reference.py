"""What `linear_logprob` means: plain torch in float64, rounded once at the end. Holds the logits of all rows and ranks:
for tests and small runs."""

from __future__ import annotations

import torch
from torch import Tensor

from megadpo_kernels.collectives import GatherColumns, GatherHidden
from megadpo_kernels.shard import LogitOptions, VocabShard


def linear_logprob(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    rows_N: Tensor | None,
    shard: VocabShard,
    options: LogitOptions,
) -> tuple[Tensor, Tensor]:
    """(log-probability, entropy), float32 [N] each, through torch's own derivatives."""
    hidden_ND = GatherHidden.apply(hidden_TD.double(), shard)
    if rows_N is not None:
        hidden_ND = hidden_ND.index_select(0, rows_N)
    z_NV = GatherColumns.apply(hidden_ND @ weight_VD.double().t(), shard) * options.multiplier
    if options.soft_cap is not None:
        z_NV = options.soft_cap * torch.tanh(z_NV / options.soft_cap)
    logprob_NV = (z_NV[:, : shard.valid] / options.temperature).log_softmax(-1)
    # not a plain gather: a target outside the vocabulary has probability 0, as in the other back ends
    inside_N = (targets_N >= 0) & (targets_N < shard.valid)
    logprob_N = logprob_NV.gather(1, torch.where(inside_N, targets_N, 0)[:, None])[:, 0]
    entropy_N = -(logprob_NV.exp() * logprob_NV).sum(-1)
    return logprob_N.masked_fill(~inside_N, -torch.inf).float(), entropy_N.float()
