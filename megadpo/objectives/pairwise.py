"""Objectives over pairs: the first response of a group is the chosen one, the second the rejected one.

Notation, here and in the files beside: w chosen, l rejected; p policy, q reference; D = log p - log q of a response
(nats, summed over its tokens); |y| its scored tokens, the end-of-sequence token included; b = beta; r = b D, the
implicit reward; h = log sigmoid, s = sigmoid. Every loss is a mean over pairs, where it does not say otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal

import torch
from megadpo_kernels.pairs import pair_loss
from torch import Tensor
from torch.nn.functional import logsigmoid

from megadpo.objectives.base import Formula, Outcome, Sequences, Unit, sums_of

PAIR_METRICS = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
)

TIE = 1e-4
"""Nats. Log-ratios nearer than this are the rounding of two grids or two packings, not a preference."""


@dataclass(frozen=True)
class Pairs:
    """Sequences whose groups have two responses each; column 0 chosen, column 1 rejected. float64."""

    sequences: Sequences

    @cached_property
    def policy_G2(self) -> Tensor:
        return two_columns(self.sequences.field("policy_S"))

    @cached_property
    def reference_G2(self) -> Tensor:
        return two_columns(self.sequences.field("reference_S"))

    @cached_property
    def tokens_G2(self) -> Tensor:
        return self.sequences.tokens_S.double().view(-1, 2).clamp(min=1)

    @property
    def ratio_G2(self) -> Tensor:
        """D of both."""
        return self.policy_G2 - self.reference_G2

    @property
    def margin_G(self) -> Tensor:
        """D_w - D_l."""
        return difference(self.ratio_G2)

    @property
    def average_G2(self) -> Tensor:
        """log p / |y|."""
        return self.policy_G2 / self.tokens_G2

    @property
    def score_margin_G(self) -> Tensor:
        """Judge's score of the chosen response minus that of the rejected one."""
        return difference(self.sequences.field("scores_S").view(-1, 2))


def two_columns(values_S: Tensor) -> Tensor:
    """[G, 2]. Raises ValueError for an odd number."""
    if len(values_S) % 2:
        raise ValueError(f"{len(values_S)} values: need two for every pair")
    return values_S.view(-1, 2)


def difference(values_G2: Tensor) -> Tensor:
    """Chosen minus rejected."""
    return values_G2[:, 0] - values_G2[:, 1]


def pair_metrics(policy_G2: Tensor, reward_G2: Tensor, tie: Tensor | float) -> Tensor:
    """Sums of PAIR_METRICS over the groups. Rewards nearer than `tie` count half an accuracy (TRL: a miss)."""
    margin_G = difference(reward_G2)
    tie_G = margin_G.abs() < tie
    accuracy_G = torch.where(tie_G, torch.full_like(margin_G, 0.5), (margin_G > 0).to(margin_G.dtype))
    return sums_of(*reward_G2.unbind(1), margin_G, accuracy_G, *policy_G2.unbind(1))


class Pairwise(Formula):
    """A mean over pairs of `losses`; rewards are b D where a class does not say otherwise."""

    metrics: ClassVar[tuple[str, ...]] = PAIR_METRICS

    @property
    def scale(self) -> float:
        """Reward per nat, for the metrics."""
        return float(getattr(self, "beta", 1.0))

    def rewards(self, pairs: Pairs) -> Tensor:
        """float64 [G, 2], for the metrics."""
        return self.scale * pairs.ratio_G2

    def tie(self, pairs: Pairs) -> Tensor | float:
        """The difference of rewards that TIE nats make: a number, or float64 [G]."""
        return TIE * self.scale

    def losses(self, pairs: Pairs) -> Tensor:
        """float64 [G]."""
        raise NotImplementedError

    def __call__(self, sequences: Sequences) -> Outcome:
        pairs = Pairs(sequences)
        metrics = pair_metrics(pairs.policy_G2, self.rewards(pairs), self.tie(pairs))
        return Outcome(self.losses(pairs).sum(), sequences.count(self.unit), metrics)


def tie_of_averages(pairs: Pairs, scale: float) -> Tensor:
    """float64 [G]: the difference of rewards per token that TIE nats of the shorter response make."""
    return TIE * scale / pairs.tokens_G2.min(dim=1).values


