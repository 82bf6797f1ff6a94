"""Passes of a model over the micro-batches of a batch, and what the objective gets of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from typing import Any

import megadpo_kernels
import torch
from megadpo_kernels import Backend
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megadpo.data.batch import PackedBatch
from megadpo.model.fp8 import learning_nothing
from megadpo.model.head import NOTHING, Asked, HeadOutput, Rivals
from megadpo.objectives import Counts, Objective, Sequences
from megadpo.parallel.context import ParallelContext
from megadpo.train.optimizer import settled

OnLastStage = Callable[[PackedBatch, HeadOutput], Any]
"""(micro-batch, what the head gives of its scored tokens) -> what the schedule wants of the last stage."""


def run_schedule(
    chunks: Sequence[Any],
    batches: Sequence[PackedBatch],
    on_last_stage: OnLastStage,
    context: ParallelContext,
    forward_only: bool,
    asked: Asked = NOTHING,
    as_trained: bool = False,
) -> list:
    """Megatron-Core's pipeline schedule (or its loop without a pipeline) over the micro-batches.

    asked: of the head. as_trained: without a gradient, but in FP8 as with one (see `learning_nothing`). Returns what
    `on_last_stage` put last, per micro-batch in order; an empty list on earlier stages.
    """

    def forward_step(iterator: Iterator[PackedBatch], chunk: Any) -> tuple[HeadOutput | Tensor, Callable]:
        batch = next(iterator)
        # Called by the schedule on the last stage only; earlier stages' output is hidden states.
        return chunk(batch, asked), lambda output: on_last_stage(batch, output)

    moved = [batch.to(context.device) for batch in batches]
    with learning_nothing(chunks) if forward_only and not as_trained else nullcontext():
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
    backend: Backend = getattr(chunks[0], "module", chunks[0]).logprob_backend
    return backend


def response_sums(logprob_N: Tensor, batch: PackedBatch, backend: Backend) -> Tensor:
    """float64 [S]: log-probability of every response, with the same bits whatever its neighbours in the stream; of a
    reward model its reward, float32, which is already one number."""
    if batch.scalar:
        return logprob_N
    return megadpo_kernels.response_sums(logprob_N, batch.tokens_S, backend)


@dataclass(frozen=True)
class Shared:
    """What every micro-batch is told of the global batch; meaningful on the last stage, which alone uses it."""

    whole: Counts | None
    mismatched_kl: Tensor | None = None
    backend: Backend = "auto"
    """Of the kernels."""
    asked: Asked = NOTHING
    """Of the head, beside log-probabilities."""


def asked_of(objective: Objective, reference: Sequence[Any] | None, seed: int, consumed: int) -> Asked:
    """What the objective needs of the policy's head.

    reference: a resident reference's chunks, where there is one. seed, consumed: the draws of rivals follow from them
    (model.head.Rivals).
    """
    weight_VE = None
    if "kl_N" in objective.needs:
        assert reference is not None, "the KL needs a resident reference"
        weight_VE = getattr(reference[-1], "module", reference[-1]).head_weight()
    rivals = None if objective.top_k is None else Rivals(objective.top_k, seed, consumed)
    return Asked("collision_N" in objective.needs, rivals, weight_VE)


def sequences_of(batch: PackedBatch, output: HeadOutput, objective: Objective, shared: Shared) -> Sequences:
    """What the objective gets of one micro-batch."""
    return Sequences(
        policy_S=response_sums(output.logprob_N, batch, shared.backend),
        reference_S=batch.reference_S,
        tokens_S=batch.tokens_S,
        offsets_G1=batch.offsets_G1,
        labels_S=batch.labels_S,
        scores_S=batch.scores_S,
        policy_N=output.logprob_N if "policy_N" in objective.needs else None,
        reference_N=batch.reference_N if "reference_N" in objective.needs else None,
        body_N=batch.body_N,
        collision_N=output.collision_N,
        kl_N=output.kl_N,
        rival_N=output.rival_N,
        mismatched_kl=shared.mismatched_kl,
        whole=shared.whole,
        backend=shared.backend,
    )


def global_counts(parts: Sequence[PackedBatch] | Sequence[Sequences], context: ParallelContext) -> Counts:
    """Of the micro-batches of all data-parallel ranks; right on the last stage."""
    sums = torch.zeros(len(fields(Counts)), dtype=torch.int64, device=context.device)
    for part in parts:
        sums += torch.stack([*vars(Counts.of(part.tokens_S, part.offsets_G1)).values()]).to(sums.device)
    return Counts(*(context.sum_over_data(sums) if context.holds_loss else sums))


@torch.no_grad()
def forward(
    chunks: Sequence[Any],
    batches: Sequence[PackedBatch],
    objective: Objective,
    shared: Shared,
    context: ParallelContext,
) -> list[Sequences]:
    """What the objective would get of each micro-batch, in order; an empty list except on the last stage."""

    def keep(batch: PackedBatch, output: HeadOutput) -> tuple[Tensor, Tensor, Sequences]:
        sequences = sequences_of(batch, output, objective, shared)
        return sequences.policy_S.sum(), torch.zeros((), dtype=torch.int, device=context.device), sequences

    return run_schedule(chunks, batches, keep, context, forward_only=True, asked=shared.asked)


@torch.no_grad()
def score(
    chunks: Sequence[Any],
    batches: Sequence[PackedBatch],
    context: ParallelContext,
    hidden: bool = False,
    as_trained: bool = False,
) -> list[Scores]:
    """Log-probabilities of each micro-batch, in order; an empty list except on the last stage. hidden: see Scores.
    as_trained: see `run_schedule`."""

    def keep(batch: PackedBatch, output: HeadOutput) -> tuple[Tensor, Tensor, Scores]:
        scores = Scores(response_sums(output.logprob_N, batch, backend), output.logprob_N, output.hidden_ND)
        return scores.sums_S.sum(), torch.zeros((), dtype=torch.int, device=context.device), scores

    backend = kernels_of(chunks)
    return run_schedule(
        chunks, batches, keep, context, forward_only=True, asked=Asked(hidden=hidden), as_trained=as_trained
    )


@dataclass(frozen=True)
class Scores:
    """Log-probabilities of a micro-batch's responses, float64 (rewards: float32), and of their tokens, float32."""

    sums_S: Tensor
    logprob_N: Tensor
    hidden_ND: Tensor | None
    """Where asked for: the rows that the head saw, in the model's dtype."""


