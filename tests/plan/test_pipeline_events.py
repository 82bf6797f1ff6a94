"""The schedule as events, against closed forms and against Megatron-Core's own tables."""

import itertools

import pytest
from megatron.core.pipeline_parallel.schedules import get_schedule_table

from megadpo.plan.pipeline import StageTime, order, simulate


def even(stages: int, forward: float = 1.0, backward: float = 2.0) -> list[StageTime]:
    return [StageTime(forward, backward)] * stages


@pytest.mark.parametrize(("ranks", "micro_batches"), [(1, 1), (2, 1), (2, 5), (4, 4), (4, 16), (8, 3), (8, 32)])
def test_bubble_of_1f1b(ranks: int, micro_batches: int) -> None:
    """Narayanan et al. 2104.04473, section 2.2: (p - 1) / m of the ideal time."""
    line = simulate(even(ranks), ranks, micro_batches)
    ideal = 3.0 * micro_batches
    assert line.busy == pytest.approx((ideal,) * ranks)
    assert line.length == pytest.approx(ideal * (1 + (ranks - 1) / micro_batches))


@pytest.mark.parametrize(("ranks", "chunks", "rounds"), [(2, 2, 1), (2, 2, 3), (4, 2, 2), (4, 5, 4), (8, 3, 2)])
def test_bubble_of_interleaving(ranks: int, chunks: int, rounds: int) -> None:
    """The same, section 2.2.2: (p - 1) / (v m), for a number of micro-batches that the ranks divide."""
    micro_batches = ranks * rounds
    line = simulate(even(ranks * chunks, 1 / chunks, 2 / chunks), ranks, micro_batches)
    assert line.length == pytest.approx(3.0 * micro_batches + 3.0 * (ranks - 1) / chunks)


@pytest.mark.parametrize(("ranks", "micro_batches"), [(1, 4), (4, 1), (4, 9)])
def test_forward_only(ranks: int, micro_batches: int) -> None:
    line = simulate(even(ranks), ranks, micro_batches, forward_only=True)
    assert line.length == pytest.approx(micro_batches + ranks - 1)


def test_a_heavy_last_stage_sets_the_pace() -> None:
    """All others wait for it: its own work, and one forward and backward pass through the others."""
    stages = [*even(3), StageTime(2.0, 4.0)]
    line = simulate(stages, 4, 20)
    assert line.busy[3] == pytest.approx(120)
    assert line.length == pytest.approx(120 + 3 * 3)


def test_order_of_chunks_is_megatrons() -> None:
    for ranks, chunks, rounds in itertools.product((2, 4), (2, 3), (1, 2)):
        table = get_schedule_table(ranks * rounds, chunks, ranks)
        ours = [(batch, chunk) for _, chunk, batch in order(0, ranks, chunks, ranks * rounds, forward_only=True)]
        assert ours == table


@pytest.mark.parametrize(("ranks", "chunks", "micro_batches"), [(4, 1, 8), (4, 3, 8), (2, 4, 2), (8, 1, 3)])
def test_everything_is_done_once(ranks: int, chunks: int, micro_batches: int) -> None:
    for rank in range(ranks):
        done = order(rank, ranks, chunks, micro_batches)
        assert len(set(done)) == len(done) == 2 * chunks * micro_batches


def test_messages_cost() -> None:
    quick = simulate(even(4), 4, 8).length
    beside = simulate(even(4), 4, 8, message=0.1).length
    blocking = simulate(even(4), 4, 8, message=0.1, blocking=True).length
    assert quick + 6 * 0.1 - 1e-9 <= beside <= blocking
    assert blocking >= quick + 8 * 0.1  # the first rank sends eight times and computes nothing meanwhile
