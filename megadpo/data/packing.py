"""From lengths to micro-batches: which groups share a stream, and which rank gets it. numpy only, deterministic.

A bin is the list of groups of one micro-batch. Every data-parallel rank gets the same number of bins in a step.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

Bin = tuple[int, ...]


@dataclass(frozen=True)
class Budget:
    """What one micro-batch may hold: stream tokens, and (where not None) groups."""

    tokens: int
    groups: int | None = None


def epoch_order(groups: int, seed: int, epoch: int, shuffle: bool) -> np.ndarray:
    """int64 [groups]: the order of one epoch, a function of its arguments alone."""
    if not shuffle:
        return np.arange(groups)
    return np.random.default_rng([seed, epoch]).permutation(groups)


def take(groups: int, consumed: int, count: int, seed: int, shuffle: bool) -> np.ndarray:
    """int64 [count]: the next groups of a run that has consumed so many. Epochs follow each other without a gap, so
    every group is used once per epoch whatever the batch size."""
    picked = []
    while count > 0:
        epoch, start = divmod(consumed, groups)
        part = epoch_order(groups, seed, epoch, shuffle)[start : start + count]
        picked.append(part)
        consumed += len(part)
        count -= len(part)
    return np.concatenate(picked) if picked else np.zeros(0, dtype=np.int64)


def deal(tokens_G: np.ndarray, cost_G: np.ndarray, budget: Budget, ranks: int, multiple: int = 1) -> list[list[Bin]]:
    """Bins of each rank, as positions into the arrays.

    tokens_G: int [G], stream tokens of each group, none over the budget. cost_G: float [G], what is balanced: first
    over the ranks, then over the bins of each. Every rank gets the same number of bins, the smallest that its balanced
    filling finds, rounded up to a multiple of `multiple`; bins can be empty. Every group is in exactly one bin.
    """
    if len(tokens_G) and tokens_G.max() > budget.tokens:
        raise ValueError(f"a group of {tokens_G.max()} tokens is over the budget of {budget.tokens}")
    unlimited = np.full(ranks, np.iinfo(np.int64).max)
    shares = _spread(np.arange(len(tokens_G)), tokens_G, cost_G, unlimited, unlimited)
    assert shares is not None
    fewest = max(-(-int(tokens_G[share].sum()) // budget.tokens) for share in shares)
    if budget.groups is not None:
        fewest = max(fewest, *(-(-len(share) // budget.groups) for share in shares))
    count = max(1, -(-fewest // multiple)) * multiple
    while (dealt := _bins(shares, tokens_G, cost_G, budget, count)) is None:
        count += multiple
    return dealt


def _bins(
    shares: list[np.ndarray], tokens_G: np.ndarray, cost_G: np.ndarray, budget: Budget, count: int
) -> list[list[Bin]] | None:
    """Each rank's share in `count` bins; None where some share does not fit."""
    room = np.full(count, budget.tokens, dtype=np.int64)
    slots = np.full(count, np.iinfo(np.int64).max if budget.groups is None else budget.groups)
    dealt = []
    for share in shares:
        bins = _spread(share, tokens_G, cost_G, room, slots)
        if bins is None:
            return None
        dealt.append([tuple(bin_.tolist()) for bin_ in bins])
    return dealt


def _spread(
    groups: np.ndarray, tokens_G: np.ndarray, cost_G: np.ndarray, room: np.ndarray, slots: np.ndarray
) -> list[np.ndarray] | None:
    """Groups over places, the costliest first, each to the cheapest place with room for its tokens and a free slot.

    Graham 1969, longest processing time first: at most 4/3 of the best possible load. None where a group finds no room.
    """
    members: list[list[int]] = [[] for _ in room]
    room, slots, load = room.copy(), slots.copy(), np.zeros(len(room))
    for group in groups[np.lexsort((groups, -cost_G[groups]))]:
        fits = (room >= tokens_G[group]) & (slots > 0)
        if not fits.any():
            return None
        place = int(np.where(fits, load, np.inf).argmin())
        members[place].append(int(group))
        room[place] -= tokens_G[group]
        slots[place] -= 1
        load[place] += cost_G[group]
    return [np.array(sorted(place), dtype=np.int64) for place in members]
