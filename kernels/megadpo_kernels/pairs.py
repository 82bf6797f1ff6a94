"""The sigmoid loss of preference pairs with its metrics and gradient, in one launch of a Triton kernel.

L = sum over pairs of -(1 - e) log sigmoid(m) - e log sigmoid(-m), m = beta ((policy - reference) of the first response
minus that of the second). In torch it is some forty launches on tensors of a few dozen numbers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megadpo_kernels.backends import uses_triton

METRICS = 6
"""Sums over pairs: reward of the first response, of the second, their difference, pairs in the right order (a tie, two
log-ratios less than 1e-4 nats apart, counts half), log-probability of the first response, of the second."""


def pair_loss(policy_S: Tensor, reference_S: Tensor, beta: float, smoothing: float) -> tuple[Tensor, Tensor]:
    """(loss sum, scalar, with gradient to policy; metric sums [6], without). Both float32.

    policy_S, reference_S: float64 or float32 [2 G], first and second response of each pair in turn; subtracted in
    float64. G may be 0. Raises ValueError for other shapes and dtypes, and where Triton cannot run: there is no other
    back end.
    """
    for name, values_S in (("policy", policy_S), ("reference", reference_S)):
        if values_S.dtype not in (torch.float32, torch.float64) or values_S.dim() != 1:
            raise ValueError(f"{name} is {values_S.dtype} {list(values_S.shape)}: need float64 or float32 [2 G]")
    if len(policy_S) % 2 or len(policy_S) != len(reference_S):
        raise ValueError(f"{len(policy_S)} and {len(reference_S)} log-probabilities: need two of each for every pair")
    uses_triton("triton", policy_S.device)
    return _PairLoss.apply(policy_S, reference_S, beta, smoothing)


class _PairLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, policy_S: Tensor, reference_S: Tensor, beta: float, smoothing: float
    ) -> tuple[Tensor, Tensor]:
        from megadpo_kernels import pairs_triton

        sums, slope_S = pairs_triton.pair_loss(policy_S, reference_S, beta, smoothing)
        ctx.save_for_backward(slope_S)
        loss, metrics = sums[0].clone(), sums[1:].clone()
        ctx.mark_non_differentiable(metrics)
        return loss, metrics

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        [slope_S] = ctx.saved_tensors
        return slope_S * grads[0], None, None, None
