"""Ranked lists of any length, best first. Groups of one batch may differ in length. Notation: pairwise.py."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, relu

from megadpo.objectives.base import Formula, Outcome, Sequences, sums_of
from megadpo.objectives.pairwise import POSITIVE, TIE

LIST_METRICS = ("rewards/best", "rewards/worst", "rewards/margins", "rewards/accuracies", "logps/best")


def table(values_S: Tensor, sequences: Sequences) -> Iterator[Tensor]:
    """[groups, K] for each length K that occurs: the values of the groups that have K responses."""
    sizes_G = sequences.offsets_G1.diff()
    for size in sizes_G.unique().tolist():
        starts = sequences.offsets_G1[:-1][sizes_G == size]
        yield values_S[starts[:, None] + torch.arange(size, device=values_S.device)]


def differences(values_S: Tensor, sequences: Sequences) -> Iterator[tuple[Tensor, Tensor]]:
    """([groups, pairs], bool [groups, pairs]) for each length: of every two responses the earlier one's value minus the
    later one's, and whether the order says something: not where both have the same score. Without scores it does.
    """
    scores_S = torch.full_like(values_S, math.nan) if sequences.scores_S is None else sequences.scores_S
    for value_GK, score_GK in zip(table(values_S, sequences), table(scores_S, sequences), strict=True):
        better, worse = torch.triu_indices(value_GK.shape[1], value_GK.shape[1], 1, device=values_S.device)
        yield value_GK[:, better] - value_GK[:, worse], score_GK[:, better] != score_GK[:, worse]


def list_metrics(policy_S: Tensor, reward_S: Tensor, tie_S: Tensor, sequences: Sequences) -> Tensor:
    """Sums of LIST_METRICS over the groups; accuracy: the fraction of a list's pairs in the right order, a tie half.
    Pairs with equal scores have no right order and do not count; a list of nothing else counts half. tie_S: rewards of
    a list that are nearer than the largest of its values are a tie."""
    first, last = sequences.offsets_G1[:-1], sequences.offsets_G1[1:] - 1
    right = reward_S.new_zeros(1)
    for (margin, ordered), tie_GK in zip(differences(reward_S, sequences), table(tie_S, sequences), strict=True):
        won = torch.where(margin.abs() < tie_GK.amax(dim=1, keepdim=True), 0.5, (margin > 0).double())
        count = ordered.sum(dim=1)
        right = right + torch.where(count > 0, (won * ordered).sum(dim=1) / count.clamp(min=1), 0.5).sum()
    return sums_of(reward_S[first], reward_S[last], reward_S[first] - reward_S[last], right.reshape(1), policy_S[first])


def plackett_luce(reward_S: Tensor, sequences: Sequences) -> Tensor:
    """Minus log-probability of all groups' orders: sum over places k of log sum_(j >= k) exp(r_j) - r_k."""
    loss = reward_S[:0].sum()  # 0, and the empty micro-batch has a graph too
    for reward_GK in table(reward_S, sequences):
        remaining_GK = reward_GK.flip(1).logcumsumexp(1).flip(1)
        loss = loss + (remaining_GK - reward_GK)[:, :-1].sum()
    return loss


@dataclass(frozen=True)
class PlackettLuceDPO(Formula):
    """DPO over ranked lists of any length.

    Formula: mean over lists of -sum_k log(exp(r_k) / sum_(j >= k) exp(r_j)), best first

    Paper: Rafailov et al. 2023, appendix A.3, equations 18 to 20 (arXiv 2305.18290). With two responses it is DPO. It
    has no ties: responses with the same score are taken in the data's order, and a list in which all have the same is
    left out when the data are read.

    TRL: absent.
    """

    beta: float = 0.1
    """How hard the policy is held to the reference."""

    responses: ClassVar[int | None] = None
    metrics: ClassVar[tuple[str, ...]] = LIST_METRICS

    def problems(self) -> list[str]:
        return self.must(beta=(self.beta > 0, POSITIVE))

    def __call__(self, sequences: Sequences) -> Outcome:
        policy_S = sequences.field("policy_S")
        reward_S = self.beta * (policy_S - sequences.field("reference_S"))
        metrics = list_metrics(policy_S, reward_S, torch.full_like(reward_S, TIE * self.beta), sequences)
        return Outcome(plackett_luce(reward_S, sequences), sequences.count(self.unit), metrics)


@dataclass(frozen=True)
class RRHF(Formula):
    """Rank responses to align with human feedback: hinges on average log-probabilities, with the best one's likelihood.

    Formula: mean over lists of sum_(i better than j) max(0, P_j - P_i) - a log p(y_best); P = log p(y) / |y|^c, a =
    alpha, c = length_penalty

    Paper: Yuan et al. 2023, equations 1 to 4 (arXiv 2304.05302), with a = c = 1. Of two responses with the same score
    none is better; data without scores have no ties.

    TRL: absent.
    """

    alpha: float = 1.0
    """Weight of the likelihood term."""
    length_penalty: float = 1.0
    """Power of the length that a log-probability is divided by."""

    needs: ClassVar[frozenset[str]] = frozenset()
    responses: ClassVar[int | None] = None
    metrics: ClassVar[tuple[str, ...]] = LIST_METRICS

    def problems(self) -> list[str]:
        return self.must(
            alpha=(self.alpha >= 0, "at least 0; 1 is the paper's"),
            length_penalty=(self.length_penalty >= 0, "at least 0; 1 is the paper's"),
        )

    def __call__(self, sequences: Sequences) -> Outcome:
        policy_S = sequences.field("policy_S")
        lengths_S = sequences.tokens_S.double().clamp(min=1) ** self.length_penalty
        score_S = policy_S / lengths_S
        loss = -self.alpha * policy_S[sequences.offsets_G1[:-1]].sum()
        for margin, ordered in differences(score_S, sequences):
            loss = loss + (relu(-margin) * ordered).sum()
        metrics = list_metrics(policy_S, score_S, TIE / lengths_S, sequences)
        return Outcome(loss, sequences.count(self.unit), metrics)
