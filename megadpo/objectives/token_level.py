"""Pairs whose loss looks at single tokens. Notation: pairwise.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from megadpo.objectives.base import Sequences
from megadpo.objectives.pairwise import POSITIVE, Pairs, Pairwise, PairwiseWithNLL, difference


@dataclass(frozen=True)
class LDDPO(Pairwise):
    """Length-desensitised DPO: tokens beyond the shorter response's length count for less.

    Formula: -h(b (D'_w - D'_l)); D' = D of the first l tokens + a x D of the others, l = min(|y_w|, |y_l|), a = alpha

    Paper: Liu et al. 2024 (arXiv 2409.06411). Places are counted within the response, so the prompt's length is
    nothing.

    TRL: `ld_alpha` with `sigmoid`, equal.
    """

    beta: float = 0.1
    """How hard the policy is held to the reference."""
    alpha: float = 0.5
    """Weight of the tokens beyond the common length; 1 is DPO (TRL: ld_alpha)."""

    needs: ClassVar[frozenset[str]] = frozenset({"reference_S", "policy_N", "reference_N"})

    def problems(self) -> list[str]:
        return self.must(beta=(self.beta > 0, POSITIVE), alpha=(0 <= self.alpha <= 1, "in [0, 1]; 1 is DPO"))

    def losses(self, pairs: Pairs) -> Tensor:
        sequences = pairs.sequences
        common_G = sequences.tokens_S.view(-1, 2).min(dim=1).values
        beyond_N = sequences.places_N() >= sequences.per_token(common_G.repeat_interleave(2))
        ratio_N = sequences.field("policy_N") - sequences.field("reference_N")
        ratio_S = sequences.sums(torch.where(beyond_N, self.alpha * ratio_N, ratio_N))
        return -logsigmoid(self.beta * difference(ratio_S.view(-1, 2)))


@dataclass(frozen=True)
class Llama3DPO(PairwiseWithNLL):
    """Llama 3's DPO: formatting tokens are left out of the margin, and the chosen response's likelihood is added.

    Formula: -h(b (D_w - D_l)) - a log p(y_w) / |y_w|; D over the tokens that are no formatting (header, end of turn), a
    = alpha

    Paper: Llama team 2024, section 4.1.4 (arXiv 2407.21783): b 0.1, a 0.2, learning rate 1e-5. The likelihood is Pang
    et al.'s (arXiv 2404.19733), over all tokens of the response, so that the model still learns to end its turn.

    TRL: absent.
    """

    beta: float = 0.1
    """How hard the policy is held to the reference."""
    alpha: float = 0.2
    """Weight of the likelihood term."""

    needs: ClassVar[frozenset[str]] = frozenset({"reference_S", "policy_N", "reference_N", "body_N"})

    @property
    def nll_weight(self) -> float:
        return self.alpha

    def problems(self) -> list[str]:
        return self.must(beta=(self.beta > 0, POSITIVE), alpha=(self.alpha >= 0, "at least 0; 0.2 is Llama 3's"))

    def losses(self, pairs: Pairs) -> Tensor:
        sequences = pairs.sequences
        ratio_N = sequences.field("policy_N") - sequences.field("reference_N")
        ratio_S = sequences.sums(torch.where(sequences.field("body_N"), ratio_N, torch.zeros_like(ratio_N)))
        return -logsigmoid(self.beta * difference(ratio_S.view(-1, 2)))


@dataclass(frozen=True)
class TDPO1(Pairwise):
    """Token-level DPO, first form: the margin less the difference of the forward KL along the two responses.

    Formula: -h(b (D_w - D_l) - b (K_l - K_w)); K = sum over the response's positions of KL(q || p) of the next token

    Paper: Zeng et al. 2024, equation 15 (arXiv 2404.11999). The gradient goes through both K.

    TRL: absent.
    """

    beta: float = 0.1
    """How hard the policy is held to the reference."""

    needs: ClassVar[frozenset[str]] = frozenset({"reference_S", "kl_N"})

    def problems(self) -> list[str]:
        return self.must(beta=(self.beta > 0, POSITIVE))

    def losses(self, pairs: Pairs) -> Tensor:
        kl_G2 = response_kl(pairs.sequences)
        return -logsigmoid(self.beta * (pairs.margin_G + difference(kl_G2)))


@dataclass(frozen=True)
class TDPO2(Pairwise):
    """Token-level DPO, second form: the chosen response's KL is a constant, and the difference has a weight.

    Formula: -h(b (D_w - D_l) - b a (K_l - stop(K_w))), a = alpha; K as in tdpo1, stop: no gradient

    Paper: Zeng et al. 2024, equation 17 (arXiv 2404.11999).

    TRL: absent.
    """

    beta: float = 0.1
    """How hard the policy is held to the reference."""
    alpha: float = 0.5
    """Weight of the difference of the KL; 0 is DPO."""

    needs: ClassVar[frozenset[str]] = frozenset({"reference_S", "kl_N"})

    def problems(self) -> list[str]:
        return self.must(beta=(self.beta > 0, POSITIVE), alpha=(self.alpha >= 0, "at least 0; 0.5 is usual"))

    def losses(self, pairs: Pairs) -> Tensor:
        chosen_G, rejected_G = response_kl(pairs.sequences).unbind(1)
        return -logsigmoid(self.beta * (pairs.margin_G - self.alpha * (rejected_G - chosen_G.detach())))


def response_kl(sequences: Sequences) -> Tensor:
    """float64 [G, 2]: K, the KL summed over each response's positions."""
    return sequences.sums(sequences.field("kl_N")).view(-1, 2)


