"""The packed stream: what stands where, and what attends to what."""

import numpy as np
import pytest
import torch
from tiny import MemoryStore, random_groups

from megadpo.config import BatchConfig
from megadpo.data.batch import Segment, attention_area, pack, stream_tokens
from megadpo.data.packing import Budget
from megadpo.data.stream import Stream, choose_budget
from megadpo.data.tokenize import TokenizedGroup
from megadpo.errors import ConfigError


def store(*groups: tuple[list[int], list[list[int]]]) -> MemoryStore:
    return MemoryStore(
        [
            TokenizedGroup(f"row {i}", np.array(prompt, dtype=np.int32), tuple(np.array(r, dtype=np.int32) for r in rs))
            for i, (prompt, rs) in enumerate(groups)
        ]
    )


def test_the_picture_in_the_docstring() -> None:
    batch = pack(store(([10, 11, 12, 13], [[20, 21, 22], [30, 31, 32]])), [0], 12, None)
    assert batch.tokens_T.tolist() == [10, 11, 12, 13, 20, 21, 13, 30, 31, 0, 0, 0]
    assert batch.positions_T.tolist()[:9] == [0, 1, 2, 3, 4, 5, 3, 4, 5]
    assert batch.rows_N.tolist() == [3, 4, 5, 6, 7, 8]
    assert batch.targets_N.tolist() == [20, 21, 22, 30, 31, 32]
    assert batch.tokens_S.tolist() == [3, 3]
    assert batch.offsets_G1.tolist() == [0, 2]
    assert batch.segments == (Segment(0, 3, 0, 0), Segment(3, 6, 0, 3), Segment(6, 9, 0, 3))
    assert batch.used == 9


def test_one_token_prompt_has_no_prefix() -> None:
    batch = pack(store(([7], [[8], [9]])), [0], 4, None)
    assert batch.tokens_T.tolist() == [7, 7, 0, 0]
    assert batch.positions_T.tolist()[:2] == [0, 0]
    assert batch.segments == (Segment(0, 1, 0, 0), Segment(1, 2, 0, 0))


def test_without_sharing_every_response_has_its_prompt() -> None:
    batch = pack(store(([10, 11, 12, 13], [[20, 21, 22], [30, 31]])), [0], 12, None, share=False)
    assert batch.tokens_T.tolist() == [10, 11, 12, 13, 20, 21, 10, 11, 12, 13, 30, 0]
    assert batch.positions_T.tolist()[:11] == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4]
    assert batch.rows_N.tolist() == [3, 4, 5, 9, 10]
    assert batch.targets_N.tolist() == [20, 21, 22, 30, 31]
    assert batch.segments == (Segment(0, 6, 0, 0), Segment(6, 11, 6, 6))


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("responses", [1, 2, 5])
def test_lengths_and_areas(responses: int, share: bool) -> None:
    groups = random_groups(20, responses=responses)
    tokens, area = stream_tokens(groups, share), attention_area(groups, share)
    for number in range(20):
        batch = pack(groups, [number], int(tokens[number]), None, share)
        assert batch.used == tokens[number]
        attended = sum(
            (s.end - s.start) * (s.end - s.start + 1) // 2 + (s.end - s.start) * (s.prefix_end - s.prefix_start)
            for s in batch.segments
        )
        assert attended == area[number]


def test_reference_follows_its_group() -> None:
    groups = random_groups(6)
    column = np.arange(12, dtype=np.float32)
    batch = pack(groups, [4, 1], 200, column)
    assert batch.reference_S.tolist() == [8, 9, 2, 3]


def test_an_empty_stream() -> None:
    batch = pack(random_groups(2), [], 16, np.zeros(4, dtype=np.float32))
    assert batch.used == 0
    assert batch.rows_N.shape == batch.tokens_S.shape == batch.reference_S.shape == (0,)
    assert batch.offsets_G1.tolist() == [0]


def test_the_same_global_batch_on_every_grid() -> None:
    groups = random_groups(40)
    for ranks in (1, 2, 4, 8):
        stream = Stream(groups, Budget(64), ranks, 1, seed=3, shuffle=True)
        picked = stream.next_groups(10, 16)
        dealt = [g for rank in range(ranks) for batch in stream.batches(picked, rank, None) for g in batch.groups]
        alone = Stream(groups, Budget(64), 1, 1, seed=3, shuffle=True)
        assert sorted(dealt) == sorted(alone.next_groups(10, 16).tolist())


def test_budget_asked_for() -> None:
    groups = random_groups(10)
    longest = int(stream_tokens(groups).max())
    assert choose_budget([groups], 1, 1, 2, BatchConfig(micro_batch_tokens=64)) == Budget(64, None)
    with pytest.raises(ConfigError, match="must be a multiple of 2"):
        choose_budget([groups], 1, 1, 2, BatchConfig(micro_batch_tokens=63))
    with pytest.raises(ConfigError, match=f"the longest group takes {longest} tokens"):
        choose_budget([groups], 1, 1, 1, BatchConfig(micro_batch_tokens=longest - 1))


@pytest.mark.parametrize("pipeline", [1, 2, 4])
@pytest.mark.parametrize("multiple", [1, 2, 3, 8])
def test_budget_chosen(pipeline: int, multiple: int) -> None:
    groups = random_groups(50)
    budget = choose_budget([groups], 2, pipeline, multiple, BatchConfig(global_batch_size=32))
    assert budget.tokens % multiple == 0
    assert budget.tokens >= stream_tokens(groups).max()
    assert budget.tokens < stream_tokens(groups).sum()


def test_moving_keeps_everything_else() -> None:
    batch = pack(random_groups(3), [1, 2], 64, None)
    moved = batch.to(torch.device("cpu"))
    assert moved.segments == batch.segments
    assert moved.reference_S is None
    assert torch.equal(moved.tokens_T, batch.tokens_T)
