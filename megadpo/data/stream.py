"""What every step trains on: the same groups whatever the grid, dealt to the ranks in packed micro-batches."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from megadpo.config import BatchConfig, Config
from megadpo.config.check import row_multiple
from megadpo.data.batch import PackedBatch, pack, stream_tokens
from megadpo.data.cost import Cost
from megadpo.data.mismatch import MismatchedStore, mismatched
from megadpo.data.packing import Bin, Budget, deal, take
from megadpo.data.store import GroupStore
from megadpo.errors import ConfigError

MOST_ROWS = 8192
"""Of a stream whose budget is chosen, unless a group is longer."""


@dataclass(frozen=True)
class Filling:
    """How a global batch fills the streams of all ranks."""

    rows: int
    """Rows that are not padding."""
    padding_fraction: float
    """Of all rows."""
    prompt_tokens_saved: int
    """Rows that repeated prompts would have taken."""
    load_imbalance: float
    """Cost of the costliest rank over the mean of all, minus 1; padding not counted."""


@dataclass(frozen=True)
class Stream:
    """A store read in a fixed order. The place in it is one integer: the groups consumed so far."""

    store: GroupStore | MismatchedStore
    budget: Budget
    ranks: int
    """Data-parallel size."""
    multiple: int
    """The number of micro-batches per rank is a multiple of this (interleaved pipelines need it)."""
    cost: Cost = field(default_factory=Cost)
    """Balances the ranks."""
    seed: int = 0
    shuffle: bool = False
    share: bool = True
    """Whether a prompt stands once for all its responses."""
    grain: int | None = None
    """Streams end after their last group, rounded up to a multiple of this; None: all are as long as the budget."""
    scalar: bool = False
    """Whether it is for a reward model (data/batch.py)."""

    @cached_property
    def tokens_G(self) -> np.ndarray:
        """int64, rows that each group of the store takes."""
        return stream_tokens(self.store, self.share, self.scalar)

    @cached_property
    def cost_G(self) -> np.ndarray:
        """float64, what each group of the store costs, in units of one row's linear layers."""
        return self.cost.of(self.store, self.share, self.scalar)

    @cached_property
    def repeated_G(self) -> np.ndarray:
        """int64, rows that each group would take with its prompt once per response."""
        return stream_tokens(self.store, share=False, scalar=self.scalar)

    def next_groups(self, consumed: int, count: int) -> np.ndarray:
        """int64 [count]: store numbers of the next groups; independent of the grid."""
        return take(len(self.store), consumed, count, self.seed, self.shuffle)

    def groups_within(self, count: int | None) -> np.ndarray:
        """int64, ascending: the groups among the first `count` of a run; None: all."""
        if count is None or count >= len(self.store):
            return np.arange(len(self.store))
        return np.sort(self.next_groups(0, count))

    def bins(self, groups: np.ndarray) -> list[list[Bin]]:
        """For each rank its micro-batches, as tuples of store numbers."""
        dealt = deal(self.tokens_G[groups], self.cost_G[groups], self.budget, self.ranks, self.multiple)
        return [[tuple(int(groups[i]) for i in bin_) for bin_ in part] for part in dealt]

    def batches(self, groups: np.ndarray, rank: int, reference: np.ndarray | None) -> list[PackedBatch]:
        """This data-parallel rank's micro-batches of these groups, on the CPU."""
        return self.pack(self.bins(groups)[rank], reference)

    def pack(self, bins: list[Bin], reference: np.ndarray | None) -> list[PackedBatch]:
        """A micro-batch of each bin, on the CPU."""
        return [pack(self.store, bin_, self.length(bin_), reference, self.share, self.scalar) for bin_ in bins]

    def length(self, bin_: Bin) -> int:
        """Rows of a bin's stream, padding included."""
        if self.grain is None:
            return self.budget.tokens
        return _round_up(max(int(self.tokens_G[list(bin_)].sum()), 1), self.grain)

    def filling(self, bins: list[list[Bin]]) -> Filling:
        """What to tell the user of a global batch, dealt as `bins`."""
        groups = [group for part in bins for bin_ in part for group in bin_]
        rows = int(self.tokens_G[groups].sum())
        every = sum(self.length(bin_) for part in bins for bin_ in part)
        repeated = int(self.repeated_G[groups].sum())
        cost = np.array([sum(self.cost_G[list(bin_)].sum() for bin_ in part) for part in bins])
        return Filling(rows, 1 - rows / every, repeated - rows, float(cost.max() / cost.mean() - 1))


