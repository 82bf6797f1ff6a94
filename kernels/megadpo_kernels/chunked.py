"""`linear_logprob` a few rows at a time: matrix products by the library, row operations by torch or Triton.

Forward: logits of a chunk, their statistics, the next chunk; then one collective for the statistics of all rows.
Backward: logits again (kept where the budget allows, else computed again: the same bits), their gradient in place, two
products. The sum of the input gradient over ranks runs while the last chunk's weight gradient is computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megadpo_kernels import gemm
from megadpo_kernels.collectives import gather_hidden, gather_ranks, start_sum
from megadpo_kernels.main_grad import WeightGradient
from megadpo_kernels.rows import LOWEST, RowOps
from megadpo_kernels.shard import LogitOptions, VocabShard

ALIGNMENT = 16
"""Columns are padded in memory to a multiple of this, so that every row starts at a 64-byte boundary."""


@dataclass(frozen=True)
class Call:
    """Everything about one call that is not a tensor."""

    shard: VocabShard
    options: LogitOptions
    ops: RowOps
    chunk: int
    """Rows whose logits exist at the same time."""
    cache_bytes: int
    """Logits kept for the backward pass; 0 where there will be none."""
    entropy: bool


class ChunkedLogprob(torch.autograd.Function):
    """(hidden_TD, weight_VD, targets_N, rows_N or None, Call) -> (logprob_N, entropy_N or None)."""

    @staticmethod
    def forward(
        ctx: Any, hidden_TD: Tensor, weight_VD: Tensor, targets_N: Tensor, rows_N: Tensor | None, call: Call
    ) -> tuple[Tensor, Tensor | None]:
        hidden_ND = gather_hidden(hidden_TD, call.shard)
        if rows_N is not None:
            hidden_ND = hidden_ND.index_select(0, rows_N)
        local_N = targets_N - call.shard.start
        columns = call.shard.columns(len(weight_VD))
        stats_KN = _no_column(4 if call.entropy else 3, hidden_ND)
        ctx.kept = []
        spare = call.cache_bytes
        for rows in _chunks(len(hidden_ND), call.chunk) if columns else ():
            logits_MP = _logits(hidden_ND[rows], weight_VD[:columns])
            part = stats_KN[:, rows]
            call.ops.row_stats(part, logits_MP, columns, local_N[rows], call.options)
            spare -= logits_MP.nbytes
            if spare >= 0:
                ctx.kept.append(logits_MP)
            del logits_MP
        logprob_N, normaliser_3N, entropy_N = call.ops.combine(gather_ranks(stats_KN, call.shard))
        ctx.save_for_backward(hidden_ND, weight_VD, local_N, rows_N, normaliser_3N, entropy_N)
        ctx.call, ctx.input_rows = call, len(hidden_TD)
        return logprob_N, entropy_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        hidden_ND, weight_VD, local_N, rows_N, normaliser_3N, entropy_N = ctx.saved_tensors
        call: Call = ctx.call
        columns = call.shard.columns(len(weight_VD))
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        upstream_KN = torch.stack([g for g in grads if g is not None])
        split = call.shard.ranks if call.shard.sequence_parallel else 1
        # zeros: rows that predict nothing get no gradient; nor does any where this rank has no real column
        grad_TD = hidden_ND.new_zeros(ctx.input_rows * split, hidden_ND.shape[1])
        weight_gradient = WeightGradient.of(weight_VD) if needs_weight else None
        # taken away: the gradient overwrites the logits, and a second backward pass has to compute them again
        kept, ctx.kept = ctx.kept, []
        kept.reverse()
        finish = None
        chunks = list(_chunks(len(hidden_ND), call.chunk)) if columns else []
        for rows in chunks:
            logits_MP = kept.pop() if kept else _logits(hidden_ND[rows], weight_VD[:columns])
            slope_MV = call.ops.slope(
                logits_MP,
                columns,
                local_N[rows],
                normaliser_3N[:, rows],
                upstream_KN[:, rows],
                None if entropy_N is None else entropy_N[rows],
                call.options,
                hidden_ND.dtype,
            )
            del logits_MP
            if needs_hidden:
                part_MD = gemm.hidden_gradient(slope_MV, weight_VD[:columns])
                _add_rows(grad_TD, rows if rows_N is None else rows_N[rows], part_MD)
                if rows is chunks[-1]:
                    finish = start_sum(grad_TD, call.shard)
            if weight_gradient is not None:
                gemm.add_weight_gradient(weight_gradient.total_VD[:columns], slope_MV, hidden_ND[rows])
        grad_weight = None if weight_gradient is None else weight_gradient.result()
        if not needs_hidden:
            return None, grad_weight, None, None, None
        if finish is None:
            # no chunk here: there are no rows at all, or other ranks have the real columns and wait for this one
            finish = start_sum(grad_TD, call.shard)
        return finish(), grad_weight, None, None, None


def _chunks(rows: int, size: int) -> Iterator[slice]:
    return (slice(at, min(at + size, rows)) for at in range(0, rows, size))


def _no_column(kinds: int, hidden_ND: Tensor) -> Tensor:
    """float32 [kinds, N]: the statistics of a rank without a single real column."""
    values = torch.tensor([LOWEST, 0.0, -torch.inf, 0.0][:kinds])[:, None]
    return values.to(hidden_ND.device, non_blocking=True).repeat(1, len(hidden_ND))


def _logits(hidden_MD: Tensor, weight_VD: Tensor) -> Tensor:
    """float32 [M, P]: logits, then memory that nobody reads."""
    columns = len(weight_VD)
    padded = -(-columns // ALIGNMENT) * ALIGNMENT
    logits_MP = torch.empty(len(hidden_MD), padded, dtype=torch.float32, device=hidden_MD.device)
    gemm.logits_into(logits_MP[:, :columns], hidden_MD, weight_VD)
    return logits_MP


def _add_rows(total_TD: Tensor, rows: slice | Tensor, part_MD: Tensor) -> None:
    """total[rows] += part. The same row may be named more than once; always the same order of additions."""
    if isinstance(rows, slice):
        total_TD[rows] = part_MD
    elif total_TD.is_cuda:
        # sorts the rows; index_add_ would use atomics
        total_TD.index_put_((rows,), part_MD, accumulate=True)
    else:
        total_TD.index_add_(0, rows, part_MD)
