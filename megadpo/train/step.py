"""One update. The gradient is the sum over all groups of the global batch, divided once by the objective's count."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import megadpo_kernels
import torch
from megadpo_kernels import Backend
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megadpo.data.batch import PackedBatch
from megadpo.errors import NumericsError
from megadpo.objectives import Objective, Sequences
from megadpo.parallel.context import ParallelContext
from megadpo.train.optimizer import clip_and_update, prepare_gradients
from megadpo.train.state import TrainState

OnLastStage = Callable[[PackedBatch, Tensor], Any]
"""(micro-batch, response sums float32 [S]) -> what the schedule wants of the last stage."""


@dataclass(frozen=True)
class Sums:
    """Totals over a global batch, the same on every rank."""

    loss: float
    """Mean loss: its sum over the count that the objective divides by."""
    metrics: dict[str, float]
    """The objective's metrics, each a mean over groups."""
    groups: int
    tokens: int
    """Scored tokens."""


def train_step(
    state: TrainState,
    batches: Sequence[PackedBatch],
    objective: Objective,
    reference: list | None,
    context: ParallelContext,
) -> tuple[Sums, float]:
    """One update from this rank's micro-batches of a global batch; returns totals and the gradient norm.

    reference: chunks of a resident reference model, or None where the batches carry its log-probabilities (or the
    objective needs none). Raises NumericsError, on every rank and before the weights change, where the loss or the
    gradient is not finite.
    """
    if reference is not None:
        batches = with_reference(reference, batches, context)
    for chunk in state.chunks:
        chunk.zero_grad_buffer()
    state.optimizer.zero_grad()
    on_last_stage = objective_of(objective, kernels_of(state.chunks))
    results = run_schedule(state.chunks, batches, on_last_stage, context, forward_only=False)
    sums = total(results, objective, context)
    if not math.isfinite(sums.loss):
        raise NumericsError(f"step {state.step + 1}: the loss is {sums.loss}; {_WHAT_TO_DO}")
    grad_norm = prepare_gradients(state.optimizer)
    if not math.isfinite(grad_norm):
        raise NumericsError(f"step {state.step + 1}: the gradient norm is {grad_norm}; {_WHAT_TO_DO}")
    clip_and_update(state.optimizer, grad_norm)
    state.step += 1
    state.consumed += sums.groups
    return sums, grad_norm


_WHAT_TO_DO = (
    "no update was made from it; lower optimizer.learning_rate, or look at the data, and go on from the last checkpoint"
)


def run_schedule(
    chunks: Sequence[Any],
    batches: Sequence[PackedBatch],
    on_last_stage: OnLastStage,
    context: ParallelContext,
    forward_only: bool,
) -> list:
    """Megatron-Core's pipeline schedule (or its loop without a pipeline) over the micro-batches.

    Returns what `on_last_stage` put last, per micro-batch in order; an empty list on earlier stages.
    """

    def forward_step(iterator: Iterator[PackedBatch], chunk: Any) -> tuple[Tensor, Callable]:
        batch = next(iterator)
        output = chunk(batch)
        # Called by the schedule on the last stage only; earlier stages' output is hidden states.
        return output, lambda logprob_N: on_last_stage(batch, response_sums(logprob_N, batch, backend))

    backend = kernels_of(chunks)
    moved = [batch.to(context.device) for batch in batches]
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(moved) for _ in chunks],
        model=list(chunks),
        num_microbatches=len(moved),
        seq_length=len(moved[0].tokens_T),
        micro_batch_size=1,
        forward_only=forward_only,
    )


def kernels_of(chunks: Sequence[Any]) -> Backend:
    """Which code runs the kernels of these model chunks (model.logprob_backend), wrapped by data parallelism or not."""
    return getattr(chunks[0], "module", chunks[0]).logprob_backend


def response_sums(logprob_N: Tensor, batch: PackedBatch, backend: Backend = "auto") -> Tensor:
    """float32 [S]: log-probability of every response, with the same bits whatever its neighbours in the stream."""
    return megadpo_kernels.response_sums(logprob_N, batch.tokens_S, backend)


def objective_of(objective: Objective, backend: Backend) -> OnLastStage:
    """For the schedule: (loss sum, count, this micro-batch's totals float64 [4 + metrics])."""

    def on_last_stage(batch: PackedBatch, sums_S: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        outcome = objective(Sequences(sums_S, batch.reference_S, batch.tokens_S, batch.offsets_G1, backend))
        loss = outcome.loss.detach()
        groups = torch.full_like(loss, len(batch.groups))
        totals = torch.stack([loss, outcome.count, groups, batch.tokens_S.sum()]).double()
        return outcome.loss, outcome.count, torch.cat([totals, outcome.metrics.double()])

    return on_last_stage


def total(results: list[Tensor], objective: Objective, context: ParallelContext) -> Sums:
    """Add up the micro-batches of all data-parallel ranks and tell every rank. The step's one read-back."""
    totals = torch.zeros(4 + len(objective.metrics), dtype=torch.float64, device=context.device)
    for result in results:
        totals += result
    if context.holds_loss:
        context.sum_over_data(totals)
    loss, count, groups, tokens, *metrics = context.from_last_stage(totals).tolist()
    means = {name: value / max(groups, 1) for name, value in zip(objective.metrics, metrics, strict=True)}
    return Sums(loss / max(count, 1), means, int(groups), int(tokens))


@torch.no_grad()
def score(chunks: Sequence[Any], batches: Sequence[PackedBatch], context: ParallelContext) -> list[Tensor]:
    """Response sums float32 [S] of each micro-batch, in order; an empty list except on the last stage."""

    def sums_only(batch: PackedBatch, sums_S: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return sums_S.sum(), torch.zeros((), dtype=torch.int, device=sums_S.device), sums_S

    return run_schedule(chunks, batches, sums_only, context, forward_only=True)


def with_reference(
    reference: Sequence[Any], batches: Sequence[PackedBatch], context: ParallelContext
) -> list[PackedBatch]:
    """The batches with a resident reference's log-probabilities; unchanged except on the last stage, which alone
    uses them."""
    scored = score(reference, batches, context)
    if not scored:
        return list(batches)
    return [replace(batch, reference_S=sums_S) for batch, sums_S in zip(batches, scored, strict=True)]
