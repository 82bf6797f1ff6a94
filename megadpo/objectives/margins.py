"""Pairs whose margin is driven to a target: by a square, a hinge, or a judge's scores. Notation: pairwise.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, relu
from torch.nn.functional import logsigmoid

from megadpo.objectives.pairwise import POSITIVE, Pairs, Pairwise, difference


@dataclass(frozen=True)
class IPO(Pairwise):
    """Identity preference optimisation: the margin is pulled to 1 / (2 b), not to infinity.

    Formula: (D_w / |y_w| - D_l / |y_l| - 1 / (2 b))^2; with log_ratio: sum, (D_w - D_l - 1 / (2 b))^2

    Paper: Azar et al. 2023, equation 17 (arXiv 2310.12036); b is its tau. The text sums over tokens; its authors
    averaged in their experiments, TRL reports of them.

    TRL: `ipo` averages, as here by default. OpenRLHF, NeMo-Aligner and the first DPO code sum.
    """

    beta: float = 0.1
    """Regularisation (tau); the target margin is 1 / (2 beta)."""
    log_ratio: Literal["average", "sum"] = "average"
    """Log-ratios per token, or summed over the response."""

    def problems(self) -> list[str]:
        return self.must(beta=(self.beta > 0, POSITIVE))

    def losses(self, pairs: Pairs) -> Tensor:
        ratio_G2 = pairs.ratio_G2 / pairs.tokens_G2 if self.log_ratio == "average" else pairs.ratio_G2
        return (difference(ratio_G2) - 1 / (2 * self.beta)) ** 2


@dataclass(frozen=True)
class RSOHinge(Pairwise):
    """The hinge loss of statistical rejection sampling (RSO, hinge-norm), on log-ratios.

    Formula: max(0, 1 - b (D_w - D_l))

    Paper: Liu et al. 2023 (arXiv 2309.06657); b is its gamma. Its rejection sampling is a way to make the pairs.

    TRL: `hinge`, equal. It is not SLiC-HF, which has no reference and a likelihood term: that is `slic`.
    """

    beta: float = 0.1
    """The target margin is 1 / beta nats."""

    def problems(self) -> list[str]:
        return self.must(beta=(self.beta > 0, POSITIVE))

    def losses(self, pairs: Pairs) -> Tensor:
        return relu(1 - self.beta * pairs.margin_G)


@dataclass(frozen=True)
class ODPO(Pairwise):
    """DPO with an offset: a pair must be apart by as much as the judge's scores are.

    Formula: -h(b (D_w - D_l) - offset); offset = a (score_w - score_l) or a log(score_w - score_l), a = alpha

    Paper: Amini et al. 2024 (arXiv 2402.10571); its experiments use the logarithm, which exists only where the
    chosen response has the higher score: with offset: log, other pairs are left out when the data are read.

    TRL: absent.
    """

    beta: float = 0.1
    """How hard the policy is held to the reference."""
    alpha: float = 1.0
    """Weight of the offset; 0 is DPO."""
    offset: Literal["log", "linear"] = "log"
    """How the offset grows with the difference of the scores."""

    needs: ClassVar[frozenset[str]] = frozenset({"reference_S", "scores_S"})

    def problems(self) -> list[str]:
        return self.must(beta=(self.beta > 0, POSITIVE), alpha=(self.alpha >= 0, "at least 0; 1 is usual"))

    @property
    def needs_gap(self) -> bool:
        return self.offset == "log" and self.alpha > 0

    def losses(self, pairs: Pairs) -> Tensor:
        gap_G = pairs.score_margin_G
        if self.alpha == 0:
            return -logsigmoid(self.beta * pairs.margin_G)
        # where a gap of 0 comes this far, its offset is minus infinity: the pair adds nothing
        offset_G = gap_G.log() if self.offset == "log" else gap_G
        return -logsigmoid(self.beta * pairs.margin_G - self.alpha * offset_G)


@dataclass(frozen=True)
class RewardRPO(Pairwise):
    """Reward-aware preference optimisation (NVIDIA's RPO): the implicit margin matches the judge's.

    Formula: with m = b (D_w - D_l), t = eta (score_w - score_l) and Bernoulli distributions: backward_kl: KL(s(t) ||
    s(m)); forward_kl: KL(s(m) || s(t)); squared: (m - t)^2

    Paper: Nvidia 2024, Nemotron-4 340B (arXiv 2406.11704), section 3.3.2; names and direction of the two KL as in
    NeMo-Aligner's `rpo_bwd_kl`, `rpo_fwd_kl`, `rpo_sq`.

    TRL: absent; its `rpo_alpha` is another loss, here `dpo_nll`.
    """

    beta: float = 0.1
    """How hard the policy is held to the reference."""
    eta: float = 1.0
    """Scale of the judge's scores (NeMo: gt_reward_scale)."""
    distance: Literal["backward_kl", "forward_kl", "squared"] = "backward_kl"
    """How far apart the two margins are."""

    needs: ClassVar[frozenset[str]] = frozenset({"reference_S", "scores_S"})

    def problems(self) -> list[str]:
        return self.must(beta=(self.beta > 0, POSITIVE), eta=(self.eta > 0, "over 0; 1 is usual"))

    def losses(self, pairs: Pairs) -> Tensor:
        margin_G, target_G = self.beta * pairs.margin_G, self.eta * pairs.score_margin_G
        if self.distance == "squared":
            return (margin_G - target_G) ** 2
        if self.distance == "backward_kl":
            return bernoulli_kl(target_G, margin_G)
        return bernoulli_kl(margin_G, target_G)


def bernoulli_kl(a: Tensor, b: Tensor) -> Tensor:
    """KL(Bernoulli(s(a)) || Bernoulli(s(b))), nats."""
    return a.sigmoid() * (logsigmoid(a) - logsigmoid(b)) + (-a).sigmoid() * (logsigmoid(-a) - logsigmoid(-b))


@dataclass(frozen=True)
class SPPOHard(Pairwise):
    """Self-play preference optimisation with hard labels: each log-ratio is pulled to plus or minus 1 / (2 b).

    Formula: (D_w - 1 / (2 b))^2 + (D_l + 1 / (2 b))^2

    Paper: Wu et al. 2024, equation 4.7 with probabilities 1 and 0 (arXiv 2405.00675); 1 / b is its eta. Its authors'
    code takes the mean of the two terms, half of this.

    TRL: `sppo_hard`, equal.
    """

    beta: float = 0.001
    """The targets are 1 / (2 beta) nats."""

    def problems(self) -> list[str]:
        return self.must(beta=(self.beta > 0, "over 0; 0.001 is its authors'"))

    def losses(self, pairs: Pairs) -> Tensor:
        target = 1 / (2 * self.beta)
        return (pairs.ratio_G2[:, 0] - target) ** 2 + (pairs.ratio_G2[:, 1] + target) ** 2
