"""Pairs whose loss looks across the batch: it is the global batch, whatever the grid. Notation: pairwise.py.

The step gives these the whole batch at once (`whole_batch`), after a forward pass without a gradient; the price is that
pass. The gradient of the exact loss with respect to every response's sums then goes into the ordinary pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import logsigmoid

from megadpo.objectives.pairwise import POSITIVE, SMOOTHING, Pairs, Pairwise, difference, smoothed


@dataclass(frozen=True)
class AOT(Pairwise):
    """Alignment by optimal transport, paired: the policy's margins dominate the reference's as distributions.

    Formula: with u = log p(y_w) - log p(y_l) and v = log q(y_w) - log q(y_l), each sorted over the global batch, mean
    over i of -(1 - e) h(b (u_(i) - v_(i))) - e h(-b (u_(i) - v_(i))), e = label_smoothing

    Paper: Melnyk et al. 2024 (arXiv 2406.05882).

    TRL: `aot`, sorted within one micro-batch of one rank. Its older `aot_pair` is the unpaired formula.
    """

    beta: float = 0.1
    """How hard the policy is held to the reference."""
    label_smoothing: float = 0.0
    """Probability that a label is the wrong way round."""

    whole_batch: ClassVar[bool] = True

    def problems(self) -> list[str]:
        return self.must(beta=(self.beta > 0, POSITIVE), label_smoothing=(0 <= self.label_smoothing < 0.5, SMOOTHING))

    def losses(self, pairs: Pairs) -> Tensor:
        policy_G = difference(pairs.policy_G2).sort().values
        reference_G = difference(pairs.reference_G2).sort().values
        return smoothed(self.beta * (policy_G - reference_G), self.label_smoothing)


@dataclass(frozen=True)
class AOTUnpaired(Pairwise):
    """Alignment by optimal transport, unpaired: chosen rewards dominate rejected ones as distributions.

    Formula: with D_w and D_l each sorted over the global batch, mean over i of -(1 - e) h(b (D_w(i) - D_l(i))) - e h(-b
    (...)), e = label_smoothing

    Paper: Melnyk et al. 2024 (arXiv 2406.05882).

    TRL: `aot_unpaired`, sorted within one micro-batch of one rank.
    """

    beta: float = 0.1
    """How hard the policy is held to the reference."""
    label_smoothing: float = 0.0
    """Probability that a label is the wrong way round."""

    whole_batch: ClassVar[bool] = True

    def problems(self) -> list[str]:
        return self.must(beta=(self.beta > 0, POSITIVE), label_smoothing=(0 <= self.label_smoothing < 0.5, SMOOTHING))

    def losses(self, pairs: Pairs) -> Tensor:
        sorted_G2 = pairs.ratio_G2.sort(dim=0).values
        return smoothed(self.beta * difference(sorted_G2), self.label_smoothing)


@dataclass(frozen=True)
class BCO(Pairwise):
    """Binary classifier optimisation over pairs: a classifier of good and bad with a shifted reward.

    Formula: -h(r_w - d) - h(-(r_l - d)); d = (mean r_w + mean r_l) / 2 over the global batch, without gradient

    Paper: Jung et al. 2024 (arXiv 2404.04656). Its d is a running mean over steps; here it is this batch's, exactly.

    TRL: `bco_pair` has no d since its #3906.
    """

    beta: float = 0.1
    """How hard the policy is held to the reference."""

    whole_batch: ClassVar[bool] = True

    def problems(self) -> list[str]:
        return self.must(beta=(self.beta > 0, POSITIVE))

    def losses(self, pairs: Pairs) -> Tensor:
        reward_G2 = self.beta * pairs.ratio_G2
        chosen_G, rejected_G = (reward_G2 - reward_G2.detach().mean()).unbind(1)
        return -logsigmoid(chosen_G) - logsigmoid(-rejected_G)


@dataclass(frozen=True)
class BetaDPO(Pairwise):
    """DPO whose beta follows the batch: weaker regularisation where pairs are far apart.

    Formula: -h(b' (D_w - D_l)); b' = max(1e-3, b (1 + a (mean of b (D_w - D_l) over the global batch - m0))), without
    gradient; a = alpha, m0 = margin

    Paper: Wu et al. 2024 (arXiv 2407.08639), the batch-level beta. Its m0 is a running mean over steps and it samples
    pairs out of the batch; here m0 is a setting and every pair stays, so a step depends on its batch alone.

    TRL: absent.
    """

    beta: float = 0.1
    """How hard the policy is held to the reference, at a mean margin of `margin`."""
    alpha: float = 0.6
    """How much beta follows; 0 is DPO."""
    margin: float = 0.0
    """The mean reward margin at which beta is as given."""

    whole_batch: ClassVar[bool] = True

    def problems(self) -> list[str]:
        return self.must(beta=(self.beta > 0, POSITIVE), alpha=(self.alpha >= 0, "at least 0; 0.6 is usual"))

    def losses(self, pairs: Pairs) -> Tensor:
        mean = self.beta * pairs.margin_G.detach().mean()
        beta = (self.beta * (1 + self.alpha * (mean - self.margin))).clamp(min=1e-3)
        return -logsigmoid(beta * pairs.margin_G)
