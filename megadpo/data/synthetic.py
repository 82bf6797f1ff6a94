"""Groups of random tokens with lengths as they are asked for: for measuring speed without data and tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from megadpo.data.kinds import Wanted
from megadpo.data.report import Tally
from megadpo.data.store import GroupStore, StoreWriter
from megadpo.data.tokenize import BODY, SCORED, TokenizedGroup

LIST = 4
"""Responses of a ranked list."""


@dataclass(frozen=True)
class Lengths:
    """Log-normal: mean tokens, and the standard deviation of the logarithm (0: all alike)."""

    prompt: int
    response: int
    spread: float
    most: int
    """Of prompt + one response. A response takes at most half of it, a prompt what the longer response leaves."""


def random_groups(count: int, lengths: Lengths, vocab: int, seed: int, wanted: Wanted) -> list[TokenizedGroup]:
    """Groups of the kind that is wanted; ids are drawn from 3 to the vocabulary's end."""
    rng = np.random.default_rng(seed)
    kind = wanted.kind or "pairs"
    responses = {"demonstrations": 1, "unpaired": 1, "pairs": 2, "lists": LIST}[kind]

    def length(mean: int, most: int) -> int:
        drawn = rng.lognormal(np.log(mean) - lengths.spread**2 / 2, lengths.spread)
        return int(np.clip(np.rint(drawn), 1, most))

    def ids(size: int) -> np.ndarray:
        return rng.integers(3, vocab, size).astype(np.int32)

    groups = []
    for number in range(count):
        answers = tuple(ids(length(lengths.response, lengths.most // 2)) for _ in range(responses))
        most = lengths.most - max(len(answer) for answer in answers)
        group = TokenizedGroup(f"random[{number}]", ids(length(lengths.prompt, most)), answers)
        if kind == "unpaired":
            group = replace(group, labels=(number % 2 == 0,))
        if wanted.scores:
            group = replace(group, scores=tuple(float(responses - place) for place in range(responses)))
        if wanted.body:
            group = replace(group, marks=tuple(np.full(len(answer), SCORED | BODY, np.uint8) for answer in answers))
        groups.append(group)
    return groups


def write_store(folder: Path, groups: Sequence[TokenizedGroup], vocab: int) -> GroupStore:
    """The groups as a store in an existing folder."""
    with StoreWriter(folder, vocab) as writer:
        writer.add(groups)
        writer.finish(replace(Tally().report("none", 0.0), groups=len(groups)))
    return GroupStore.open(folder)
