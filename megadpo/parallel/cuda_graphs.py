"""What CUDA graphs need of the machine, and how many of each the pipeline needs."""

from __future__ import annotations

import os
from itertools import accumulate

import torch
from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches, get_schedule_table
from megatron.core.transformer.cuda_graphs import convert_schedule_table_to_order

from megadpo.config import ModelConfig
from megadpo.parallel.context import ParallelContext


def graphs_problem(model: ModelConfig, device: torch.device) -> str | None:
    """What keeps this machine from the graphs that the run file asks for; None: nothing, or none are asked for."""
    if not model.cuda_graphs:
        return None
    given = f"model.cuda_graphs = [{', '.join(model.cuda_graphs)}]"
    if device.type != "cuda":
        return f"{given}: needs a GPU and this run is on a {device.type}; leave it out"
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        # as Megatron-Core has it (cuda_graphs.py: TECudaGraphHelper)
        if "expandable_segments:True" in os.environ.get(name, "") and os.environ.get("NCCL_GRAPH_REGISTER") != "0":
            return (
                f"{given}: with {name}=expandable_segments:True NCCL would use memory of a graph that has moved; set "
                "NCCL_GRAPH_REGISTER=0 in the environment, or leave one out"
            )
    return None


def most_in_flight(context: ParallelContext) -> tuple[int, ...]:
    """Of every model chunk here, the most micro-batches that have gone forward and not yet backward, whatever their
    number in a step; they are consecutive ones. From Megatron-Core's own tables."""
    stages, chunks = context.pipeline_size, context.virtual_size
    most = [1] * chunks
    # a pipeline is full with fewer than 4 micro-batches per stage; interleaving takes multiples of the stages
    for count in range(stages, 4 * stages + 1, stages if chunks > 1 else 1):
        warm_up = get_pp_rank_microbatches(count, chunks, stages)[2]
        order = convert_schedule_table_to_order(warm_up, chunks, get_schedule_table(count, chunks, stages))
        for chunk in range(chunks):
            # the tables count chunks from 1; backward passes have a minus
            here = accumulate((step == chunk + 1) - (step == -chunk - 1) for step in order)
            most[chunk] = max(most[chunk], *here)
    return tuple(most)
