"""Log-probability of given tokens under a linear head whose vocabulary is split over tensor-parallel ranks.

Axes: T rows of the stream, N scored rows, D hidden, V rows of the head on this rank. Statistics and results are
float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megadpo_kernels import reference, rows
from megadpo_kernels.backends import Backend, uses_triton
from megadpo_kernels.chunked import Call, ChunkedLogprob
from megadpo_kernels.rows import Extra, RowOps
from megadpo_kernels.shard import PLAIN, LogitOptions, VocabShard


def linear_logprob(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    shard: VocabShard,
    *,
    rows_N: Tensor | None = None,
    options: LogitOptions = PLAIN,
    backend: Backend = "auto",
    chunk: int | None = None,
    cache_bytes: int | None = None,
) -> Tensor:
    """log softmax(hidden[rows] @ weight^T)[target] of every scored row, float32 [N], the same on every rank.

    hidden_TD: bfloat16, float16 or float32; the same on every rank of the group, or this rank's rows under sequence
    parallelism. weight_VD: same dtype. targets_N: int64 global ids; one outside the vocabulary has probability 0.
    rows_N: int64, which rows of the (whole) stream are scored, in any order, possibly more than once; all where None.
    That they are in range is checked on a CPU alone: on a GPU the host would have to wait for them.

    Gradients to hidden and weight, for any upstream gradient; that to hidden is already summed over the group (and
    this rank's rows under sequence parallelism). A weight with Megatron's `main_grad` gets its gradient there
    (main_grad.py).

    Collectives, for `chunked` and `triton`: forward one all-gather of float32 [3, N], plus one of hidden under sequence
    parallelism; backward one all-reduce (reduce-scatter) of hidden's gradient in float32, rounded after it. None where
    N is 0 or one rank holds all, except that of the gradient. No host synchronisation.

    chunk: rows whose logits (float32) exist at once. cache_bytes: logits kept for the backward pass instead of being
    computed again; the same bits either way. Where None, `limits` says how many. Raises ValueError for shapes, dtypes
    or a back end that cannot work.
    """
    logprob_N, _ = _run(hidden_TD, weight_VD, targets_N, shard, rows_N, options, backend, (chunk, cache_bytes), None)
    return logprob_N


def linear_logprob_entropy(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    shard: VocabShard,
    *,
    rows_N: Tensor | None = None,
    options: LogitOptions = PLAIN,
    backend: Backend = "auto",
    chunk: int | None = None,
    cache_bytes: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`linear_logprob` and the entropy of the same distributions in nats, float32 [N] each, both with gradients."""
    logprob_N, entropy_N = _run(
        hidden_TD, weight_VD, targets_N, shard, rows_N, options, backend, (chunk, cache_bytes), "entropy"
    )
    assert entropy_N is not None
    return logprob_N, entropy_N


def linear_logprob_collision(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    shard: VocabShard,
    *,
    rows_N: Tensor | None = None,
    options: LogitOptions = PLAIN,
    backend: Backend = "auto",
    chunk: int | None = None,
    cache_bytes: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`linear_logprob` and sum of p^2 over the vocabulary (the probability that two draws are equal), float32 [N] each;
    the second without a gradient. Its logarithm is the correction in WPO's weight (Zhou et al. 2024, arXiv 2406.11827).
    """
    logprob_N, collision_N = _run(
        hidden_TD, weight_VD, targets_N, shard, rows_N, options, backend, (chunk, cache_bytes), "collision"
    )
    assert collision_N is not None
    return logprob_N, collision_N


def limits(columns: int, device: torch.device) -> tuple[int, int]:
    """(rows in a chunk, bytes of logits to keep) where the caller does not say.

    A GPU gets large chunks: every chunk reads and writes the float32 weight gradient once, which costs as much as the
    product itself at some 600 rows. On a CPU small ones are as fast.
    """
    budget, most = (2**30, 8192) if device.type == "cuda" else (2**26, 1024)
    rows_that_fit = budget // (4 * max(columns, 1))
    return max(min(rows_that_fit // 128 * 128, most), 128), budget


def _run(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    shard: VocabShard,
    rows_N: Tensor | None,
    options: LogitOptions,
    backend: Backend,
    limit: tuple[int | None, int | None],
    extra: Extra,
) -> tuple[Tensor, Tensor | None]:
    check(hidden_TD, weight_VD, targets_N, shard, rows_N)
    columns = shard.columns(len(weight_VD))
    chunk, cache_bytes = (
        given if given is not None else usual
        for given, usual in zip(limit, limits(columns, hidden_TD.device), strict=True)
    )
    if chunk < 1 or cache_bytes < 0:
        raise ValueError(f"chunk = {chunk}, cache_bytes = {cache_bytes}: need at least 1 row and 0 bytes")
    if backend == "reference":
        return reference.linear_logprob(hidden_TD, weight_VD, targets_N, rows_N, shard, options, extra)
    differentiable = torch.is_grad_enabled() and (hidden_TD.requires_grad or weight_VD.requires_grad)
    ops = _row_ops(backend, hidden_TD.device)
    call = Call(shard, options, ops, chunk, cache_bytes if differentiable else 0, extra)
    return ChunkedLogprob.apply(hidden_TD, weight_VD, targets_N, rows_N, call)


def _row_ops(backend: Backend, device: torch.device) -> RowOps:
    if not uses_triton(backend, device):
        return rows
    # imported here: everything else works without Triton
    from megadpo_kernels import rows_triton

    return rows_triton


def check(hidden_TD: Tensor, weight_VD: Tensor, targets_N: Tensor, shard: VocabShard, rows_N: Tensor | None) -> None:
    if hidden_TD.dim() != 2 or weight_VD.dim() != 2 or hidden_TD.shape[1] != weight_VD.shape[1]:
        shapes = f"{list(hidden_TD.shape)} and {list(weight_VD.shape)}"
        raise ValueError(f"hidden and weight are {shapes}: need [T, D] and [V, D] of the same D")
    if hidden_TD.dtype != weight_VD.dtype or hidden_TD.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        dtypes = f"{hidden_TD.dtype} and {weight_VD.dtype}"
        raise ValueError(f"hidden and weight are {dtypes}: need the same of bfloat16, float16, float32")
    whole = len(hidden_TD) * (shard.ranks if shard.sequence_parallel else 1)
    if rows_N is not None:
        _check_rows(rows_N, whole)
    scored = whole if rows_N is None else len(rows_N)
    if targets_N.shape != (scored,) or targets_N.dtype != torch.int64:
        raise ValueError(
            f"targets are {targets_N.dtype} {list(targets_N.shape)} for {scored} scored rows: need int64 [{scored}]"
        )


def _check_rows(rows_N: Tensor, whole: int) -> None:
    if rows_N.dtype != torch.int64 or rows_N.dim() != 1:
        raise ValueError(f"rows_N is {rows_N.dtype} {list(rows_N.shape)}: need int64 [N]")
    if rows_N.device.type == "cpu" and len(rows_N) and not 0 <= int(rows_N.min()) <= int(rows_N.max()) < whole:
        raise ValueError(f"rows_N goes from {int(rows_N.min())} to {int(rows_N.max())}: the stream has {whole} rows")
