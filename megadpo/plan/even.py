"""Micro-batches for walking: groups that are all alike, laid out by the code that lays out real ones."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megadpo.data.batch import PackedBatch, pack
from megadpo.data.tokenize import TokenizedGroup
from megadpo.objectives import Objective


@dataclass(frozen=True)
class Load:
    """What a data-parallel rank works on in one step."""

    tokens: int
    """Rows of a micro-batch's stream."""
    scored: int
    """Scored tokens in it."""
    micro_batches: int
    groups: int = 1
    """In a micro-batch; its rows that are not scored are their prompts."""


@dataclass(frozen=True)
class EvenStore:
    """The part of a GroupStore that packing uses."""

    groups: tuple[TokenizedGroup, ...]
    labels_S: np.ndarray | None
    scores_S: np.ndarray | None
    bodies: bool = False

    @property
    def offsets(self) -> np.ndarray:
        return np.cumsum([0, *(len(group.response_ids) for group in self.groups)])

    def group(self, number: int) -> TokenizedGroup:
        return self.groups[number]


def even_batch(load: Load, objective: Objective, column: bool) -> PackedBatch:
    """One micro-batch of `load`, real, on the CPU; the micro-batches of a step may all be this one.

    column: with log-probabilities of a precomputed reference. The tokens are 0, the numbers do not matter.
    """
    responses = objective.responses or 4
    scalar = objective.head == "scalar"
    assert load.scored >= load.groups * responses, "every response has a scored token"
    prompts = max((load.tokens - load.scored) // load.groups + (0 if scalar else 1), 1)
    lengths = np.full(load.groups * responses, load.scored // (load.groups * responses))
    lengths[: load.scored - int(lengths.sum())] += 1
    groups = tuple(
        TokenizedGroup(
            "even", np.zeros(prompts, np.int32), tuple(np.zeros(int(n), np.int32) for n in lengths[at : at + responses])
        )
        for at in range(0, len(lengths), responses)
    )
    ranks = np.tile(np.arange(responses), load.groups)
    store = EvenStore(
        groups,
        labels_S=np.arange(len(lengths)) % 2 == 0 if "labels_S" in objective.needs else None,
        scores_S=-ranks.astype(np.float32) if "scores_S" in objective.needs else None,
        bodies="body_N" in objective.needs,
    )
    reference = np.zeros(len(lengths)) if column else None
    return pack(store, range(load.groups), load.tokens, reference, scalar=scalar)  # type: ignore[arg-type]
