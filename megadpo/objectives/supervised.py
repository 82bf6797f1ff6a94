"""Supervised fine-tuning: a group's one response is a demonstration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from megadpo.objectives.base import Outcome, Sequences


@dataclass(frozen=True)
class SFT:
    """L = -sum of log p(response token) / number of response tokens, over the global batch.

    The mean is over tokens, so a long answer weighs more than a short one, as in next-token pretraining.
    """

    needs_reference: ClassVar[bool] = False
    responses: ClassVar[int | None] = 1
    metrics: ClassVar[tuple[str, ...]] = ("logps/response",)

    def problems(self) -> list[str]:
        return []

    def __call__(self, sequences: Sequences) -> Outcome:
        total = sequences.policy_S.sum()
        count = sequences.tokens_S.sum().to(torch.int)
        return Outcome(-total, count, total.detach().reshape(1))
