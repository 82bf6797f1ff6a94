"""One update. The gradient is the sum over all groups of the global batch, divided once by the objective's count."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megadpo.data.batch import PackedBatch
from megadpo.errors import NumericsError
from megadpo.model.fp8_emulation import amaxes_noted, remember_amaxes
from megadpo.model.head import Asked, HeadOutput
from megadpo.objectives import Objective, Outcome, Sequences, across
from megadpo.parallel.context import ParallelContext
from megadpo.train.optimizer import clip_and_update, prepare_gradients, settled
from megadpo.train.passes import (
    OnLastStage,
    Shared,
    asked_of,
    forward,
    global_counts,
    kernels_of,
    mean_ratio,
    run_schedule,
    sequences_of,
    with_reference,
)
from megadpo.train.state import TrainState


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


class NotFiniteError(NumericsError):
    """A loss or gradient norm; what to do about it is the loop's to decide (train.on_nonfinite)."""


def train_step(
    state: TrainState,
    batches: Sequence[PackedBatch],
    objective: Objective,
    reference: list | None,
    context: ParallelContext,
    mismatched: Sequence[PackedBatch] | None = None,
    seed: int = 0,
    before_update: Callable[[], None] = lambda: None,
) -> tuple[Sums, float]:
    """One update from this rank's micro-batches of a global batch; returns totals and the gradient norm.

    reference: chunks of a resident reference model, or None where the batches carry its log-probabilities (or the
    objective needs none). mismatched: this rank's responses to other prompts than their own, for objectives that need
    `mismatched_kl`. seed: the run's, for objectives that draw tokens. before_update: called when the gradients are
    there and activations gone. Raises NotFiniteError, on every rank and before the weights change, where the loss or
    the gradient is not finite.
    """
    batches, totals, on_last_stage, asked = looked_over(state, batches, objective, reference, context, mismatched, seed)
    for chunk in state.chunks:
        chunk.zero_grad_buffer()
    state.optimizer.zero_grad()
    with amaxes_noted(state.chunks):
        results = run_schedule(state.chunks, batches, on_last_stage, context, forward_only=False, asked=asked)
    before_update()
    sums = read(total(results, objective, context) if totals is None else totals, objective, context)
    if not math.isfinite(sums.loss):
        raise NotFiniteError(f"step {state.step + 1}: the loss is {sums.loss}")
    grad_norm = prepare_gradients(state.optimizer)
    if not math.isfinite(grad_norm):
        raise NotFiniteError(f"step {state.step + 1}: the gradient norm is {grad_norm}")
    state.until_free()
    clip_and_update(state.optimizer, grad_norm)
    remember_amaxes(state.chunks, context)
    state.step += 1
    state.consumed += sums.groups
    return sums, grad_norm


def looked_over(
    state: TrainState,
    batches: Sequence[PackedBatch],
    objective: Objective,
    reference: list | None,
    context: ParallelContext,
    mismatched: Sequence[PackedBatch] | None,
    seed: int,
) -> tuple[Sequence[PackedBatch], Tensor | None, OnLastStage, Asked]:
    """What the gradient's pass needs to know of the global batch before: the micro-batches with what the reference
    says of them, the totals where they are known already, what the schedule calls on the last stage for each
    micro-batch in this order, and what the head is asked for."""
    if reference is not None:
        batches = with_reference(reference, batches, context, hidden="kl_N" in objective.needs)
    drift = None if mismatched is None else mean_ratio(state.chunks, reference, mismatched, context)
    asked = asked_of(objective, reference, seed, state.consumed)
    shared = Shared(global_counts(batches, context), drift, kernels_of(state.chunks), asked)
    if not objective.whole_batch:
        return batches, None, objective_of(objective, shared), asked
    with settled(state.chunks):  # one more forward pass, so that the formula sees the whole batch at once
        sequences = forward(state.chunks, batches, objective, shared, context)
    totals, slopes = totals_across(sequences, objective, context)
    return batches, totals, slopes_of(objective, shared, slopes), asked


def objective_of(objective: Objective, shared: Shared) -> OnLastStage:
    """For the schedule: (loss sum, count, this micro-batch's totals)."""

    def on_last_stage(batch: PackedBatch, output: HeadOutput) -> tuple[Tensor, Tensor, Tensor]:
        sequences = sequences_of(batch, output, objective, shared)
        outcome = objective(sequences)
        return outcome.loss, outcome.count, totals_of(outcome, sequences)

    return on_last_stage


def slopes_of(objective: Objective, shared: Shared, slopes: list[dict[str, Tensor]]) -> OnLastStage:
    """For the schedule, where the whole batch's loss is known: (what has its gradient, the count, response sums).

    slopes: of this rank's micro-batches, in the order in which the schedule takes them.
    """
    coming = iter(slopes)

    def on_last_stage(batch: PackedBatch, output: HeadOutput) -> tuple[Tensor, Tensor, Tensor]:
        sequences = sequences_of(batch, output, objective, shared)
        slope = {name: value.to(output.logprob_N.device) for name, value in next(coming).items()}
        return across.along(sequences, slope), sequences.count(objective.unit), sequences.policy_S.detach()

    return on_last_stage


def totals_of(outcome: Outcome, sequences: Sequences) -> Tensor:
    """float64 [4 + metrics]: loss sum, count, groups, scored tokens, metric sums."""
    loss, counts = outcome.loss.detach().double(), sequences.counts
    totals = torch.stack([loss, outcome.count.double(), counts.groups.double(), counts.tokens.double()])
    return torch.cat([totals, outcome.metrics.double()])


def total(results: Sequence[Tensor], objective: Objective, context: ParallelContext) -> Tensor:
    """Add up the totals of the micro-batches of all data-parallel ranks; right on the last stage."""
    totals = torch.zeros(4 + len(objective.metrics), dtype=torch.float64, device=context.device)
    for result in results:
        totals += result
    return context.sum_over_data(totals) if context.holds_loss else totals


def totals_across(
    sequences: Sequence[Sequences], objective: Objective, context: ParallelContext
) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """Totals of an objective that looks across groups, and the slopes of this rank's micro-batches (CPU tensors).

    sequences: of this rank's micro-batches, without gradient. Right on the last stage.
    """
    totals = torch.zeros(4 + len(objective.metrics), dtype=torch.float64, device=context.device)
    if not context.holds_loss:
        return totals, []
    ranks = context.gather_over_data([part.to(torch.device("cpu")) for part in sequences])
    every = [part for rank in ranks for part in rank]
    outcome, slopes = across.slopes(every, objective)
    before = sum(len(rank) for rank in ranks[: context.data_rank])
    totals += totals_of(outcome, across.join(every)).to(context.device)
    return totals, slopes[before : before + len(sequences)]


def read(totals: Tensor, objective: Objective, context: ParallelContext) -> Sums:
    """Tell every rank, as numbers. The step's one read-back."""
    loss, count, groups, tokens, *metrics = context.from_last_stage(totals).tolist()
    sums = dict(zip(objective.metrics, metrics, strict=True))
    means = {
        name: value / max(sums[objective.shares[name]] if name in objective.shares else groups, 1)
        for name, value in sums.items()
    }
    return Sums(loss / max(count, 1), means, int(groups), int(tokens))
