"""The row operations of the chunked head in plain torch; `rows_triton` has the same three as kernels.

Logits come as float32 [M, P], of which the first `columns` columns are real. A rank's statistics of a row are, in this
order: maximum, sum of exp(z - maximum), z of the target (-inf where the target is on another rank), and for the entropy
the sum of exp(z - maximum) (z - maximum).
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from megadpo_kernels.shard import LogitOptions

LOWEST = -1e38
"""Maximum of a rank without a real column. Finite, also after a change of base, so that its terms are 0 and not NaN."""


class RowOps(Protocol):
    """What a back end provides; `megadpo_kernels.rows` and `megadpo_kernels.rows_triton` are such."""

    def row_stats(
        self, stats_KM: Tensor, logits_MP: Tensor, columns: int, targets_M: Tensor, options: LogitOptions
    ) -> None: ...

    def combine(self, stats_RKN: Tensor) -> tuple[Tensor, Tensor, Tensor | None]: ...

    def slope(
        self,
        logits_MP: Tensor,
        columns: int,
        targets_M: Tensor,
        normaliser_2M: Tensor,
        upstream_KM: Tensor,
        entropy_M: Tensor | None,
        options: LogitOptions,
        dtype: torch.dtype,
    ) -> Tensor: ...


def row_stats(stats_KM: Tensor, logits_MP: Tensor, columns: int, targets_M: Tensor, options: LogitOptions) -> None:
    """Write the statistics of M rows, float32 [3 or 4, M]. targets_M: int64, columns here; others are elsewhere."""
    z_MV = _transformed(logits_MP[:, :columns], options)
    local_M, here_M = _local(targets_M, columns)
    stats_KM[0] = z_MV.amax(-1)
    stats_KM[2] = z_MV.gather(1, local_M[:, None])[:, 0].masked_fill(~here_M, -torch.inf)
    shifted_MV = z_MV - stats_KM[0, :, None]
    if len(stats_KM) == 4:
        weight_MV = shifted_MV.exp()
        stats_KM[3] = shifted_MV.mul_(weight_MV).sum(-1)
        stats_KM[1] = weight_MV.sum(-1)
    else:
        stats_KM[1] = shifted_MV.exp_().sum(-1)


def combine(stats_RKN: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """All ranks' statistics in rank order -> (log-probability [N], normaliser [2, N], entropy [N] or None).

    The normaliser is kept as maximum and log of the sum: their sum would lose digits where logits are large.
    """
    top_N = stats_RKN[:, 0].amax(0)
    total_N = torch.zeros_like(top_N)
    moment_N = torch.zeros_like(top_N)
    for part_KN in stats_RKN:
        below_N = part_KN[0] - top_N
        total_N += below_N.exp() * part_KN[1]
        if len(part_KN) == 4:
            moment_N += below_N.exp() * (part_KN[3] + part_KN[1] * below_N)
    log_total_N = total_N.log()
    logprob_N = (stats_RKN[:, 2].amax(0) - top_N) - log_total_N
    entropy_N = log_total_N - moment_N / total_N if stats_RKN.shape[1] == 4 else None
    return logprob_N, torch.stack([top_N, log_total_N]), entropy_N


def slope(
    logits_MP: Tensor,
    columns: int,
    targets_M: Tensor,
    normaliser_2M: Tensor,
    upstream_KM: Tensor,
    entropy_M: Tensor | None,
    options: LogitOptions,
    dtype: torch.dtype,
) -> Tensor:
    """Gradient of sum(upstream[0] * logprob + upstream[1] * entropy) to the logits, [M, columns] in `dtype`.

    Overwrites the logits. The target's 1 - p is subtracted in float32, before any rounding.
    """
    local_M, here_M = _local(targets_M, columns)
    logits_MV = logits_MP[:, :columns]
    z_MV = _transformed(logits_MV, options)
    inner_MV = None
    if options.soft_cap is not None:
        inner_MV = 1 - (z_MV * (options.temperature / options.soft_cap)).square_()  # derivative of tanh
    logprob_MV = z_MV.sub_(normaliser_2M[0, :, None]).sub_(normaliser_2M[1, :, None])
    if entropy_M is None:
        slope_MV = logprob_MV.exp_().mul_(-upstream_KM[0, :, None])
    else:
        factor_MV = (logprob_MV + entropy_M[:, None]).mul_(upstream_KM[1, :, None]).add_(upstream_KM[0, :, None])
        slope_MV = logprob_MV.exp_().mul_(factor_MV).neg_()
    slope_MV.scatter_add_(1, local_M[:, None], (upstream_KM[0] * here_M)[:, None])
    if inner_MV is not None:
        slope_MV.mul_(inner_MV)
    chain = options.multiplier / options.temperature
    if chain != 1:
        slope_MV.mul_(chain)
    return slope_MV.to(dtype)


def _transformed(logits_MV: Tensor, options: LogitOptions) -> Tensor:
    """The logits themselves where there is nothing to do, else a new tensor."""
    z_MV = logits_MV
    if options.multiplier != 1:
        z_MV = z_MV * options.multiplier
    if options.soft_cap is not None:
        z_MV = torch.tanh(z_MV / options.soft_cap) * options.soft_cap
    return z_MV if options.temperature == 1 else z_MV / options.temperature


def _local(targets_M: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """(each target's column, 0 where it is elsewhere; whether it is here). No host synchronisation."""
    here_M = (targets_M >= 0) & (targets_M < columns)
    return torch.where(here_M, targets_M, 0), here_M
