"""Supervised fine-tuning: a group's first response is a demonstration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from megadpo.objectives.base import Formula, Outcome, Sequences, Unit, sums_of


@dataclass(frozen=True)
class SFT(Formula):
    """Supervised fine-tuning: the likelihood of a demonstration; inside a mix, of the chosen response.

    Formula: minus the sum of log p(y) / the sum of |y|, over the global batch

    Paper: the usual next-token loss. The mean is over tokens, so a long answer weighs more than a short one. Which
    tokens are scored (the answer, all turns, all tokens) is the data's business: |y| counts the scored ones.

    TRL: `sft`, over one micro-batch of one rank; here over the global batch.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    responses: ClassVar[int | None] = 1
    unit: ClassVar[Unit] = "first_tokens"
    metrics: ClassVar[tuple[str, ...]] = ("logps/response",)

    def __call__(self, sequences: Sequences) -> Outcome:
        policy_G = sequences.field("policy_S")[sequences.offsets_G1[:-1]]
        return Outcome(-policy_G.sum(), sequences.count(self.unit), sums_of(policy_G))
