"""A stream over any data: every group once per epoch, budgets kept, the same batches on every grid, ranks alike."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import MemoryStore

from megadpo.config import BatchConfig, Config, DataConfig, ModelConfig, ParallelConfig
from megadpo.convert.families import read_shape
from megadpo.data.packing import Bin, Budget
from megadpo.data.stream import Stream, choose_budget, open_streams
from megadpo.data.tokenize import TokenizedGroup

SIZES = (1, 2, 4, 8)


def store(lengths: list[tuple[int, list[int]]]) -> MemoryStore:
    """Groups of these lengths (prompt, responses); every token of a group is its number, so that it can be told."""
    groups = []
    for number, (prompt, responses) in enumerate(lengths):
        ids = tuple(np.full(length, number, dtype=np.int32) for length in responses)
        groups.append(TokenizedGroup(f"row {number}", np.full(prompt, number, dtype=np.int32), ids))
    return MemoryStore(groups)


group_lengths = st.tuples(st.integers(1, 40), st.lists(st.integers(1, 30), min_size=1, max_size=5))
stores = st.lists(group_lengths, min_size=1, max_size=40).map(store)


@settings(max_examples=60, deadline=None)
@given(
    stores,
    st.integers(1, 12),
    st.integers(0, 3),
    st.booleans(),
    st.sampled_from([None, 1, 2, 8]),
    st.sampled_from([None, 1, 3]),
)
def test_every_grid_trains_on_the_same_batches_within_the_budget(
    groups: MemoryStore, size: int, seed: int, share: bool, grain: int | None, most: int | None
) -> None:
    """Two epochs, step by step, on data-parallel sizes 1, 2, 4 and 8, with and without interleaving."""
    longest = choose_budget([groups], 1, 1, 1, BatchConfig(global_batch_size=1, share_prompt=share)).tokens
    budget = Budget(longest + 8 - longest % 8, most)
    streams = [Stream(groups, budget, ranks, 1 + ranks % 2, 0.01, seed, True, share, grain) for ranks in SIZES]
    seen: list[int] = []
    while len(seen) < 2 * len(groups):
        count = min(size, 2 * len(groups) - len(seen))
        steps = [sorted(one_step(stream, len(seen), count)) for stream in streams]
        assert all(step == steps[0] for step in steps), "data-parallel sizes see different global batches"
        seen += steps[0]
    for epoch in range(2):
        part = seen[epoch * len(groups) : (epoch + 1) * len(groups)]
        if len(groups) % size == 0:
            assert sorted(part) == list(range(len(groups)))
    assert sorted(seen) == sorted([*range(len(groups))] * 2)


def one_step(stream: Stream, consumed: int, count: int) -> list[int]:
    """The groups of a step, read from the tokens themselves; all that must hold within the step is held here."""
    bins = stream.bins(stream.next_groups(consumed, count))
    assert len({len(part) for part in bins}) == 1, "ranks with different numbers of micro-batches would hang"
    assert len(bins[0]) % stream.multiple == 0
    found = []
    for part in bins:
        for bin_, batch in zip(part, stream.pack(part, None), strict=True):
            rows = len(batch.tokens_T)
            assert batch.used <= rows <= stream.budget.tokens
            assert rows == stream.budget.tokens if stream.grain is None else rows % stream.grain == 0
            assert len(bin_) <= (stream.budget.groups or len(bin_))
            assert batch.groups == bin_
            # every response whole: its targets are its group's number, as often as it is long
            responses = [number for number in bin_ for _ in stream.store.group(number).response_ids]
            lengths = [len(r) for number in bin_ for r in stream.store.group(number).response_ids]
            assert batch.targets_N.tolist() == np.repeat(responses, lengths).tolist()
            found += bin_
    check_filling(stream, bins)
    return found


def check_filling(stream: Stream, bins: list[list[Bin]]) -> None:
    """What the log says of a step is what is in its micro-batches."""
    filling = stream.filling(bins)
    batches = [batch for part in bins for batch in stream.pack(part, None)]
    assert filling.rows == sum(batch.used for batch in batches)
    assert filling.padding_fraction == pytest.approx(1 - filling.rows / sum(len(batch.tokens_T) for batch in batches))
    groups = [stream.store.group(number) for batch in batches for number in batch.groups]
    repeated = sum((len(group.prompt_ids) - 1) * (len(group.response_ids) - 1) for group in groups)
    assert filling.prompt_tokens_saved == (repeated if stream.share else 0)
    assert 0 <= filling.load_imbalance <= stream.ranks - 1 + 1e-9


@settings(max_examples=30, deadline=None)
@given(stores, st.integers(1, 50), st.sampled_from(SIZES))
def test_a_resumed_stream_deals_the_same(groups: MemoryStore, consumed: int, ranks: int) -> None:
    """The cursor is one integer: a new stream at the same place gives the same micro-batches."""
    budget = choose_budget([groups], ranks, 1, 1, BatchConfig(global_batch_size=4))
    once, again = (Stream(groups, budget, ranks, 1, 0.01, 5, True) for _ in range(2))
    for _ in range(3):  # the first has a past, the second has none
        assert once.bins(once.next_groups(consumed, 4)) == again.bins(again.next_groups(consumed, 4))
        consumed += 4


# ---- lengths of real pairs


@pytest.fixture(scope="module")
def real(shared: Path) -> MemoryStore:
    """The pairs of dpo_en_demo.json at four characters a token, cut to 1024 tokens as data.max_length cuts them."""
    lengths = []
    for row in json.loads((shared / "data" / "dpo_en_demo.json").read_text()):
        prompt = sum(len(turn["value"]) for turn in row["conversations"]) // 4
        responses = [min(max(len(row[key]["value"]) // 4, 1), 1023) for key in ("chosen", "rejected")]
        lengths.append((min(max(prompt, 1), 1024 - max(responses)), responses))
    return store(lengths)


@pytest.mark.parametrize("model", ["stories260k", "large"])
@pytest.mark.parametrize(("ranks", "size"), [(2, 16), (2, 64), (4, 32), (4, 256), (8, 64), (8, 256)])
def test_ranks_get_the_same_cost_on_real_lengths(
    shared: Path, real: MemoryStore, ranks: int, size: int, model: str
) -> None:
    """At most 5 % over the mean in every full step of three epochs, with 8 pairs per rank or more: attention dear (a
    small model) or cheap. The cost is counted here once more."""
    cost = read_shape(shared / "models" / "stories260k").attended_pair_cost if model == "stories260k" else 1e-5
    config = Config(
        run_dir="",
        model=ModelConfig(""),
        data=DataConfig(()),
        parallel=ParallelConfig(data_parallel_size=ranks),
        batch=BatchConfig(global_batch_size=size),
    )
    [stream] = open_streams(config, [real], ranks, cost, fixed_length=True)
    for consumed in range(0, 3 * len(real) - size + 1, size):
        bins = stream.bins(stream.next_groups(consumed, size))
        costs = np.array([sum(counted(real, group, cost) for bin_ in part for group in bin_) for part in bins])
        imbalance = costs.max() / costs.mean() - 1
        assert imbalance <= 0.05, f"{imbalance:.1%} after {consumed} groups"
        assert stream.filling(bins).load_imbalance == pytest.approx(imbalance, abs=1e-9)


def counted(groups: MemoryStore, number: int, pair_cost: float) -> float:
    """Cost of a group: a row each, and every row a row attends to."""
    group = groups.groups[number]
    prompt, lengths = len(group.prompt_ids) - 1, [len(ids) for ids in group.response_ids]
    attended = sum(range(1, prompt + 1)) + sum(prompt + place for n in lengths for place in range(1, n + 1))
    return prompt + sum(lengths) + pair_cost * attended


def test_dealing_in_order_would_not_do(real: MemoryStore) -> None:
    """The 5 % above are a property of the dealing, not of the data."""
    stream = Stream(real, Budget(4096), 8, 1)
    groups = stream.next_groups(0, 64)
    in_order = [[tuple(part.tolist())] for part in np.split(groups, 8)]
    assert stream.filling(in_order).load_imbalance > 0.2


@pytest.mark.parametrize(("pipeline", "grain"), [(1, 2), (2, None)])
def test_streams_are_cut_where_no_pipeline_needs_one_length(real: MemoryStore, pipeline: int, grain: int) -> None:
    config = Config(
        run_dir="",
        model=ModelConfig(""),
        data=DataConfig(()),
        parallel=ParallelConfig(
            tensor_model_parallel_size=2, sequence_parallel=True, pipeline_model_parallel_size=pipeline
        ),
    )
    [stream] = open_streams(config, [real], 2, 0.0, fixed_length=False)
    assert stream.grain == grain
    filling = stream.filling(stream.bins(stream.next_groups(0, 64)))
    assert (filling.padding_fraction < 0.001) == (pipeline == 1)
    [fixed] = open_streams(config, [real], 2, 0.0, fixed_length=True)
    assert fixed.grain is None
