"""Held-out metrics: the objective's own, over a whole store, without a gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from megadpo.data.stream import Stream
from megadpo.objectives import Objective
from megadpo.parallel.context import ParallelContext
from megadpo.train.step import Sums, kernels_of, objective_of, run_schedule, total, with_reference


@torch.no_grad()
def evaluate(
    chunks: Sequence[Any],
    stream: Stream,
    objective: Objective,
    column: np.ndarray | None,
    reference: list | None,
    per_pass: int,
    context: ParallelContext,
) -> Sums:
    """Loss and metrics over every group of the stream's store, each group once.

    column: the reference's log-probabilities float32 [S of the store]; reference: a resident reference's chunks; both
    None for objectives that need none. per_pass: groups given to the pipeline at once.
    """
    results: list[torch.Tensor] = []
    for start in range(0, len(stream.store), per_pass):
        groups = np.arange(start, min(start + per_pass, len(stream.store)))
        batches = stream.batches(groups, context.data_rank, column)
        if reference is not None:
            batches = with_reference(reference, batches, context)
        on_last_stage = objective_of(objective, kernels_of(chunks))
        results += run_schedule(chunks, batches, on_last_stage, context, forward_only=True)
    return total(results, objective, context)
