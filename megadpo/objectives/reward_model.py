"""Losses of reward models: `policy_S` is what a scalar head gives to each response, not a log-probability."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch.nn.functional import logsigmoid

from megadpo.objectives.base import Formula, Outcome, Sequences, sums_of
from megadpo.objectives.listwise import LIST_METRICS, list_metrics, plackett_luce
from megadpo.objectives.pairwise import difference

EQUAL = 1e-6
"""Rewards nearer than this count as a tie in the accuracy."""


@dataclass(frozen=True)
class BradleyTerry(Formula):
    """A reward model from pairs.

    Formula: -h(r_w - r_l - m) + c (r_w + r_l)^2; m = score_w - score_l with margin: true, else 0; c = centering

    Paper: Ouyang et al. 2022, equation 1 (arXiv 2203.02155); margin: Touvron et al. 2023, equation 2 (arXiv
    2307.09288); centring: Eisenstein et al. 2023, equation 2 (arXiv 2312.09244).

    TRL: its reward trainer, equal; centering is its center_rewards_coefficient.
    """

    margin: bool = False
    """Ask for as much difference as the data's scores have."""
    centering: float = 0.0
    """Weight that keeps rewards near 0; 0.01 is usual."""

    head: ClassVar[Literal["logprob", "scalar"]] = "scalar"
    metrics: ClassVar[tuple[str, ...]] = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({"scores_S"}) if self.margin else frozenset()

    def problems(self) -> list[str]:
        return self.must(centering=(self.centering >= 0, "at least 0; 0.01 is usual"))

    def __call__(self, sequences: Sequences) -> Outcome:
        reward_G2 = sequences.field("policy_S").view(-1, 2)
        margin_G = difference(reward_G2)
        asked_G = difference(sequences.field("scores_S").view(-1, 2)) if self.margin else torch.zeros_like(margin_G)
        loss = (-logsigmoid(margin_G - asked_G) + self.centering * reward_G2.sum(dim=1) ** 2).sum()
        won_G = torch.where(margin_G.abs() < EQUAL, 0.5, (margin_G > 0).double())
        return Outcome(loss, sequences.count(self.unit), sums_of(*reward_G2.unbind(1), margin_G, won_G))


@dataclass(frozen=True)
class PlackettLuceReward(Formula):
    """A reward model from ranked lists of any length.

    Formula: mean over lists of -sum_k log(exp(r_k) / sum_(j >= k) exp(r_j)) + c (sum_k r_k)^2, best first; c =
    centering

    Paper: the Plackett-Luce model, as in Rafailov et al. 2023, equation 18 (arXiv 2305.18290). With two responses it is
    Bradley-Terry. Ties as in plackett_luce.

    TRL: absent.
    """

    centering: float = 0.0
    """Weight that keeps rewards near 0; 0.01 is usual."""

    needs: ClassVar[frozenset[str]] = frozenset()
    head: ClassVar[Literal["logprob", "scalar"]] = "scalar"
    responses: ClassVar[int | None] = None
    metrics: ClassVar[tuple[str, ...]] = LIST_METRICS[:4]

    def problems(self) -> list[str]:
        return self.must(centering=(self.centering >= 0, "at least 0; 0.01 is usual"))

    def __call__(self, sequences: Sequences) -> Outcome:
        reward_S = sequences.field("policy_S")
        loss = plackett_luce(reward_S, sequences)
        if self.centering:
            sums_G = torch.segment_reduce(reward_S, "sum", lengths=sequences.offsets_G1.diff(), unsafe=True)
            loss = loss + self.centering * (sums_G**2).sum()
        metrics = list_metrics(reward_S, reward_S, torch.full_like(reward_S, EQUAL), sequences)[: len(self.metrics)]
        return Outcome(loss, sequences.count(self.unit), metrics)
