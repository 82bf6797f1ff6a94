"""Pairs with other curves than DPO's: contrast with noise, anchors, exact optimisation. Notation: pairwise.py."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from megadpo.objectives.pairwise import POSITIVE, Pairs, Pairwise


@dataclass(frozen=True)
class EXO(Pairwise):
    """Efficient exact optimisation: the reverse KL from the policy's choice to the smoothed label.

    Formula: with m = b (D_w - D_l), e = label_smoothing: s(m) [h(m) - log(1 - e)] + s(-m) [h(-m) - log e]

    Paper: Ji et al. 2024, equation 16 (arXiv 2402.00856).

    TRL: `exo_pair`, equal where its label_smoothing is set to this default.
    """

    beta: float = 0.1
    """How hard the policy is held to the reference."""
    label_smoothing: float = 1e-3
    """Probability of the rejected response under the label; the logarithm of 0 does not exist."""

    def problems(self) -> list[str]:
        return self.must(
            beta=(self.beta > 0, POSITIVE),
            label_smoothing=(0 < self.label_smoothing < 0.5, "in (0, 0.5), both ends left out; 1e-3 is usual"),
        )

    def losses(self, pairs: Pairs) -> Tensor:
        margin_G = self.beta * pairs.margin_G
        right_G = logsigmoid(margin_G) - math.log1p(-self.label_smoothing)
        wrong_G = logsigmoid(-margin_G) - math.log(self.label_smoothing)
        return margin_G.sigmoid() * right_G + (-margin_G).sigmoid() * wrong_G


@dataclass(frozen=True)
class NCA(Pairwise):
    """Noise-contrastive alignment: raises the chosen response's own likelihood too, not only the margin.

    Formula: -h(r_w) - h(-r_w) / 2 - h(-r_l) / 2

    Paper: Chen et al. 2024, the pair form (arXiv 2402.05369).

    TRL: `nca_pair`, equal.
    """

    beta: float = 0.1
    """How hard the policy is held to the reference."""

    def problems(self) -> list[str]:
        return self.must(beta=(self.beta > 0, POSITIVE))

    def losses(self, pairs: Pairs) -> Tensor:
        chosen_G, rejected_G = (self.beta * pairs.ratio_G2).unbind(1)
        return -logsigmoid(chosen_G) - 0.5 * logsigmoid(-chosen_G) - 0.5 * logsigmoid(-rejected_G)


@dataclass(frozen=True)
class APOZero(Pairwise):
    """Anchored preference optimisation, zero: chosen up and rejected down, each from where the reference has it.

    Formula: 1 - s(r_w) + s(r_l)

    Paper: D'Oosterlinck et al. 2024, equation 7 (arXiv 2408.06266). For chosen responses better than the model's own.

    TRL: `apo_zero`, equal.
    """

    beta: float = 0.1
    """How hard the policy is held to the reference."""

    def problems(self) -> list[str]:
        return self.must(beta=(self.beta > 0, POSITIVE))

    def losses(self, pairs: Pairs) -> Tensor:
        chosen_G, rejected_G = (self.beta * pairs.ratio_G2).unbind(1)
        return (-chosen_G).sigmoid() + rejected_G.sigmoid()


@dataclass(frozen=True)
class APODown(Pairwise):
    """Anchored preference optimisation, down: both down, the rejected one more.

    Formula: s(r_w) + 1 - s(r_w - r_l)

    Paper: D'Oosterlinck et al. 2024, equation 8 (arXiv 2408.06266). For chosen responses worse than the model's own.

    TRL: `apo_down`, equal.
    """

    beta: float = 0.1
    """How hard the policy is held to the reference."""

    def problems(self) -> list[str]:
        return self.must(beta=(self.beta > 0, POSITIVE))

    def losses(self, pairs: Pairs) -> Tensor:
        return (self.beta * pairs.ratio_G2[:, 0]).sigmoid() + (-self.beta * pairs.margin_G).sigmoid()


@dataclass(frozen=True)
class DiscoPOP(Pairwise):
    """The loss that a language model found: logistic and exponential, mixed by the margin itself.

    Formula: with m = b (D_w - D_l): -(1 - s(m / t)) h(m) + s(m / t) exp(-m), t = tau

    Paper: Lu et al. 2024, equation 5 (arXiv 2406.08414).

    TRL: `discopop`, equal; there exp overflows at large negative margins, where s(m / t) exp(-m) is still small.
    """

    beta: float = 0.05
    """How hard the policy is held to the reference."""
    tau: float = 0.05
    """Temperature of the mixture (TRL: discopop_tau)."""

    def problems(self) -> list[str]:
        return self.must(beta=(self.beta > 0, POSITIVE), tau=(0 < self.tau <= 1, "in (0, 1]; 0.05 is usual"))

    def losses(self, pairs: Pairs) -> Tensor:
        margin_G = self.beta * pairs.margin_G
        exponential_G = torch.exp(logsigmoid(margin_G / self.tau) - margin_G)
        return -(-margin_G / self.tau).sigmoid() * logsigmoid(margin_G) + exponential_G
