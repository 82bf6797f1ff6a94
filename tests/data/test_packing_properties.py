"""A stream over any data: every group once per epoch, budgets kept, the same batches on every grid, ranks alike."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import MemoryStore

from megadpo.config import BatchConfig, Config, DataConfig, ModelConfig, ParallelConfig
from megadpo.convert.families import read_shape
from megadpo.convert.shape import ModelShape, Window
from megadpo.data.cost import Cost
from megadpo.data.packing import Bin, Budget
from megadpo.data.stream import Stream, choose_budget, open_streams
from megadpo.data.tokenize import BODY, SCORED, TokenizedGroup
from megadpo.model.flops import group_cost

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
    streams = [
        Stream(groups, budget, ranks, 1 + ranks % 2, Cost(0.01, 2.0), seed, True, share, grain) for ranks in SIZES
    ]
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
    once, again = (Stream(groups, budget, ranks, 1, Cost(0.01, 2.0), 5, True) for _ in range(2))
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


LLAMA_1B = ModelShape("llama", 16, 2048, 8192, 32, 8, 64, 128256, 131072, 1e-5, 5e5, None, tied=True)
"""Llama 3.2 1B: its head costs as much as a quarter of its layers."""


@pytest.mark.parametrize("model", ["stories260k", "llama 1b", "windows"])
@pytest.mark.parametrize(("ranks", "size"), [(2, 16), (2, 64), (4, 32), (4, 256), (8, 64), (8, 256)])
def test_ranks_get_the_same_cost_on_real_lengths(
    shared: Path, real: MemoryStore, ranks: int, size: int, model: str
) -> None:
    """At most 5 % over the mean in every full step of three epochs, with 8 pairs per rank or more: attention dear (a
    small model), the head dear, most layers with a window. The cost is counted here once more."""
    shape = read_shape(shared / "models" / "stories260k") if model == "stories260k" else LLAMA_1B
    if model == "windows":
        shape = replace(shape, vocab_size=256, window=Window(128, tuple(layer % 4 > 0 for layer in range(16))))
    config = Config(
        run_dir="",
        model=ModelConfig(""),
        data=DataConfig(()),
        parallel=ParallelConfig(data_parallel_size=ranks),
        batch=BatchConfig(global_batch_size=size),
    )
    [stream] = open_streams(config, [real], ranks, group_cost(shape), fixed_length=True)
    cost_G = np.array([counted(real, group, shape) for group in range(len(real))])
    for consumed in range(0, 3 * len(real) - size + 1, size):
        bins = stream.bins(stream.next_groups(consumed, size))
        costs = np.array([sum(cost_G[group] for bin_ in part for group in bin_) for part in bins])
        imbalance = costs.max() / costs.mean() - 1
        assert imbalance <= 0.05, f"{imbalance:.1%} after {consumed} groups"
        assert stream.filling(bins).load_imbalance == pytest.approx(imbalance, abs=1e-9)


def counted(groups: MemoryStore, number: int, shape: ModelShape) -> float:
    """Multiplications of a group in the layers (Llama's), for every row every row that it attends to, and in the
    head."""
    group, hidden, heads = groups.groups[number], shape.hidden_size, shape.num_attention_heads * shape.kv_channels
    prompt, lengths = len(group.prompt_ids) - 1, [len(ids) for ids in group.response_ids]
    keys = shape.num_query_groups * shape.kv_channels
    row = hidden * heads + 2 * hidden * keys + heads * hidden + 3 * hidden * shape.ffn_hidden_size
    places = np.concatenate([np.arange(1, prompt + 1), *(np.arange(prompt + 1, prompt + n + 1) for n in lengths)])
    total = sum(lengths) * hidden * shape.vocab_size
    for layer in range(shape.num_layers):
        window = shape.window.size if shape.window is not None and shape.window.layers[layer] else len(places)
        total += row * len(places) + 2 * heads * int(np.minimum(places, window).sum())
    return total


def test_only_what_is_scored_meets_the_head() -> None:
    """Marked tokens by their marks, a reward model's responses once each."""
    ids = [np.arange(n, dtype=np.int32) for n in (4, 3, 5)]
    marks = (np.array([SCORED, BODY, SCORED | BODY]), np.array([0, 0, SCORED, SCORED, SCORED]))
    groups = MemoryStore([TokenizedGroup("marked", ids[0], (ids[1], ids[2]), marks=marks)])
    assert groups.scored_lengths.tolist() == [2, 3]
    assert Cost(scored=10).of(groups) == 3 + 3 + 5 + 10 * 5
    assert Cost(scored=10).of(groups, share=False) == 2 * 3 + 3 + 5 + 10 * 5
    assert Cost(scored=10).of(groups, scalar=True) == 4 + 3 + 5 + 10 * 2


@pytest.mark.parametrize("ranks", SIZES)
@pytest.mark.parametrize(("pairs", "mean", "worst"), [(8, 0.21, 0.46), (16, 0.16, 0.32), (64, 0.08, 0.13)])
def test_padding_on_real_lengths(real: MemoryStore, ranks: int, pairs: int, mean: float, worst: float) -> None:
    """What docs/packing.md says of streams that are all equally long, over the full steps of three epochs; so many
    pairs per rank and update."""
    size = pairs * ranks
    stream = Stream(
        real, choose_budget([real], ranks, 1, 1, BatchConfig(global_batch_size=size)), ranks, 1, shuffle=True
    )
    starts = range(0, 3 * len(real) - size + 1, size)
    padding = [stream.filling(stream.bins(stream.next_groups(at, size))).padding_fraction for at in starts]
    assert np.mean(padding) <= mean
    assert max(padding) <= worst


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
    [stream] = open_streams(config, [real], 2, Cost(), fixed_length=False)
    assert stream.grain == grain
    filling = stream.filling(stream.bins(stream.next_groups(0, 64)))
    assert (filling.padding_fraction < 0.001) == (pipeline == 1)
    [fixed] = open_streams(config, [real], 2, Cost(), fixed_length=True)
    assert fixed.grain is None
