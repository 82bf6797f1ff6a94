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


def deal(
    tokens_G: np.ndarray, cost_G: np.ndarray, budget: Budget, ranks: int, multiple: int = 1
) -> list[list[Bin]]:
    """Bins of each rank, as positions into the arrays.

    tokens_G: int [G], stream tokens of each group, none over the budget. cost_G: float [G], what balances the bins.
    The number of bins is the smallest that the balanced filling finds, rounded up so that every rank has the same
    number and that number is a multiple of `multiple`; bins can be empty. Every group is in exactly one bin.
    """
    if len(tokens_G) and tokens_G.max() > budget.tokens:
        raise ValueError(f"a group of {tokens_G.max()} tokens is over the budget of {budget.tokens}")
    step = ranks * multiple
    fewest = -(-int(tokens_G.sum()) // budget.tokens)
    if budget.groups is not None:
        fewest = max(fewest, -(-len(tokens_G) // budget.groups))
    count = max(1, -(-fewest // step)) * step
    while (bins := _fill(tokens_G, cost_G, budget, count)) is None:
        count += step
    return _share(bins, cost_G, ranks)


def _fill(tokens_G: np.ndarray, cost_G: np.ndarray, budget: Budget, count: int) -> list[Bin] | None:
    """Largest cost first, into the cheapest bin that has room; None where some group finds no room."""
    members: list[list[int]] = [[] for _ in range(count)]
    room = np.full(count, budget.tokens, dtype=np.int64)
    slots = np.full(count, budget.groups if budget.groups is not None else len(tokens_G), dtype=np.int64)
    cost = np.zeros(count)
    for group in np.lexsort((np.arange(len(cost_G)), -cost_G)):
        fits = (room >= tokens_G[group]) & (slots > 0)
        if not fits.any():
            return None
        target = int(np.where(fits, cost, np.inf).argmin())
        members[target].append(int(group))
        room[target] -= tokens_G[group]
        slots[target] -= 1
        cost[target] += cost_G[group]
    return [tuple(sorted(bin_)) for bin_ in members]


def _share(bins: list[Bin], cost_G: np.ndarray, ranks: int) -> list[list[Bin]]:
    """The same number of bins to every rank, costliest first to the rank with the least."""
    each = len(bins) // ranks
    dealt: list[list[Bin]] = [[] for _ in range(ranks)]
    load = np.zeros(ranks)
    costs = [float(cost_G[list(bin_)].sum()) for bin_ in bins]
    for index in sorted(range(len(bins)), key=lambda i: (-costs[i], i)):
        open_ranks = np.array([len(part) < each for part in dealt])
        rank = int(np.where(open_ranks, load, np.inf).argmin())
        dealt[rank].append(bins[index])
        load[rank] += costs[index]
    return dealt
