"""Pairs without a reference: it is neither loaded nor scored. Notation: pairwise.py."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, relu
from torch.nn.functional import logsigmoid

from megadpo.objectives.base import Unit
from megadpo.objectives.pairwise import (
    POSITIVE,
    Pairs,
    Pairwise,
    PairwiseWithNLL,
    difference,
    smoothed,
    tie_of_averages,
)

NO_NEEDS: frozenset[str] = frozenset()


@dataclass(frozen=True)
class SLiC(PairwiseWithNLL):
    """SLiC-HF: a hinge on the policy's own margin, with the likelihood of the chosen response.

    Formula: max(0, delta - log p(y_w) + log p(y_l)) - a log p(y_w), a = alpha

    Paper: Zhao et al. 2023, equation 1 (arXiv 2305.10425); a is its lambda, and its regularisation target is the
    chosen response (the paper allows the supervised model's own too).

    TRL: absent; `hinge` is RSO's loss, on log-ratios.
    """

    delta: float = 1.0
    """The margin in nats that a pair must have."""
    alpha: float = 0.1
    """Weight of the likelihood term."""

    needs: ClassVar[frozenset[str]] = NO_NEEDS

    @property
    def nll_weight(self) -> float:
        return self.alpha

    def problems(self) -> list[str]:
        return self.must(delta=(self.delta > 0, "over 0; 1 is usual"), alpha=(self.alpha >= 0, "at least 0"))

    def rewards(self, pairs: Pairs) -> Tensor:
        return pairs.policy_G2

    def losses(self, pairs: Pairs) -> Tensor:
        return relu(self.delta - difference(pairs.policy_G2))

    def nll(self, pairs: Pairs) -> Tensor:
        return -pairs.policy_G2[:, 0]


@dataclass(frozen=True)
class SimPO(Pairwise):
    """Simple preference optimisation: the average log-probability is the reward, with a target margin.

    Formula: with m = b (log p(y_w) / |y_w| - log p(y_l) / |y_l|) - gamma: -(1 - e) h(m) - e h(-m), e = label_smoothing

    Paper: Meng et al. 2024, equation 6 (arXiv 2405.14734), with e = 0.

    TRL: `simpo` of its CPO trainer with cpo_alpha 0, equal; there `simpo_gamma` is this gamma. The authors' scripts and
    open-instruct take gamma_beta_ratio = gamma / beta.
    """

    beta: float = 2.0
    """Reward per nat and token."""
    gamma: float = 0.5
    """Target margin of the rewards; gamma_beta_ratio x beta for those who know the ratio."""
    label_smoothing: float = 0.0
    """Probability that a label is the wrong way round."""

    needs: ClassVar[frozenset[str]] = NO_NEEDS

    def problems(self) -> list[str]:
        return self.must(
            beta=(self.beta > 0, "over 0; 2 to 10 is usual"),
            gamma=(self.gamma >= 0, "at least 0; 0.3 to 1.6 is usual"),
            label_smoothing=(0 <= self.label_smoothing < 0.5, "in [0, 0.5); at 0.5 the labels say nothing"),
        )

    def rewards(self, pairs: Pairs) -> Tensor:
        return self.beta * pairs.average_G2

    def tie(self, pairs: Pairs) -> Tensor:
        return tie_of_averages(pairs, self.beta)

    def losses(self, pairs: Pairs) -> Tensor:
        return smoothed(difference(self.rewards(pairs)) - self.gamma, self.label_smoothing)


@dataclass(frozen=True)
class ORPO(PairwiseWithNLL):
    """Odds-ratio preference optimisation: supervised training with a penalty on the odds of the rejected response.

    Formula: mean NLL - l mean h(o_w - o_l); o = a - log(1 - exp(a)), a = log p(y) / |y|, l = beta. NLL by `normalise`:
    response, -log p(y_w) / |y_w| of each pair; tokens: over all chosen tokens of the global batch

    Paper: Hong et al. 2024, equations 4, 6 and 7 (arXiv 2403.07691).

    TRL: `orpo` takes the likelihood over the prompt too (as its authors' code does unless told otherwise), averaged
    over one micro-batch; the odds term is equal. There is no setting for that here: a prompt's tokens are not scored,
    and the likelihood is that of the response, as in the paper. So runs of theirs are not reproduced to the digit.
    """

    beta: float = 0.1
    """Weight of the odds-ratio term (the paper's lambda)."""
    normalise: Literal["response", "tokens"] = "response"
    """What the likelihood term is a mean over."""

    needs: ClassVar[frozenset[str]] = NO_NEEDS

    @property
    def nll_weight(self) -> float:
        return 1.0

    @property
    def nll_unit(self) -> Unit:
        return "first_tokens" if self.normalise == "tokens" else "groups"

    def problems(self) -> list[str]:
        return self.must(beta=(self.beta > 0, POSITIVE))

    def rewards(self, pairs: Pairs) -> Tensor:
        return self.beta * pairs.average_G2

    def tie(self, pairs: Pairs) -> Tensor:
        return tie_of_averages(pairs, self.beta)

    def losses(self, pairs: Pairs) -> Tensor:
        return -self.beta * logsigmoid(difference(log_odds(pairs.average_G2)))

    def nll(self, pairs: Pairs) -> Tensor:
        return -(pairs.average_G2 if self.normalise == "response" else pairs.policy_G2)[:, 0]


CERTAIN = 1e-30
"""A probability of exactly 1 (its logarithm 0) counts as this far below it, where the odds are still a number."""


def log_odds(logp: Tensor) -> Tensor:
    """log(p / (1 - p)) from log p, without cancellation at either end."""
    logp = logp - (logp.detach() + CERTAIN).clamp(min=0)
    near_one = logp > -math.log(2)
    # each branch sees only its own half, so that neither makes a NaN gradient for the other
    upper = torch.log(-torch.expm1(torch.where(near_one, logp, -1.0)))
    lower = torch.log1p(-torch.exp(torch.where(near_one, -1.0, logp)))
    return logp - torch.where(near_one, upper, lower)


@dataclass(frozen=True)
class CPO(PairwiseWithNLL):
    """Contrastive preference optimisation: DPO against a uniform reference, with the chosen response's likelihood.

    Formula: with m = b (log p(y_w) - log p(y_l)): mean of -(1 - e) h(m) - e h(-m), plus a NLL; a = alpha, e =
    label_smoothing. NLL is by `normalise`: tokens: minus the sum of log p(y_w) over all pairs / the sum of |y_w|; sum:
    the mean over pairs of -log p(y_w)

    Paper: Xu et al. 2024 (arXiv 2401.08417), with e = 0 and a = 1. sum is the likelihood of its equation 3, tokens that
    of its authors' code.

    TRL: `sigmoid` of its CPO trainer, equal in the first term; the likelihood there is over the prompt too and over one
    micro-batch.
    """

    beta: float = 0.1
    """Reward per nat."""
    alpha: float = 1.0
    """Weight of the likelihood term (TRL: cpo_alpha)."""
    label_smoothing: float = 0.0
    """Probability that a label is the wrong way round."""
    normalise: Literal["tokens", "sum"] = "tokens"
    """What the likelihood term is a mean over."""

    needs: ClassVar[frozenset[str]] = NO_NEEDS

    @property
    def nll_weight(self) -> float:
        return self.alpha

    @property
    def nll_unit(self) -> Unit:
        return "first_tokens" if self.normalise == "tokens" else "groups"

    def problems(self) -> list[str]:
        return self.must(
            beta=(self.beta > 0, POSITIVE),
            alpha=(self.alpha >= 0, "at least 0; 1 is usual"),
            label_smoothing=(0 <= self.label_smoothing < 0.5, "in [0, 0.5); at 0.5 the labels say nothing"),
        )

    def rewards(self, pairs: Pairs) -> Tensor:
        return self.beta * pairs.policy_G2

    def losses(self, pairs: Pairs) -> Tensor:
        return smoothed(self.beta * difference(pairs.policy_G2), self.label_smoothing)

    def nll(self, pairs: Pairs) -> Tensor:
        return -pairs.policy_G2[:, 0]


@dataclass(frozen=True)
class CLICK(PairwiseWithNLL):
    """CLICK: language modelling with a hinge between a good and a bad continuation.

    Formula: NLL + a mean max(0, gamma - log p(y_w) + log p(y_l)), a = alpha; NLL over all chosen tokens of the global
    batch

    Paper: Zheng et al. 2023 (arXiv 2306.03350). Its language-modelling data may be other text than the pairs; here it
    is the chosen response.

    TRL: absent.
    """

    alpha: float = 0.5
    """Weight of the hinge."""
    gamma: float = 15.0
    """The margin in nats that a pair must have."""

    needs: ClassVar[frozenset[str]] = NO_NEEDS

    @property
    def nll_weight(self) -> float:
        return 1.0

    @property
    def nll_unit(self) -> Unit:
        return "first_tokens"

    def problems(self) -> list[str]:
        return self.must(alpha=(self.alpha >= 0, "at least 0"), gamma=(self.gamma >= 0, "at least 0"))

    @property
    def scale(self) -> float:
        return 1.0

    def rewards(self, pairs: Pairs) -> Tensor:
        return pairs.policy_G2

    def losses(self, pairs: Pairs) -> Tensor:
        return self.alpha * relu(self.gamma - difference(pairs.policy_G2))

    def nll(self, pairs: Pairs) -> Tensor:
        return -pairs.policy_G2[:, 0]