def with_reference(
    reference: Sequence[Any], batches: Sequence[PackedBatch], context: ParallelContext, hidden: bool = False
) -> list[PackedBatch]:
    """The batches with a resident reference's log-probabilities; unchanged except on the last stage, which alone
    uses them. hidden: also with its hidden rows, N x E numbers per micro-batch on every tensor-parallel rank."""
    scored = score(reference, batches, context, hidden)
    if not scored:
        return list(batches)
    return [
        replace(batch, reference_S=scores.sums_S, reference_N=scores.logprob_N, reference_hidden_NE=scores.hidden_ND)
        for batch, scores in zip(batches, scored, strict=True)
    ]


def mean_ratio(
    chunks: list, reference: list | None, batches: Sequence[PackedBatch], context: ParallelContext
) -> Tensor:
    """float64 scalar: mean of log policy - log reference over the responses of all data-parallel ranks' micro-batches;
    right on the last stage. The reference's is in the batches where there is no resident one."""
    if reference is not None:
        batches = with_reference(reference, batches, context)
    sums = torch.zeros(2, dtype=torch.float64, device=context.device)
    with settled(chunks):
        scored = score(chunks, batches, context)
    for batch, scores in zip(batches, scored, strict=False):
        assert batch.reference_S is not None
        ratio_S = scores.sums_S.double() - batch.reference_S.to(context.device)
        sums += torch.stack([ratio_S.sum(), torch.tensor(float(len(ratio_S)), device=context.device)])
    if context.holds_loss:
        context.sum_over_data(sums)
    return sums[0] / sums[1].clamp(min=1)
