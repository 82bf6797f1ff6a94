"""What every step trains on: the same groups whatever the grid, dealt to the ranks in packed micro-batches."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from megadpo.config import BatchConfig
from megadpo.data.batch import PackedBatch, attention_area, pack, stream_tokens
from megadpo.data.packing import Bin, Budget, deal, take
from megadpo.data.store import GroupStore
from megadpo.errors import ConfigError


@dataclass(frozen=True)
class Stream:
    """A store read in a fixed order. The place in it is one integer: the groups consumed so far."""

    store: GroupStore
    budget: Budget
    ranks: int
    """Data-parallel size."""
    multiple: int
    """The number of micro-batches per rank is a multiple of this (interleaved pipelines need it)."""
    pair_cost: float = 0.0
    """Cost of one attended pair of rows, in units of the linear layers' cost of one row; balances the ranks."""
    seed: int = 0
    shuffle: bool = False
    share: bool = True
    """Whether a prompt stands once for all its responses."""

    def next_groups(self, consumed: int, count: int) -> np.ndarray:
        """int64 [count]: store numbers of the next groups; independent of the grid."""
        return take(len(self.store), consumed, count, self.seed, self.shuffle)

    def bins(self, groups: np.ndarray) -> list[list[Bin]]:
        """For each rank its micro-batches, as tuples of store numbers."""
        tokens = stream_tokens(self.store, self.share)[groups]
        cost = tokens + self.pair_cost * attention_area(self.store, self.share)[groups]
        dealt = deal(tokens, cost, self.budget, self.ranks, self.multiple)
        return [[tuple(int(groups[i]) for i in bin_) for bin_ in part] for part in dealt]

    def batches(self, groups: np.ndarray, rank: int, reference: np.ndarray | None) -> list[PackedBatch]:
        """This data-parallel rank's micro-batches of these groups, on the CPU."""
        return [pack(self.store, bin_, self.budget.tokens, reference, self.share) for bin_ in self.bins(groups)[rank]]


def choose_budget(
    stores: list[GroupStore],
    ranks: int,
    pipeline: int,
    multiple_of: int,
    batch: BatchConfig,
) -> Budget:
    """The token budget of a run: what was asked for, or a choice from the data.

    Chosen: a rank's share of a step, cut into 2 micro-batches per pipeline stage so that the pipeline fills, with an
    eighth of room for packing; at least the longest group, at most 8192 unless that is longer. Rounded up to
    `multiple_of` (sequence parallelism splits the stream). Raises ConfigError where a group is longer than asked.
    """
    asked, most_groups = batch.micro_batch_tokens, batch.micro_batch_size
    tokens = [stream_tokens(store, batch.share_prompt) for store in stores]
    longest = max(int(t.max()) for t in tokens)
    if asked is not None:
        if asked % multiple_of:
            raise ConfigError(
                f"batch.micro_batch_tokens = {asked}: must be a multiple of {multiple_of} (sequence parallelism "
                f"splits the stream over the tensor-parallel ranks); {_round_up(asked, multiple_of)} would do"
            )
        if longest > asked:
            raise ConfigError(
                f"batch.micro_batch_tokens = {asked}: the longest group takes {longest} tokens; raise it to at least "
                f"{_round_up(longest, multiple_of)} or lower data.max_length"
            )
        return Budget(asked, most_groups)
    mean = float(tokens[0].mean())
    per_micro_batch = batch.global_batch_size / ranks / (2 * pipeline if pipeline > 1 else 1)
    if most_groups is not None:
        per_micro_batch = min(per_micro_batch, most_groups)
    wanted = min(int(max(per_micro_batch, 1) * mean * 1.125), 8192)
    return Budget(_round_up(max(wanted, longest), math.lcm(multiple_of, 16)), most_groups)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