class PairwiseWithNLL(Pairwise):
    """`losses` plus `nll_weight` x `nll`, whose mean is over `nll_unit` of the global batch."""

    metrics: ClassVar[tuple[str, ...]] = (*PAIR_METRICS, "nll_loss")

    @property
    def nll_weight(self) -> float:
        raise NotImplementedError

    @property
    def nll_unit(self) -> Unit:
        return "groups"

    def nll(self, pairs: Pairs) -> Tensor:
        """float64 [G]: each pair's part of the numerator."""
        return -pairs.average_G2[:, 0]

    def __call__(self, sequences: Sequences) -> Outcome:
        outcome, pairs = super().__call__(sequences), Pairs(sequences)
        nll = sequences.rescale(self.nll_unit, to="groups") * self.nll(pairs).sum()
        return Outcome(outcome.loss + self.nll_weight * nll, outcome.count, torch.cat([outcome.metrics, sums_of(nll)]))


def smoothed(margin_G: Tensor, label_smoothing: float) -> Tensor:
    """-(1 - e) h(m) - e h(-m)."""
    return -(1 - label_smoothing) * logsigmoid(margin_G) - label_smoothing * logsigmoid(-margin_G)


POSITIVE = "over 0; 0.1 is usual"
SMOOTHING = "in [0, 0.5); at 0.5 the labels say nothing; 0 is plain DPO"


@dataclass(frozen=True)
class DPO(Pairwise):
    """Direct preference optimisation; with label_smoothing > 0 the conservative one (cDPO).

    Formula: -(1 - e) h(b (D_w - D_l)) - e h(-b (D_w - D_l)), e = label_smoothing

    Paper: Rafailov et al. 2023, equation 7 (arXiv 2305.18290). e > 0: Mitchell 2023, equation 3
    (ericmitchell.ai/cdpo.pdf).

    TRL: `sigmoid` ignores label_smoothing since its #3906; here it means what the paper says.
    """

    beta: float = 0.1
    """How hard the policy is held to the reference."""
    label_smoothing: float = 0.0
    """Probability that a label is the wrong way round."""

    def problems(self) -> list[str]:
        return self.must(beta=(self.beta > 0, POSITIVE), label_smoothing=(0 <= self.label_smoothing < 0.5, SMOOTHING))

    def losses(self, pairs: Pairs) -> Tensor:
        return smoothed(self.beta * pairs.margin_G, self.label_smoothing)

    def __call__(self, sequences: Sequences) -> Outcome:
        if sequences.backend != "triton":
            return super().__call__(sequences)
        pairs = Pairs(sequences)  # raises what the formula raises; then the same in one launch
        policy_S, reference_S = pairs.policy_G2.flatten(), pairs.reference_G2.flatten()
        loss, metrics = pair_loss(policy_S, reference_S, self.beta, self.label_smoothing)
        return Outcome(loss, sequences.count(self.unit), metrics)


@dataclass(frozen=True)
class RobustDPO(Pairwise):
    """DPO that is unbiased under labels flipped with a known probability.

    Formula: [-(1 - e) h(b (D_w - D_l)) + e h(-b (D_w - D_l))] / (1 - 2 e), e = label_smoothing

    Paper: Chowdhury et al. 2024, equation 12 (arXiv 2403.00409).

    TRL: `robust`, equal.
    """

    beta: float = 0.1
    """How hard the policy is held to the reference."""
    label_smoothing: float = 0.1
    """Probability that a label is the wrong way round."""

    def problems(self) -> list[str]:
        return self.must(beta=(self.beta > 0, POSITIVE), label_smoothing=(0 <= self.label_smoothing < 0.5, SMOOTHING))

    def losses(self, pairs: Pairs) -> Tensor:
        margin_G, flipped = self.beta * pairs.margin_G, self.label_smoothing
        return (-(1 - flipped) * logsigmoid(margin_G) + flipped * logsigmoid(-margin_G)) / (1 - 2 * flipped)


@dataclass(frozen=True)
class RDPO(Pairwise):
    """DPO with a length penalty in the implicit reward.

    Formula: -h(b (D_w - D_l) + a |y_w| - a |y_l|), a = alpha

    Paper: Park et al. 2024 (arXiv 2403.19159), with the sign that SimPO's table 3 prints.

    TRL: absent.
    """

    beta: float = 0.1
    """How hard the policy is held to the reference."""
    alpha: float = 0.01
    """Penalty per token; 0 is DPO."""

    def problems(self) -> list[str]:
        return self.must(beta=(self.beta > 0, POSITIVE), alpha=(self.alpha >= 0, "at least 0; 0 is DPO"))

    def losses(self, pairs: Pairs) -> Tensor:
        return -logsigmoid(self.beta * pairs.margin_G + self.alpha * difference(pairs.tokens_G2))


