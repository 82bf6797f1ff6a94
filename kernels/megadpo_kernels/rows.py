"""The row operations of the chunked head in plain torch; `rows_triton` has the same three as kernels.

Logits come as float32 [M, P], of which the first `columns` columns are real. A rank's statistics of a row are, in this
order: maximum, sum of exp(z - maximum) over all columns but the target's, z of the target (-inf where the target is on
another rank), and where asked for one more: for the entropy the sum of exp(z - maximum) (z - maximum), for the
collision probability (sum of p^2) the sum of exp(z - maximum)^2, both over all columns.

The target is left out of the sum because 1 - p of a probability near 1 is a difference that float32 does not hold: at
p = 0.998 it keeps 5 digits, and the gradient with it. The sum over the others keeps all 7.
"""

from __future__ import annotations

from typing import Literal, Protocol

import torch
from torch import Tensor

from megadpo_kernels.shard import LogitOptions

Extra = Literal["entropy", "collision"] | None
"""What a call computes beside the log-probability. Entropy has a gradient, the collision probability has none."""

LOWEST = -1e38
"""Maximum of a rank without a real column. Finite, also after a change of base, so that its terms are 0 and not NaN."""


class RowOps(Protocol):
    """What a back end provides; `megadpo_kernels.rows` and `megadpo_kernels.rows_triton` are such."""

    def row_stats(
        self, stats_KM: Tensor, logits_MP: Tensor, columns: int, targets_M: Tensor, options: LogitOptions, extra: Extra
    ) -> None: ...

    def combine(self, stats_RKN: Tensor, extra: Extra) -> tuple[Tensor, Tensor, Tensor | None]: ...

    def slope(
        self,
        logits_MP: Tensor,
        columns: int,
        targets_M: Tensor,
        normaliser_3M: Tensor,
        upstream_KM: Tensor,
        entropy_M: Tensor | None,
        options: LogitOptions,
        dtype: torch.dtype,
    ) -> Tensor: ...


def row_stats(
    stats_KM: Tensor, logits_MP: Tensor, columns: int, targets_M: Tensor, options: LogitOptions, extra: Extra = None
) -> None:
    """Write the statistics of M rows, float32 [3 or 4, M]. targets_M: int64, columns here; others are elsewhere."""
    z_MV = transformed(logits_MP[:, :columns], options)
    local_M, here_M = _local(targets_M, columns)
    stats_KM[0] = z_MV.amax(-1)
    stats_KM[2] = z_MV.gather(1, local_M[:, None])[:, 0].masked_fill(~here_M, -torch.inf)
    shifted_MV = z_MV - stats_KM[0, :, None]
    if extra == "entropy":
        weight_MV = shifted_MV.exp()
        stats_KM[3] = shifted_MV.mul_(weight_MV).sum(-1)
    else:
        weight_MV = shifted_MV.exp_()
    if extra == "collision":
        stats_KM[3] = weight_MV.square().sum(-1)
    stats_KM[1] = _put(weight_MV, local_M, here_M, torch.zeros_like(stats_KM[1])).sum(-1)


def combine(stats_RKN: Tensor, extra: Extra = None) -> tuple[Tensor, Tensor, Tensor | None]:
    """All ranks' statistics in rank order -> (log-probability [N], normaliser [3, N], the extra [N] or None).

    The normaliser is maximum, log of the sum (apart: their sum would lose digits where logits are large), and the
    probability of everything but the target.
    """
    top_N = stats_RKN[:, 0].amax(0)
    target_N = stats_RKN[:, 2].amax(0) - top_N
    others_N = torch.zeros_like(top_N)
    moment_N = torch.zeros_like(top_N)
    for part_KN in stats_RKN:
        below_N = part_KN[0] - top_N
        weight_N = below_N.exp()
        others_N += weight_N * part_KN[1]
        if extra == "collision":
            moment_N += weight_N.square() * part_KN[3]
        elif extra == "entropy":
            # the part's sum of z - its maximum becomes one of z - top, for which its target counts too
            whole_N = part_KN[1] + (part_KN[2] - part_KN[0]).exp()
            moment_N += weight_N * (part_KN[3] + whole_N * below_N)
    total_N = others_N + target_N.exp()
    # where the target has the maximum, the sum is 1 and the others
    log_total_N = torch.where(target_N < 0, total_N.log(), others_N.log1p())
    extra_N = None
    if extra == "entropy":
        extra_N = log_total_N - moment_N / total_N
    elif extra == "collision":
        extra_N = moment_N / total_N.square()
    return target_N - log_total_N, torch.stack([top_N, log_total_N, others_N / total_N]), extra_N


def slope(
    logits_MP: Tensor,
    columns: int,
    targets_M: Tensor,
    normaliser_3M: Tensor,
    upstream_KM: Tensor,
    entropy_M: Tensor | None,
    options: LogitOptions,
    dtype: torch.dtype,
) -> Tensor:
    """Gradient of sum(upstream[0] * logprob + upstream[1] * entropy) to the logits, [M, columns] in `dtype`.

    Overwrites the logits. The target's 1 - p comes from the normaliser, with all its digits.
    """
    local_M, here_M = _local(targets_M, columns)
    logits_MV = logits_MP[:, :columns]
    z_MV = transformed(logits_MV, options)
    factor = chain(z_MV, options)
    logprob_MV = z_MV.sub_(normaliser_3M[0, :, None]).sub_(normaliser_3M[1, :, None])
    target_M = upstream_KM[0] * normaliser_3M[2]
    if entropy_M is None:
        slope_MV = logprob_MV.exp_().mul_(-upstream_KM[0, :, None])
    else:
        own_M = logprob_MV.gather(1, local_M[:, None])[:, 0]
        target_M = target_M - upstream_KM[1] * own_M.exp() * (own_M + entropy_M)
        factor_MV = (logprob_MV + entropy_M[:, None]).mul_(upstream_KM[1, :, None]).add_(upstream_KM[0, :, None])
        slope_MV = logprob_MV.exp_().mul_(factor_MV).neg_()
    _put(slope_MV, local_M, here_M, target_M)
    if isinstance(factor, Tensor) or factor != 1:
        slope_MV.mul_(factor)
    return slope_MV.to(dtype)


def chain(z_MV: Tensor, options: LogitOptions) -> Tensor | float:
    """Derivative of z by the logit: a number, or a new [M, V] under a soft cap."""
    factor = options.multiplier / options.temperature
    if options.soft_cap is None:
        return factor
    return (1 - (z_MV * (options.temperature / options.soft_cap)).square_()).mul_(factor)


def transformed(logits_MV: Tensor, options: LogitOptions) -> Tensor:
    """The logits themselves where there is nothing to do, else a new tensor."""
    z_MV = logits_MV
    if options.multiplier != 1:
        z_MV = z_MV * options.multiplier
    if options.soft_cap is not None:
        z_MV = torch.tanh(z_MV / options.soft_cap) * options.soft_cap
    return z_MV if options.temperature == 1 else z_MV / options.temperature


def _put(values_MV: Tensor, local_M: Tensor, here_M: Tensor, new_M: Tensor) -> Tensor:
    """The same tensor with `new` in the targets' columns, of those rows whose target is here."""
    old_M = values_MV.gather(1, local_M[:, None])[:, 0]
    return values_MV.scatter_(1, local_M[:, None], torch.where(here_M, new_M, old_M)[:, None])


def _local(targets_M: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """(each target's column, 0 where it is elsewhere; whether it is here). No host synchronisation."""
    here_M = (targets_M >= 0) & (targets_M < columns)
    return torch.where(here_M, targets_M, 0), here_M