@dataclass(frozen=True)
class Scored:
    """A stream of groups with, where the objective needs one, the reference's log-probabilities."""

    stream: Stream
    column: np.ndarray | None
    """float64 [S of the store]; None with a resident reference, or without one."""
    mismatched: Scored | None = None
    """For objectives that need `mismatched_kl`: the responses of the run's groups, in the run's order, behind other
    prompts of their batch (the whole store is one batch in evaluation)."""

    def mismatched_batches(self, consumed: int, count: int, rank: int) -> list[PackedBatch] | None:
        """This data-parallel rank's part of the global batch at a place of the run."""
        if self.mismatched is None:
            return None
        groups = np.arange(consumed, consumed + count)
        return self.mismatched.stream.batches(groups, rank, self.mismatched.column)


def mismatched_stream(stream: Stream, groups_R: np.ndarray, batch: int) -> Stream:
    """Responses behind other prompts of their batch (see `mismatch.mismatched`), in the order of the run's groups."""
    assert isinstance(stream.store, GroupStore)
    return replace(stream, store=mismatched(stream.store, groups_R, batch, stream.seed), shuffle=False)


def open_streams(config: Config, stores: list[GroupStore], ranks: int, cost: Cost, fixed_length: bool) -> list[Stream]:
    """A run's stores as streams, with one token budget for all.

    ranks: data-parallel size. cost: see Stream. fixed_length: whether the device wants every stream equally long;
    a pipeline always does, as its stages exchange messages of one size. Raises ConfigError, see `choose_budget`.
    """
    grid = config.parallel
    pipeline, virtual = grid.pipeline_model_parallel_size, grid.virtual_pipeline_model_parallel_size
    multiple_of = row_multiple(config.model, grid)
    scalar = config.objective.head == "scalar"
    budget = choose_budget(stores, ranks, pipeline, multiple_of, config.batch, scalar)
    return [
        Stream(
            store,
            budget,
            ranks,
            multiple=pipeline if virtual else 1,
            cost=cost,
            seed=config.seed,
            shuffle=config.train.shuffle,
            share=config.batch.share_prompt,
            scalar=scalar,
            grain=None if fixed_length or pipeline > 1 else multiple_of,
        )
        for store in stores
    ]


def choose_budget(
    stores: list[GroupStore],
    ranks: int,
    pipeline: int,
    multiple_of: int,
    batch: BatchConfig,
    scalar: bool = False,
) -> Budget:
    """The token budget of a run: what was asked for, or a choice from the data.

    Chosen: a rank's share of a step, cut into 2 micro-batches per pipeline stage so that the pipeline fills, with an
    eighth of room for packing; at least the longest group, at most 8192 unless that is longer. A part that 2 or 3 such
    streams would hold is cut evenly, or the last would be nearly empty. Rounded up to `multiple_of` (sequence
    parallelism splits the stream, FP8 takes rows by the block). Raises ConfigError where a group is longer than asked.
    """
    tokens = [stream_tokens(store, batch.share_prompt, scalar) for store in stores]
    return budget_for(tokens, ranks, pipeline, multiple_of, batch)


def budget_for(tokens: list[np.ndarray], ranks: int, pipeline: int, multiple_of: int, batch: BatchConfig) -> Budget:
    """`choose_budget`, where only the rows of each store's groups are known."""
    asked, most_groups = batch.micro_batch_tokens, batch.micro_batch_size
    longest = max(int(t.max()) for t in tokens)
    if asked is not None:
        if asked % multiple_of:
            raise ConfigError(
                f"batch.micro_batch_tokens = {asked}: must be a multiple of {multiple_of} (sequence parallelism splits "
                "the stream over the tensor-parallel ranks, FP8 takes rows by the block); "
                f"{_round_up(asked, multiple_of)} would do"
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
    wanted = max(per_micro_batch, 1) * mean * 1.125
    streams = math.ceil(wanted / MOST_ROWS)
    # of more streams, an empty last one costs less than the room in each
    wanted = wanted / streams if streams <= 3 else MOST_ROWS
    return Budget(_round_up(max(int(wanted), longest), math.lcm(multiple_of, 16)), most_groups)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
