"""What a rank holds of the head, and what happens to a logit before the softmax."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch.distributed as dist


@dataclass(frozen=True)
class VocabShard:
    """This rank's rows of the head: global rows [start, start + V), of which those below `valid` are real tokens.

    Rows at and over `valid` pad the vocabulary: they have probability 0, are never multiplied and get no gradient.
    """

    start: int
    valid: int
    group: dist.ProcessGroup | None
    """Tensor-parallel group; None where the head is not split."""
    sequence_parallel: bool = False
    """hidden is split over the group by rows, in rank order; otherwise it is the same on every rank."""

    def __post_init__(self) -> None:
        if self.valid < 1 or self.start < 0:
            raise ValueError(f"start = {self.start}, valid = {self.valid}: need at least 0 and at least one real token")
        if self.group is None and self.start:
            raise ValueError(f"start = {self.start} without a group: one rank that holds the whole head starts at 0")

    @property
    def ranks(self) -> int:
        return 1 if self.group is None else self.group.size()

    def columns(self, rows: int) -> int:
        """How many of this rank's `rows` rows are real tokens; they come first."""
        return min(max(self.valid - self.start, 0), rows)


@dataclass(frozen=True)
class LogitOptions:
    """z = soft_cap * tanh(multiplier * logit / soft_cap) / temperature; without a soft cap, multiplier * logit /
    temperature. Log-probabilities and entropy are those of softmax(z)."""

    multiplier: float = 1.0
    soft_cap: float | None = None
    temperature: float = 1.0

    def __post_init__(self) -> None:
        for name in ("multiplier", "soft_cap", "temperature"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} = {value}: must be a finite number over 0")


PLAIN = LogitOptions()
