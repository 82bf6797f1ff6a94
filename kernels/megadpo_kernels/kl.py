"""KL divergence of one linear head's distribution from another's, row by row, a few rows at a time.

KL(reference || policy) = sum over the vocabulary of p_ref (log p_ref - log p_policy), as TDPO needs it at every row
(Zeng et al. 2024, arXiv 2404.11999, equation 8). Gradient to the policy alone: p_policy - p_ref on its logits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megadpo_kernels import gemm, reference
from megadpo_kernels.backends import BACKENDS, Backend
from megadpo_kernels.chunked import Products, chunks, logits, no_column, scored_rows
from megadpo_kernels.collectives import gather_ranks
from megadpo_kernels.logprob import check, limits
from megadpo_kernels.rows import LOWEST, chain, transformed
from megadpo_kernels.shard import PLAIN, LogitOptions, VocabShard


def linear_kl(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    reference_hidden_NE: Tensor,
    reference_weight_VE: Tensor,
    shard: VocabShard,
    *,
    rows_N: Tensor | None = None,
    options: LogitOptions = PLAIN,
    backend: Backend = "auto",
    chunk: int | None = None,
) -> Tensor:
    """KL(reference || policy) of every scored row in nats, float32 [N], the same on every rank.

    Inputs as of `linear_logprob`, for two heads over the same vocabulary, split alike; their hidden sizes (D, E) and
    dtypes may differ. reference_hidden_NE: of the scored rows alone, in their order, whole on every rank (`scored_rows`
    gives them): it is kept from another model's pass, and a stream has other rows, too. The gradient goes to hidden and
    weight as in `linear_logprob`; the reference gets none. Logits of both heads exist for `chunk` rows at once and are
    computed again in the backward pass.

    Collectives: one all-gather of float32 [5, N], plus one of hidden under sequence parallelism; backward one
    all-reduce (reduce-scatter) of hidden's gradient in float32. Back ends: reference and chunked (auto). Raises
    ValueError for another one, and for shapes and dtypes that cannot work.
    """
    if backend not in BACKENDS or backend == "triton":
        raise ValueError(f"backend = {backend!r}: linear_kl has reference and chunked; choose chunked")
    whole = len(hidden_TD) * (shard.ranks if shard.sequence_parallel else 1)
    targets_N = torch.empty(whole if rows_N is None else len(rows_N), dtype=torch.int64, device="meta")
    check(hidden_TD, weight_VD, targets_N, shard, rows_N)
    whole_rows = replace(shard, sequence_parallel=False)
    check(reference_hidden_NE, reference_weight_VE, targets_N, whole_rows, None)
    if len(weight_VD) != len(reference_weight_VE):
        raise ValueError(f"weights have {len(weight_VD)} and {len(reference_weight_VE)} rows: need the same")
    chunk = limits(shard.columns(len(weight_VD)), hidden_TD.device)[0] if chunk is None else chunk
    if chunk < 1:
        raise ValueError(f"chunk = {chunk}: need at least 1 row")
    if backend == "reference":
        ours_NV = reference.distributions(hidden_TD, weight_VD, rows_N, shard, options)
        with torch.no_grad():
            theirs_NV = reference.distributions(reference_hidden_NE, reference_weight_VE, None, whole_rows, options)
        return (theirs_NV.exp() * (theirs_NV - ours_NV)).sum(-1).float()
    settings = _Settings(shard, options, chunk)
    return _ChunkedKL.apply(hidden_TD, weight_VD, reference_hidden_NE, reference_weight_VE, rows_N, settings)


@dataclass(frozen=True)
class _Settings:
    shard: VocabShard
    options: LogitOptions
    chunk: int


class _ChunkedKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        theirs_NE: Tensor,
        reference_weight_VE: Tensor,
        rows_N: Tensor | None,
        settings: _Settings,
    ) -> Tensor:
        shard = settings.shard
        columns = shard.columns(len(weight_VD))
        hidden_ND = scored_rows(hidden_TD, rows_N, shard)
        stats_5N = no_column([LOWEST, 0.0, LOWEST, 0.0, 0.0], hidden_ND)
        for rows in chunks(len(hidden_ND), settings.chunk) if columns else ():
            z_MV = _z(hidden_ND[rows], weight_VD[:columns], settings.options)
            r_MV = _z(theirs_NE[rows], reference_weight_VE[:columns], settings.options)
            stats_5N[:, rows] = _statistics(z_MV, r_MV)
        kl_N, normaliser_4N = _combine(gather_ranks(stats_5N, shard))
        ctx.save_for_backward(hidden_ND, weight_VD, theirs_NE, reference_weight_VE, rows_N, normaliser_4N)
        ctx.settings, ctx.input_rows = settings, len(hidden_TD)
        return kl_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        hidden_ND, weight_VD, theirs_NE, reference_weight_VE, rows_N, normaliser_4N = ctx.saved_tensors
        settings: _Settings = ctx.settings
        columns = settings.shard.columns(len(weight_VD))

        def slope(rows: slice) -> Tensor:
            z_MV = _z(hidden_ND[rows], weight_VD[:columns], settings.options)
            r_MV = _z(theirs_NE[rows], reference_weight_VE[:columns], settings.options)
            factor = chain(z_MV, settings.options)
            top_M1, log_total_M1, their_top_M1, their_log_total_M1 = normaliser_4N[:, rows, None]
            slope_MV = z_MV.sub_(top_M1).sub_(log_total_M1).exp_()
            slope_MV.sub_(r_MV.sub_(their_top_M1).sub_(their_log_total_M1).exp_())
            return slope_MV.mul_(grads[0][rows, None]).mul_(factor).to(gemm.slope_dtype(len(z_MV), hidden_ND.dtype))

        into = Products(hidden_ND, weight_VD, rows_N, settings.shard, settings.chunk, ctx.input_rows)
        return *into.gradients(slope, *ctx.needs_input_grad[:2]), None, None, None, None


def _z(hidden_MD: Tensor, weight_VD: Tensor, options: LogitOptions) -> Tensor:
    return transformed(logits(hidden_MD, weight_VD)[:, : len(weight_VD)], options)


def _statistics(z_MV: Tensor, r_MV: Tensor) -> Tensor:
    """This rank's part, [5, M]: policy's maximum and sum of exp(z - maximum), the reference's, and the reference's
    weighted sum of ((r - its maximum) - (z - its maximum)), in which nothing large is left."""
    top_M, their_top_M = z_MV.amax(-1), r_MV.amax(-1)
    z_MV = z_MV - top_M[:, None]
    r_MV = r_MV - their_top_M[:, None]
    weight_MV = r_MV.exp()
    moment_M = (weight_MV * r_MV.sub_(z_MV)).sum(-1)
    return torch.stack([top_M, z_MV.exp_().sum(-1), their_top_M, weight_MV.sum(-1), moment_M])


def _combine(stats_R5N: Tensor) -> tuple[Tensor, Tensor]:
    """All ranks' statistics in rank order -> (KL [N], maximum and log of the sum of both heads [4, N])."""
    top_N, their_top_N = stats_R5N[:, 0].amax(0), stats_R5N[:, 2].amax(0)
    total_N, their_total_N, moment_N = (torch.zeros_like(top_N) for _ in range(3))
    for part_5N in stats_R5N:
        below_N, their_below_N = part_5N[0] - top_N, part_5N[2] - their_top_N
        weight_N = their_below_N.exp()
        total_N += below_N.exp() * part_5N[1]
        their_total_N += weight_N * part_5N[3]
        moment_N += weight_N * (part_5N[4] + part_5N[3] * (their_below_N - below_N))
    log_total_N, their_log_total_N = total_N.log(), their_total_N.log()
    kl_N = moment_N / their_total_N + (log_total_N - their_log_total_N)
    return kl_N, torch.stack([top_N, log_total_N, their_top_N, their_log_total_N])
