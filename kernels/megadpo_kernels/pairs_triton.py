"""`pairs.pair_loss` as one Triton kernel."""

# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl
from torch import Tensor

from megadpo_kernels.configs import config_for


@triton.jit(do_not_specialize=["pairs"])
def pair_loss_kernel(policy, reference, sums, slopes, pairs, beta, smoothing, BLOCK: tl.constexpr):
    """One program for all pairs: a micro-batch has some dozens. Sums: loss, then the metrics in their order.

    Differences are taken in float64, as the log-probabilities come; what is left of them are float32's numbers.
    """
    loss = tl.zeros((BLOCK,), tl.float32)
    reward0 = tl.zeros((BLOCK,), tl.float64)
    reward1 = tl.zeros((BLOCK,), tl.float64)
    right = tl.zeros((BLOCK,), tl.float32)
    policy0 = tl.zeros((BLOCK,), tl.float64)
    policy1 = tl.zeros((BLOCK,), tl.float64)
    for at in range(0, pairs, BLOCK):
        pair = at + tl.arange(0, BLOCK)
        inside = pair < pairs
        p0 = tl.load(policy + 2 * pair, mask=inside, other=0.0).to(tl.float64)
        p1 = tl.load(policy + 2 * pair + 1, mask=inside, other=0.0).to(tl.float64)
        r0 = beta * (p0 - tl.load(reference + 2 * pair, mask=inside, other=0.0).to(tl.float64))
        r1 = beta * (p1 - tl.load(reference + 2 * pair + 1, mask=inside, other=0.0).to(tl.float64))
        margin = (r0 - r1).to(tl.float32)
        # log sigmoid(m) = min(m, 0) - log(1 + exp(-|m|)), which neither overflows nor cancels
        small = tl.exp(-tl.abs(margin))
        tail = tl.log(1 + small)
        # no minimum: it may prefer a number to NaN
        right_log = tl.where(margin > 0, 0.0, margin) - tail
        wrong_log = tl.where(margin < 0, 0.0, -margin) - tail
        larger = 1 / (1 + small)
        smaller = small / (1 + small)
        right_share = tl.where(margin > 0, larger, smaller)  # sigmoid(m)
        wrong_share = tl.where(margin > 0, smaller, larger)
        slope = beta * (smoothing * right_share - (1 - smoothing) * wrong_share)
        tl.store(slopes + 2 * pair, slope, mask=inside)
        tl.store(slopes + 2 * pair + 1, -slope, mask=inside)
        loss -= tl.where(inside, (1 - smoothing) * right_log + smoothing * wrong_log, 0.0)
        reward0 += r0
        reward1 += r1
        right += tl.where(inside, tl.where(tl.abs(margin) < 1e-4 * beta, 0.5, tl.where(margin > 0, 1.0, 0.0)), 0.0)
        policy0 += p0
        policy1 += p1
    tl.store(sums, tl.sum(loss, 0))
    tl.store(sums + 1, tl.sum(reward0, 0))
    tl.store(sums + 2, tl.sum(reward1, 0))
    tl.store(sums + 3, tl.sum(reward0 - reward1, 0))
    tl.store(sums + 4, tl.sum(right, 0))
    tl.store(sums + 5, tl.sum(policy0, 0))
    tl.store(sums + 6, tl.sum(policy1, 0))


def pair_loss(policy_S: Tensor, reference_S: Tensor, beta: float, smoothing: float) -> tuple[Tensor, Tensor]:
    """(loss and metric sums, float32 [7]; gradient of the loss sum to policy, [2 G], in its dtype)."""
    sums = torch.zeros(7, dtype=torch.float32, device=policy_S.device)
    slope_S = torch.empty_like(policy_S, memory_format=torch.contiguous_format)
    if len(policy_S):
        config = config_for("pair_loss", policy_S.device, len(policy_S), slope_S.dtype)
        pair_loss_kernel[(1,)](
            policy_S.contiguous(),
            reference_S.contiguous(),
            sums,
            slope_S,
            len(policy_S) // 2,
            beta,
            smoothing,
            BLOCK=config.block,
            num_warps=config.warps,
        )
    return sums, slope_S
