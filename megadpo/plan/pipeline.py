"""A pipeline's step as events, which stage does what when: Megatron-Core's 1F1B, interleaved 1F1B, forward only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class StageTime:
    """Seconds of one micro-batch in one (virtual) stage."""

    forward: float
    backward: float


@dataclass(frozen=True)
class Timeline:
    """Seconds from the start of the step, per pipeline rank."""

    busy: tuple[float, ...]
    """Spent in forward and backward passes."""
    first_backward: tuple[float, ...]
    end: tuple[float, ...]
    """End of the last pass."""

    @property
    def length(self) -> float:
        return max(self.end)


Operation = tuple[bool, int, int]
"""(backward, model chunk, micro-batch)."""


def order(rank: int, ranks: int, chunks: int, micro_batches: int, forward_only: bool = False) -> list[Operation]:
    """What a pipeline rank does, in its order (megatron/core/pipeline_parallel/schedules.py).

    Interleaved, micro-batches go through the chunks `ranks` at a time. Some forward passes first (warm-up), then one
    forward and one backward in turns, then the backward passes that are left.
    """
    forward = _sequence(ranks, chunks, micro_batches)
    if forward_only:
        return [(False, chunk, batch) for chunk, batch in forward]
    backward = [(chunks - 1 - chunk, batch) for chunk, batch in forward]
    warm_up = ranks - rank - 1 if chunks == 1 else 2 * (ranks - rank - 1) + (chunks - 1) * ranks
    warm_up = min(warm_up, len(forward))
    operations = [(False, *one) for one in forward[:warm_up]]
    for step, one in enumerate(forward[warm_up:]):
        operations += [(False, *one), (True, *backward[step])]
    return operations + [(True, *one) for one in backward[len(forward) - warm_up :]]


def _sequence(ranks: int, chunks: int, micro_batches: int) -> list[tuple[int, int]]:
    """(chunk, micro-batch) of the forward passes: groups of `ranks` micro-batches, each group through all chunks."""
    if chunks == 1:
        return [(0, batch) for batch in range(micro_batches)]
    return [
        (chunk, batch)
        for start in range(0, micro_batches, ranks)
        for chunk in range(chunks)
        for batch in range(start, min(start + ranks, micro_batches))
    ]


def simulate(
    stages: Sequence[StageTime],
    ranks: int,
    micro_batches: int,
    message: float = 0.0,
    blocking: bool = False,
    forward_only: bool = False,
) -> Timeline:
    """Run the schedule.

    stages: in the order of the layers, `ranks` x chunks of them; stage s is on rank s % ranks. message: seconds of one
    stage's output, or its gradient, to the next. blocking: the sender does nothing else while a message is on its way
    (1F1B without interleaving), instead of computing beside it.
    """
    chunks, rest = divmod(len(stages), ranks)
    assert not rest, (len(stages), ranks)
    plans = [order(rank, ranks, chunks, micro_batches, forward_only) for rank in range(ranks)]
    done: dict[tuple[bool, int, int], float] = {}  # (backward, stage, micro-batch) -> when its output has arrived
    place, free, busy = [0] * ranks, [0.0] * ranks, [0.0] * ranks
    first_backward = [0.0] * ranks
    last = len(stages) - 1
    moved = True
    while moved:
        moved = False
        for rank in range(ranks):
            while place[rank] < len(plans[rank]):
                backward, chunk, batch = plans[rank][place[rank]]
                stage = chunk * ranks + rank
                needs = (True, stage + 1, batch) if backward and stage < last else (False, stage - 1, batch)
                if backward and stage == last:
                    needs = (False, stage, batch)
                arrived = 0.0 if not backward and stage == 0 else done.get(needs)
                if arrived is None:
                    break
                start = max(free[rank], arrived)
                time = stages[stage].backward if backward else stages[stage].forward
                if backward and not first_backward[rank]:
                    first_backward[rank] = start
                sends = stage > 0 if backward else stage < last
                end = start + time
                done[backward, stage, batch] = end + (message if sends else 0.0)
                free[rank] = end + (message if sends and blocking else 0.0)
                busy[rank] += time
                place[rank] += 1
                moved = True
    assert all(place[rank] == len(plans[rank]) for rank in range(ranks)), "the schedule waits for itself"
    return Timeline(tuple(busy), tuple(first_backward), tuple(free))
