"""How many micro-batches a rank of a pipeline holds at once."""

from __future__ import annotations

from itertools import accumulate

from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches, get_schedule_table
from megatron.core.transformer.cuda_graphs import convert_schedule_table_to_order

from megadpo.parallel.context import ParallelContext


def most_in_flight(context: ParallelContext) -> int:
    """Of one model chunk here, the most micro-batches that have gone forward and not yet backward, whatever their
    number in a step; they are consecutive ones. From Megatron-Core's own tables."""
    stages, chunks = context.pipeline_size, context.virtual_size
    most = 1
    # a pipeline is full with fewer than 4 micro-batches per stage; interleaving takes multiples of the stages
    for count in range(stages, 4 * stages + 1, stages if chunks > 1 else 1):
        warm_up = get_pp_rank_microbatches(count, chunks, stages)[2]
        order = convert_schedule_table_to_order(warm_up, chunks, get_schedule_table(count, chunks, stages))
        for chunk in range(1, chunks + 1):
            most = max(most, *accumulate((step == chunk) - (step == -chunk) for step in order))
    return most
