"""Who is to blame for a loss or a gradient that is not finite."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megadpo.data.batch import PackedBatch
from megadpo.objectives import Objective
from megadpo.parallel.context import ParallelContext
from megadpo.train.optimizer import settled
from megadpo.train.passes import run_schedule
from megadpo.train.state import TrainState
from megadpo.train.step import looked_over


@dataclass(frozen=True)
class Culprit:
    """A rank that computed something that is not finite from micro-batches of these groups."""

    rank: int
    what: str
    """reference, loss or gradient: the first of them that is not finite."""
    groups: tuple[int, ...]
    """Numbers in the store."""


def culprits(
    state: TrainState,
    batches: Sequence[PackedBatch],
    objective: Objective,
    reference: list | None,
    context: ParallelContext,
    mismatched: Sequence[PackedBatch] | None = None,
    seed: int = 0,
) -> list[Culprit]:
    """Compute a global batch again, a micro-batch at a time (as many together as interleaving needs), with gradients
    that are neither reduced nor used. Every rank calls it with its own micro-batches; all get the same answer.

    None found: computed again, everything is finite. Where any rank's loss is to blame, gradients that follow from it
    are not listed.
    """
    mine: list[Culprit] = []
    together = context.pipeline_size if context.virtual_size > 1 else 1
    batches, _, on_last_stage, asked = looked_over(state, batches, objective, reference, context, mismatched, seed)
    with settled(state.chunks), _unreduced(state):
        for start in range(0, len(batches), together):
            part = list(batches[start : start + together])
            for chunk in state.chunks:
                chunk.zero_grad_buffer()
            state.optimizer.zero_grad()  # a float32 optimizer has made the buffers the weights' own gradients
            results = run_schedule(state.chunks, part, on_last_stage, context, forward_only=False, asked=asked)
            what = _not_finite(state, part, results)
            if what:
                mine.append(Culprit(context.rank, what, tuple(g for batch in part for g in batch.groups)))
    for chunk in state.chunks:
        chunk.zero_grad_buffer()
    everyone: list[list[Culprit]] = [[] for _ in range(context.world_size)]
    dist.all_gather_object(everyone, mine)
    found = [culprit for one in everyone for culprit in one]
    causes = [culprit for culprit in found if culprit.what != "gradient"]
    return causes or found


def _not_finite(state: TrainState, batches: list[PackedBatch], results: list[torch.Tensor]) -> str:
    if any(batch.reference_S is not None and not torch.isfinite(batch.reference_S).all() for batch in batches):
        return "reference"
    if any(not torch.isfinite(result).all() for result in results):
        return "loss"
    buffers = [buffer for chunk in state.chunks for buffer in chunk.buffers]
    return "gradient" if any(not torch.isfinite(buffer.grad_data).all() for buffer in buffers) else ""


@contextmanager
def _unreduced(state: TrainState) -> Iterator[None]:
    """Gradients stay where they were computed."""
    config = state.modules[0].config
    names = ("finalize_model_grads_func", "no_sync_func", "grad_sync_func", "param_sync_func")
    before = {name: getattr(config, name) for name in names}
    try:
        for name in names:
            setattr(config, name, None)
        config.no_sync_func = nullcontext
        with ExitStack() as stack:
            for chunk in state.chunks:
                stack.enter_context(chunk.no_sync())
            yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)
