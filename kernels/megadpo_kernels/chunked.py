"""`linear_logprob` a few rows at a time: matrix products by the library, row operations by torch or Triton.

Forward: logits of a chunk, their statistics, the next chunk; then one collective for the statistics of all rows.
Backward: logits again (kept where the budget allows, else computed again: the same bits), their gradient in place, two
products. The input gradient is float32 until it is summed over the ranks, which runs while the last chunk's weight
gradient is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megadpo_kernels import gemm
from megadpo_kernels.collectives import gather_hidden, gather_ranks, start_sum
from megadpo_kernels.main_grad import WeightGradient
from megadpo_kernels.rows import LOWEST, Extra, RowOps
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
    extra: Extra


class ChunkedLogprob(torch.autograd.Function):
    """(hidden_TD, weight_VD, targets_N, rows_N or None, Call) -> (logprob_N, entropy_N, collision_N or None)."""

    @staticmethod
    def forward(
        ctx: Any, hidden_TD: Tensor, weight_VD: Tensor, targets_N: Tensor, rows_N: Tensor | None, call: Call
    ) -> tuple[Tensor, Tensor | None]:
        hidden_ND = scored_rows(hidden_TD, rows_N, call.shard)
        local_N = targets_N - call.shard.start
        columns = call.shard.columns(len(weight_VD))
        stats_KN = no_column([LOWEST, 0.0, -torch.inf, 0.0][: 4 if call.extra else 3], hidden_ND)
        ctx.kept = []
        spare = call.cache_bytes
        for rows in chunks(len(hidden_ND), call.chunk) if columns else ():
            logits_MP = logits(hidden_ND[rows], weight_VD[:columns])
            part = stats_KN[:, rows]
            call.ops.row_stats(part, logits_MP, columns, local_N[rows], call.options, call.extra)
            spare -= logits_MP.nbytes
            if spare >= 0:
                ctx.kept.append(logits_MP)
            del logits_MP
        logprob_N, normaliser_3N, extra_N = call.ops.combine(gather_ranks(stats_KN, call.shard), call.extra)
        entropy_N = None
        if call.extra == "entropy":
            entropy_N = extra_N
        elif extra_N is not None:
            ctx.mark_non_differentiable(extra_N)
        ctx.save_for_backward(hidden_ND, weight_VD, local_N, rows_N, normaliser_3N, entropy_N)
        ctx.call, ctx.input_rows = call, len(hidden_TD)
        return logprob_N, extra_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        hidden_ND, weight_VD, local_N, rows_N, normaliser_3N, entropy_N = ctx.saved_tensors
        call: Call = ctx.call
        columns = call.shard.columns(len(weight_VD))
        upstream_KN = torch.stack([g for g in grads[: 1 if entropy_N is None else 2] if g is not None])
        # taken away: the gradient overwrites the logits, and a second backward pass has to compute them again
        kept, ctx.kept = ctx.kept, []
        kept.reverse()

        def slope(rows: slice) -> Tensor:
            return call.ops.slope(
                kept.pop() if kept else logits(hidden_ND[rows], weight_VD[:columns]),
                columns,
                local_N[rows],
                normaliser_3N[:, rows],
                upstream_KN[:, rows],
                None if entropy_N is None else entropy_N[rows],
                call.options,
                gemm.slope_dtype(len(hidden_ND[rows]), hidden_ND.dtype),
            )

        into = Products(hidden_ND, weight_VD, rows_N, call.shard, call.chunk, ctx.input_rows)
        return *into.gradients(slope, *ctx.needs_input_grad[:2]), None, None, None


@dataclass(frozen=True)
class Products:
    """The backward pass after the gradient of the logits: that of hidden and of the weight, chunk by chunk."""

    hidden_ND: Tensor
    weight_VD: Tensor
    rows_N: Tensor | None
    shard: VocabShard
    chunk: int
    input_rows: int
    """Rows of hidden that this rank was given."""

    def gradients(
        self, slope: Callable[[slice], Tensor], needs_hidden: bool, needs_weight: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """slope: scored rows -> gradient of their logits [M, columns] in `gemm.slope_dtype`, called for every chunk in
        order."""
        hidden_ND, rows_N, columns = self.hidden_ND, self.rows_N, self.shard.columns(len(self.weight_VD))
        split = self.shard.ranks if self.shard.sequence_parallel else 1
        # zeros: rows that predict nothing get no gradient; nor does any where this rank has no real column
        grad_TD = None
        if needs_hidden:
            grad_TD = hidden_ND.new_zeros(self.input_rows * split, hidden_ND.shape[1], dtype=torch.float32)
        weight_gradient = WeightGradient.of(self.weight_VD) if needs_weight else None
        finish = None
        parts = list(chunks(len(hidden_ND), self.chunk)) if columns else []
        for rows in parts:
            slope_MV, hidden_MD = gemm.operands(slope(rows), hidden_ND[rows])
            if grad_TD is not None:
                part_MD = gemm.hidden_gradient(slope_MV, self.weight_VD[:columns])
                if len(part_MD) != len(hidden_ND[rows]):  # of both parts of the slope
                    high_MD, low_MD = part_MD.chunk(2)
                    part_MD = high_MD + low_MD
                _add_rows(grad_TD, rows if rows_N is None else rows_N[rows], part_MD)
                del part_MD
                if rows is parts[-1]:
                    finish = start_sum(grad_TD, self.shard)
            if weight_gradient is not None:
                gemm.add_weight_gradient(weight_gradient.total_VD[:columns], slope_MV, hidden_MD)
            del slope_MV  # before the next chunk's
        if grad_TD is not None and finish is None:
            # no chunk here: there are no rows at all, or other ranks have the real columns and wait for this one
            finish = start_sum(grad_TD, self.shard)
        grad_weight = None if weight_gradient is None else weight_gradient.result()
        return None if finish is None else finish().to(hidden_ND.dtype), grad_weight


def scored_rows(hidden_TD: Tensor, rows_N: Tensor | None, shard: VocabShard) -> Tensor:
    """[N, D]: the scored rows of the whole stream, on every rank."""
    hidden_TD = gather_hidden(hidden_TD, shard)
    return hidden_TD if rows_N is None else hidden_TD.index_select(0, rows_N)


def chunks(rows: int, size: int) -> Iterator[slice]:
    return (slice(at, min(at + size, rows)) for at in range(0, rows, size))


def no_column(values: list[float], hidden_ND: Tensor) -> Tensor:
    """float32 [kinds, N]: the statistics of a rank without a single real column."""
    return torch.tensor(values)[:, None].to(hidden_ND.device, non_blocking=True).repeat(1, len(hidden_ND))


def logits(hidden_MD: Tensor, weight_VD: Tensor) -> Tensor:
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
