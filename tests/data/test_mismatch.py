"""KTO's mismatched responses: the same set of responses and of prompts per batch, and no response behind its own."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import MemoryStore

from megadpo.data.batch import pack
from megadpo.data.mismatch import derangement, mismatched
from megadpo.data.packing import Budget, take
from megadpo.data.stream import Stream
from megadpo.data.tokenize import TokenizedGroup
from megadpo.errors import DataError


def unpaired(prompts: list[int], lengths: list[int] | None = None) -> MemoryStore:
    """One group per entry; equal numbers are equal prompts. Response g is the token 1000 + g."""
    groups = []
    for number, prompt in enumerate(prompts):
        length = 1 if lengths is None else lengths[number]
        ids = np.array([1, *[50 + prompt] * length], dtype=np.int32)
        answer = np.full(1 + number % 3, 1000 + number, dtype=np.int32)
        groups.append(TokenizedGroup(f"row {number}", ids, (answer,), labels=(number % 2 == 0,)))
    return MemoryStore(groups)


@st.composite
def runs(draw: st.DrawFn) -> tuple[list[int], int, int, int, bool]:
    """(prompts, batch size, epochs, seed, shuffle)."""
    count = draw(st.integers(2, 40))
    prompts = draw(st.lists(st.integers(0, 25), min_size=count, max_size=count))
    return prompts, draw(st.integers(1, 12)), draw(st.integers(1, 2)), draw(st.integers(0, 99)), draw(st.booleans())


@settings(max_examples=300, deadline=None)
@given(runs())
def test_invariant(run: tuple[list[int], int, int, int, bool]) -> None:
    """Trap 26: {y'} = {y}, {x'} = {x}, and no y' behind its own prompt, in every batch; or refused with the reason."""
    prompts, batch, epochs, seed, shuffle = run
    store = unpaired(prompts)
    order = take(len(prompts), 0, epochs * len(prompts), seed, shuffle)
    parts = [order[start : start + batch] for start in range(0, len(order), batch)]
    most = [max(np.unique([prompts[g] for g in part], return_counts=True)[1]) for part in parts]
    possible = all(2 * same <= len(part) for same, part in zip(most, parts, strict=True))
    if not possible:
        with pytest.raises(DataError, match=r"step [0-9]+"):
            mismatched(store, order, batch, seed)  # type: ignore[arg-type]
        return
    found = mismatched(store, order, batch, seed)  # type: ignore[arg-type]
    for number, part in enumerate(parts):
        groups = [found.group(number * batch + k) for k in range(len(part))]
        assert [g.response_ids[0][0] - 1000 for g in groups] == part.tolist()
        assert sorted(g.prompt_ids[-1] for g in groups) == sorted(50 + prompts[g] for g in part)
        assert all(g.prompt_ids[-1] != 50 + prompts[own] for g, own in zip(groups, part, strict=True))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 8), min_size=2, max_size=30), st.integers(0, 999))
def test_derangement(labels: list[int], seed: int) -> None:
    classes = np.unique(labels, return_inverse=True)[1]
    if 2 * np.bincount(classes).max() > len(classes):
        return
    result = derangement(classes, np.random.default_rng(seed))
    assert sorted(result.tolist()) == list(range(len(labels)))
    assert (classes[result] != classes).all()


def test_a_function_of_seed_and_place_alone() -> None:
    """Another length of the run, or a resumed one, has the same pairing; another step and another seed have others."""
    store = unpaired(list(range(64)))
    order = take(64, 0, 128, 3, True)
    whole, half = mismatched(store, order, 16, 3), mismatched(store, order[:64], 16, 3)  # type: ignore[arg-type]
    assert [whole.group(r).origin for r in range(64)] == [half.group(r).origin for r in range(64)]
    other = mismatched(store, order, 16, 4)  # type: ignore[arg-type]
    differ = [whole.group(r).origin != other.group(r).origin for r in range(128)]
    assert np.mean(differ) > 0.8
    assert len({whole.digest, half.digest, other.digest}) == 3
    in_file_order = mismatched(store, np.tile(np.arange(16), 4), 16, 3)  # type: ignore[arg-type]
    shifts = {tuple(in_file_order.group(b * 16 + k).origin for k in range(16)) for b in range(4)}
    assert len(shifts) == 4


def test_every_grid_has_the_same() -> None:
    """Dealt to 1, 2 or 4 ranks and any micro-batch size, the mismatched groups of a step are the same."""
    store = unpaired(list(range(24)), [1 + n % 7 for n in range(24)])
    found = mismatched(store, np.arange(24), 8, 0)  # type: ignore[arg-type]
    seen = []
    for ranks, budget in ((1, Budget(400)), (2, Budget(40)), (4, Budget(24, groups=1))):
        stream = Stream(found, budget, ranks, 1)  # type: ignore[arg-type]
        bins = stream.bins(np.arange(8, 16))
        batches = [batch for part in bins for batch in stream.pack(part, None)]
        seen.append(sorted(tuple(batch.targets_N.tolist()) for batch in batches if len(batch.groups) == 1))
        targets = sorted(int(t) for batch in batches for t in batch.targets_N)
        assert targets == sorted(int(t) for g in range(8, 16) for t in store.group(g).response_ids[0])
        assert all(batch.labels_S is None for batch in batches)


def test_too_long_together() -> None:
    """The prompt loses tokens, but not its first, and no sequence is longer than the longest real one."""
    store = unpaired([0, 1, 2], [30, 2, 2])
    store.groups[1] = TokenizedGroup("b", store.groups[1].prompt_ids, (np.arange(200, 228, dtype=np.int32),))
    store = MemoryStore(store.groups)
    for seed in range(4):
        found = mismatched(store, np.arange(3), 3, seed)  # type: ignore[arg-type]
        for number in range(3):
            group = found.group(number)
            assert len(group.prompt_ids) == found.prompt_lengths[number]
            assert len(group.prompt_ids) + len(group.response_ids[0]) <= 32
            assert group.prompt_ids[0] == 1
            assert group.response_ids[0].tolist() == store.group(number).response_ids[0].tolist()
        pack(found, [0, 1, 2], 120, None)  # type: ignore[arg-type]


def test_refusals_name_the_step_and_what_to_do() -> None:
    with pytest.raises(DataError, match=r"step 3 has a batch of 1 group, .* at least 2 .* change batch\.global"):
        mismatched(unpaired(list(range(9))), np.arange(9), 4, 0)  # type: ignore[arg-type]
    rows = unpaired([0, 1, 1, 1, 2, 3])
    with pytest.raises(DataError, match=r"step 1: 3 of its 4 groups have the prompt of row 1, .* train\.shuffle"):
        mismatched(rows, np.arange(6), 4, 0)  # type: ignore[arg-type]
    for store, order in ((rows, np.array([3, 2, 1, 0, 4, 5])), (unpaired([0, 1, 1, 1]), np.arange(4))):
        with pytest.raises(DataError, match="3 of its 4 groups") as raised:  # shuffled already, or all there is
            mismatched(store, order, 4, 0)  # type: ignore[arg-type]
        assert "shuffle" not in str(raised.value)
