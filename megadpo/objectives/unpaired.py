"""Single responses with a label, desirable or not: a group has one response. Notation: pairwise.py; z: label."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from megadpo.objectives.base import Formula, Outcome, Sequences, Unit, sums_of
from megadpo.objectives.pairwise import POSITIVE

LABELLED = frozenset({"reference_S", "labels_S"})


class Unpaired(Formula):
    """A mean over responses of `losses`."""

    needs: ClassVar[frozenset[str]] = LABELLED
    responses: ClassVar[int | None] = 1
    unit: ClassVar[Unit] = "responses"
    metrics: ClassVar[tuple[str, ...]] = (
        "rewards/chosen",
        "rewards/rejected",
        "desirable",
        "undesirable",
        "logps/response",
    )
    shares: ClassVar[Mapping[str, str]] = MappingProxyType(
        {"rewards/chosen": "desirable", "rewards/rejected": "undesirable"}
    )

    def losses(self, reward_S: Tensor, good_S: Tensor, sequences: Sequences) -> Tensor:
        """float64 [S]; reward_S: r, float64."""
        raise NotImplementedError

    def __call__(self, sequences: Sequences) -> Outcome:
        policy_S, good_S = sequences.field("policy_S"), sequences.field("labels_S")
        beta: float = self.beta  # type: ignore[attr-defined]
        reward_S = beta * (policy_S - sequences.field("reference_S"))
        loss = self.losses(reward_S, good_S, sequences).sum()
        zero_S = torch.zeros_like(reward_S)
        metrics = sums_of(
            torch.where(good_S, reward_S, zero_S), torch.where(good_S, zero_S, reward_S), good_S, ~good_S, policy_S
        )
        return Outcome(loss, sequences.count(self.unit), metrics)


@dataclass(frozen=True)
class KTO(Unpaired):
    """Kahneman-Tversky optimisation: each response's reward against what the policy's drift gives to any response.

    Formula: desirable: l_d (1 - s(r - b z)); undesirable: l_u (1 - s(b z - r)); z = max(0, mean over the global batch
    of log p(y'|x) - log q(y'|x)), y' a response to another prompt, without gradient

    Paper: Ethayarajh et al. 2024, equations 7 and 8 (arXiv 2402.01306). Weights: l_d n_d / (l_u n_u) in [1, 4/3] is
    advised for n_d desirable and n_u undesirable responses.

    TRL: `kto` clamps the mean of the ranks' micro-batch means; here z is one estimate, sum over count of the global
    batch.
    """

    beta: float = 0.1
    """How hard the policy is held to the reference."""
    desirable_weight: float = 1.0
    """l_d"""
    undesirable_weight: float = 1.0
    """l_u"""

    needs: ClassVar[frozenset[str]] = LABELLED | {"mismatched_kl"}

    def problems(self) -> list[str]:
        return self.must(
            beta=(self.beta > 0, POSITIVE),
            desirable_weight=(self.desirable_weight >= 0, "at least 0"),
            undesirable_weight=(self.undesirable_weight >= 0, "at least 0"),
        )

    def losses(self, reward_S: Tensor, good_S: Tensor, sequences: Sequences) -> Tensor:
        drift = self.beta * sequences.field("mismatched_kl").detach().clamp(min=0)
        good, bad = (drift - reward_S).sigmoid(), (reward_S - drift).sigmoid()
        return torch.where(good_S, self.desirable_weight * good, self.undesirable_weight * bad)


@dataclass(frozen=True)
class BCOUnpaired(Unpaired):
    """Binary classifier optimisation of single responses.

    Formula: desirable: -h(r - d); undesirable: -h(d - r); d = (mean r of the desirable + mean r of the undesirable) / 2
    over the global batch, without gradient. A batch with one kind only has d = that kind's mean

    Paper: Jung et al. 2024 (arXiv 2404.04656). Its d is a running mean over steps; here it is this batch's, exactly.
    Its density-ratio weights for prompts that differ between the two kinds are not here.

    TRL: its BCO trainer (gone since) had a running mean of all rewards together, which leans to the more frequent
    kind.
    """

    beta: float = 0.1
    """How hard the policy is held to the reference."""

    whole_batch: ClassVar[bool] = True

    def problems(self) -> list[str]:
        return self.must(beta=(self.beta > 0, POSITIVE))

    def losses(self, reward_S: Tensor, good_S: Tensor, sequences: Sequences) -> Tensor:
        kinds = [reward_S.detach()[good_S], reward_S.detach()[~good_S]]
        means = [kind.mean() for kind in kinds if len(kind)]
        shift = torch.stack(means).mean() if means else reward_S.new_zeros(())
        return -torch.where(good_S, logsigmoid(reward_S - shift), logsigmoid(shift - reward_S))


@dataclass(frozen=True)
class APOZeroUnpaired(Unpaired):
    """APO-zero of single responses.

    Formula: desirable: l_d (1 - s(r)); undesirable: l_u s(r)

    Paper: D'Oosterlinck et al. 2024, equation 7, its two terms apart (arXiv 2408.06266).

    TRL: `apo_zero_unpaired` of its KTO trainer, equal.
    """

    beta: float = 0.1
    """How hard the policy is held to the reference."""
    desirable_weight: float = 1.0
    """l_d"""
    undesirable_weight: float = 1.0
    """l_u"""

    def problems(self) -> list[str]:
        return self.must(
            beta=(self.beta > 0, POSITIVE),
            desirable_weight=(self.desirable_weight >= 0, "at least 0"),
            undesirable_weight=(self.undesirable_weight >= 0, "at least 0"),
        )

    def losses(self, reward_S: Tensor, good_S: Tensor, sequences: Sequences) -> Tensor:
        good, bad = self.desirable_weight * (-reward_S).sigmoid(), self.undesirable_weight * reward_S.sigmoid()
        return torch.where(good_S, good, bad)
