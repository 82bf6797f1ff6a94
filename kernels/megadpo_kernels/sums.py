"""Sum of the log-probabilities of every response, in a fixed order."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megadpo_kernels.backends import Backend, uses_triton


def response_sums(logprob_N: Tensor, tokens_S: Tensor, backend: Backend = "auto") -> Tensor:
    """float64 [S]: sum of each response's tokens, which stand one after the other in logprob_N. With gradient.

    logprob_N: float32 [N]. tokens_S: int64 [S], tokens of each response, adding up to N; 0 gives 0. Added in float64
    and always in the same order, so that neither the neighbours nor the device's atomics can change a sum; not rounded
    to float32, which above 2048 nats alone is off by up to 1.2e-4. No host synchronisation.
    Raises ValueError for lengths that are no int64 [S], and on a CPU (a GPU's host would have to wait) for negative
    ones and where they do not add up to N.
    """
    if tokens_S.dtype != torch.int64 or tokens_S.dim() != 1 or logprob_N.dim() != 1:
        given = f"{tokens_S.dtype} {list(tokens_S.shape)} and {list(logprob_N.shape)}"
        raise ValueError(f"lengths and log-probabilities are {given}: need int64 [S] and [N]")
    if tokens_S.device.type == "cpu" and (int(tokens_S.sum()) != len(logprob_N) or bool((tokens_S < 0).any())):
        raise ValueError(
            f"lengths {tokens_S.tolist()[:8]} add up to {int(tokens_S.sum())}: need 0 or more each, "
            f"and {len(logprob_N)} together"
        )
    if uses_triton(backend, logprob_N.device):
        return _ResponseSums.apply(logprob_N, tokens_S)
    return torch.segment_reduce(logprob_N.double(), "sum", lengths=tokens_S, unsafe=True)


class _ResponseSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logprob_N: Tensor, tokens_S: Tensor) -> Tensor:
        from megadpo_kernels import rows_triton

        ctx.save_for_backward(tokens_S)
        ctx.tokens, ctx.dtype = len(logprob_N), logprob_N.dtype
        return rows_triton.segment_sums(logprob_N, tokens_S)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        [tokens_S] = ctx.saved_tensors
        return torch.repeat_interleave(grads[0].to(ctx.dtype), tokens_S, output_size=ctx.tokens), None
