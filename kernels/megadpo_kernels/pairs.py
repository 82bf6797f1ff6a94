"""The sigmoid loss of preference pairs with its metrics and gradient, in one launch where Triton runs.

L = sum over pairs of -(1 - e) log sigmoid(m) - e log sigmoid(-m), m = beta ((policy - reference) of the first response
minus that of the second).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from megadpo_kernels.backends import Backend, uses_triton

TIE = 1e-4
"""Nats between two log-ratios below which they count as equal: rounding, not a preference."""

METRICS = 6
"""Sums over pairs: reward of the first response, of the second, their difference, pairs in the right order (a tie
counts half), log-probability of the first response, of the second."""


def pair_loss(
    policy_S: Tensor, reference_S: Tensor, beta: float, smoothing: float, backend: Backend = "auto"
) -> tuple[Tensor, Tensor]:
    """(loss sum, scalar, with gradient to policy; metric sums [6], without). All float32.

    policy_S, reference_S: float32 [2 G], first and second response of each pair in turn. G may be 0.
    """
    if uses_triton(backend, policy_S.device):
        return _PairLoss.apply(policy_S, reference_S, beta, smoothing)
    policy_G2 = policy_S.view(-1, 2)
    reward_G2 = beta * (policy_G2 - reference_S.view(-1, 2))
    margin_G = reward_G2[:, 0] - reward_G2[:, 1]
    loss_G = -(1 - smoothing) * logsigmoid(margin_G) - smoothing * logsigmoid(-margin_G)
    right_G = torch.where(margin_G.abs() < TIE * beta, 0.5, (margin_G > 0).float())
    columns = (*reward_G2.unbind(1), margin_G, right_G, *policy_G2.unbind(1))
    return loss_G.sum(), torch.stack([column.sum() for column in columns]).detach()


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
