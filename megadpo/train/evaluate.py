"""Held-out metrics: the objective's own, over a whole store, without a gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from megadpo.data.stream import Stream
from megadpo.objectives import Objective, Sequences
from megadpo.parallel.context import ParallelContext
from megadpo.train.passes import Shared, forward, global_counts, with_reference
from megadpo.train.step import Sums, read, total, totals_across, totals_of


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
    None for objectives that need none. per_pass: groups given to the pipeline at once. The store is one batch for the
    objective, so its loss and metrics are exact means over it.
    """
    kept: list[Sequences] = []
    for start in range(0, len(stream.store), per_pass):
        groups = np.arange(start, min(start + per_pass, len(stream.store)))
        batches = stream.batches(groups, context.data_rank, column)
        if reference is not None:
            batches = with_reference(reference, batches, context)
        kept += forward(chunks, batches, objective, Shared(None), context)
    whole = global_counts(kept, context)
    kept = [replace(sequences, whole=whole) for sequences in kept]
    if objective.whole_batch:
        totals, _ = totals_across(kept, objective, context)
    else:
        totals = total([totals_of(objective(part), part) for part in kept], objective, context)
    return read(totals, objective, context)