@dataclass(frozen=True)
class NormDPO(Pairwise):
    """Length-normalised DPO (Tulu 3's DPO-norm).

    Formula: -h(b (D_w / |y_w| - D_l / |y_l|))

    Paper: Lambert et al. 2024, section 4.3 (arXiv 2411.15124).

    TRL: `sigmoid_norm`; its lengths are counted on a mask with one position more, all of them equal to ours.
    """

    beta: float = 5.0
    """How hard the policy is held to the reference; per token, so some fifty times DPO's."""

    def problems(self) -> list[str]:
        return self.must(beta=(self.beta > 0, "over 0; 5 is Tulu 3's"))

    def rewards(self, pairs: Pairs) -> Tensor:
        return self.beta * pairs.ratio_G2 / pairs.tokens_G2

    def tie(self, pairs: Pairs) -> Tensor:
        return tie_of_averages(pairs, self.beta)

    def losses(self, pairs: Pairs) -> Tensor:
        return -logsigmoid(difference(self.rewards(pairs)))


@dataclass(frozen=True)
class DPOP(Pairwise):
    """DPO-positive (Smaug): the chosen response must not become less likely than under the reference.

    Formula: -h(b (D_w - D_l - a max(0, -D_w))), a = alpha

    Paper: Pal et al. 2024, equation 3 (arXiv 2402.13228).

    TRL: absent.
    """

    beta: float = 0.3
    """How hard the policy is held to the reference."""
    alpha: float = 50.0
    """Weight of the penalty (the paper's lambda); 0 is DPO."""

    def problems(self) -> list[str]:
        return self.must(beta=(self.beta > 0, POSITIVE), alpha=(self.alpha >= 0, "at least 0; 5 to 50 is usual"))

    def losses(self, pairs: Pairs) -> Tensor:
        return -logsigmoid(self.beta * (pairs.margin_G - self.alpha * (-pairs.ratio_G2[:, 0]).clamp(min=0)))


@dataclass(frozen=True)
class SPIN(Pairwise):
    """Self-play fine-tuning: chosen is the demonstration, rejected what the last round's policy wrote.

    Formula: -h(b (D_w - D_l)), the reference being the policy of the round before (set reference.path each round)

    Paper: Chen et al. 2024, equation 4.7 with the logistic loss (arXiv 2401.01335); b is its lambda.

    TRL: `sigmoid` on generated rejected responses.
    """

    beta: float = 0.1
    """How hard the policy is held to the last round's."""

    def problems(self) -> list[str]:
        return self.must(beta=(self.beta > 0, POSITIVE))

    def losses(self, pairs: Pairs) -> Tensor:
        return -logsigmoid(self.beta * pairs.margin_G)


@dataclass(frozen=True)
class DPOWithNLL(PairwiseWithNLL):
    """DPO with the chosen response's negative log-likelihood (iterative RPO; regularised RPO; TRL's old rpo_alpha).

    Formula: mean over pairs of -h(b (D_w - D_l)) + a NLL, a = alpha. NLL is by `normalise`: response: the mean over
    pairs of -log p(y_w) / |y_w|; tokens: minus the sum of log p(y_w) over all pairs / the sum of |y_w|; sum: the mean
    over pairs of -log p(y_w)

    Paper: response: Pang et al. 2024, equation 1 of version 3 (arXiv 2404.19733). sum: Liu et al. 2024 (regularised
    preference optimisation, arXiv 2405.16436; alpha 0.005).

    TRL: `["sigmoid", "sft"]` is `tokens`, over one micro-batch of one rank; here over the global batch.
    """

    beta: float = 0.1
    """How hard the policy is held to the reference."""
    alpha: float = 1.0
    """Weight of the likelihood term; 0 is DPO."""
    normalise: Literal["response", "tokens", "sum"] = "response"
    """What the likelihood term is a mean over."""

    @property
    def nll_weight(self) -> float:
        return self.alpha

    @property
    def nll_unit(self) -> Unit:
        return "first_tokens" if self.normalise == "tokens" else "groups"

    def problems(self) -> list[str]:
        return self.must(beta=(self.beta > 0, POSITIVE), alpha=(self.alpha >= 0, "at least 0; 1 is usual"))

    def losses(self, pairs: Pairs) -> Tensor:
        return -logsigmoid(self.beta * pairs.margin_G)

    def nll(self, pairs: Pairs) -> Tensor:
        return -(pairs.average_G2 if self.normalise == "response" else pairs.policy_G2)[:, 0]
