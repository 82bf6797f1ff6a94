"""DPO under other divergences than the reverse KL. Notation: pairwise.py."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, relu
from torch.nn.functional import logsigmoid

from megadpo.objectives.pairwise import POSITIVE, Pairs, Pairwise, difference

LARGEST_EXPONENT = 700.0


@dataclass(frozen=True)
class FDPO(Pairwise):
    """DPO with an f-divergence: f' of the probability ratio u = p / q takes the place of its logarithm.

    Formula: -h(b f'(u_w) - b f'(u_l)); f'(u) is reverse_kl: log u; forward_kl: -1 / u; js: log(2 u / (1 + u)); alpha:
    (1 - u^-a) / a

    Paper: Wang et al. 2023, table 1 (arXiv 2309.16240), constants that cancel left out.

    TRL: f_divergence_type; its coefficient is 1 - a, with 0.5 for default, and the alpha divergence's exponents are
    cut at 80. Here an exponent over 700 goes on as a straight line, so that equal ratios still give log 2.
    """

    beta: float = 0.1
    """How hard the policy is held to the reference."""
    divergence: Literal["reverse_kl", "forward_kl", "js", "alpha"] = "reverse_kl"
    """reverse_kl is DPO."""
    alpha: float = 0.5
    """Of the alpha divergence, in (0, 1): towards 0 it is the reverse KL, towards 1 the forward one."""

    def problems(self) -> list[str]:
        return self.must(
            beta=(self.beta > 0, POSITIVE),
            alpha=(0 < self.alpha < 1, "in (0, 1), both ends left out; their limits are reverse_kl and forward_kl"),
        )

    def losses(self, pairs: Pairs) -> Tensor:
        ratio_G2 = pairs.ratio_G2  # log u
        if self.divergence == "reverse_kl":
            score_G2 = ratio_G2
        elif self.divergence == "forward_kl":
            score_G2 = -exponential(-ratio_G2)
        elif self.divergence == "js":
            score_G2 = math.log(2) + logsigmoid(ratio_G2)
        else:
            score_G2 = -exponential_minus_1(-self.alpha * ratio_G2) / self.alpha
        return -logsigmoid(self.beta * difference(score_G2))


def exponential(x: Tensor) -> Tensor:
    """exp(x), as a straight line from LARGEST_EXPONENT on: no infinity, and a slope that still points the right way."""
    return torch.exp(x.clamp(max=LARGEST_EXPONENT)) * (1 + relu(x - LARGEST_EXPONENT))


def exponential_minus_1(x: Tensor) -> Tensor:
    """exp(x) - 1, exact near 0, in the same way."""
    return torch.expm1(x.clamp(max=LARGEST_EXPONENT)) * (1 + relu(x - LARGEST_EXPONENT))