@dataclass(frozen=True)
class WPO(Pairwise):
    """Weighted preference optimisation: pairs that the policy itself might have written weigh more.

    Formula: -w_w w_l h(b (D_w - D_l)); w = exp(mean over tokens of log p_t - log sum_v p_t(v)^2), without gradient

    Paper: Zhou et al. 2024, equation 2 (arXiv 2406.11827). Its authors' code keeps the product at most 1: `clamp`.

    TRL: `use_weighting` does not clamp: equal with clamp: false.
    """

    beta: float = 0.1
    """How hard the policy is held to the reference."""
    clamp: bool = True
    """Keep the product of the two weights at most 1, as the authors do."""

    needs: ClassVar[frozenset[str]] = frozenset({"reference_S", "policy_N", "collision_N"})

    def problems(self) -> list[str]:
        return self.must(beta=(self.beta > 0, POSITIVE))

    def losses(self, pairs: Pairs) -> Tensor:
        sequences = pairs.sequences
        aligned_N = (sequences.field("policy_N") - sequences.field("collision_N")).detach()
        log_weight_G = (sequences.sums(aligned_N).view(-1, 2) / pairs.tokens_G2).sum(dim=1)
        if self.clamp:
            log_weight_G = log_weight_G.clamp(max=0)
        return -log_weight_G.exp() * logsigmoid(self.beta * pairs.margin_G)


@dataclass(frozen=True)
class Cringe(Pairwise):
    """Pairwise cringe: likelihood of the chosen response, and each rejected token against one the policy likes better.

    Formula: g [-log p(y_w) + a sum_t -log(exp(k_t) / (exp(k_t) + exp(l_t)))]; l_t: the logit of the rejected token, k_t
    that of another token, drawn by the policy's probabilities from its top k; g = s((c - M) / t), M = log p(y_w) -
    log p(y_l), without gradient; a = alpha, c = bias, t = temperature

    Paper: Xu et al. 2023 (arXiv 2312.16682). Logits enter by differences only, so log-probabilities do as well.

    TRL: absent.
    """

    alpha: float = 0.01
    """Weight of the cringe term."""
    bias: float = 0.0
    """The margin in nats at which a pair counts half."""
    temperature: float = 10.0
    """Softness of that gate, in nats."""
    top_k: int = 5
    """How many of the policy's likeliest tokens, the scored one left out, the other token is drawn from."""

    needs: ClassVar[frozenset[str]] = frozenset({"policy_N", "rival_N"})

    def problems(self) -> list[str]:
        return self.must(
            alpha=(self.alpha >= 0, "at least 0"),
            temperature=(self.temperature > 0, "over 0; 10 is usual"),
            top_k=(self.top_k >= 1, "at least 1"),
        )

    def rewards(self, pairs: Pairs) -> Tensor:
        return pairs.policy_G2

    def losses(self, pairs: Pairs) -> Tensor:
        sequences = pairs.sequences
        worse_N = softplus(sequences.field("policy_N") - sequences.field("rival_N"))
        cringe_G = sequences.sums(worse_N).view(-1, 2)[:, 1]
        gate_G = ((self.bias - difference(pairs.policy_G2)) / self.temperature).sigmoid().detach()
        return gate_G * (-pairs.policy_G2[:, 0] + self.alpha * cringe_G)
