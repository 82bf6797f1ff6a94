"""Held-out metrics over a whole store, without a gradient: the objective's own, lengths, KL to the reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megadpo.data.stream import Scored
from megadpo.objectives import Objective, Sequences
from megadpo.objectives.kinds import kind_of
from megadpo.objectives.listwise import differences
from megadpo.parallel.context import ParallelContext
from megadpo.train.passes import Shared, asked_of, forward, global_counts, kernels_of, mean_ratio, with_reference
from megadpo.train.step import Sums, read, total, totals_across, totals_of

BINS = 10
"""Of the expected calibration error, over confidences of 1/2 to 1."""


@torch.no_grad()
def evaluate(
    chunks: Sequence[Any],
    held_out: Scored,
    objective: Objective,
    reference: list | None,
    per_pass: int,
    context: ParallelContext,
    on_pass: Callable[[], None] = lambda: None,
) -> Sums:
    """Loss and metrics over every group of the stream's store, each group once.

    reference: a resident reference's chunks. per_pass: groups given to the pipeline at once. on_pass: called before
    each. The store is one batch for the objective, so its loss and metrics are exact means over it. See `Also` for what
    is measured besides.
    """
    drift = _drift(chunks, held_out, reference, per_pass, context, on_pass)
    # tokens are drawn alike in every evaluation
    shared = Shared(None, drift, kernels_of(chunks), asked_of(objective, reference, seed=0, consumed=0))
    kept: list[Sequences] = []
    for start in range(0, len(held_out.stream.store), per_pass):
        on_pass()
        groups = np.arange(start, min(start + per_pass, len(held_out.stream.store)))
        batches = held_out.stream.batches(groups, context.data_rank, held_out.column)
        if reference is not None:
            batches = with_reference(reference, batches, context, hidden="kl_N" in objective.needs)
        kept += forward(chunks, batches, objective, shared, context)
    whole = global_counts(kept, context)
    kept = [replace(sequences, whole=whole) for sequences in kept]
    if objective.whole_batch:
        totals, _ = totals_across(kept, objective, context)
    else:
        totals = total([totals_of(objective(part), part) for part in kept], objective, context)
    sums = read(totals, objective, context)
    also = Also.of(objective, has_reference=held_out.column is not None or reference is not None)
    return replace(sums, metrics=sums.metrics | also.means(kept, context))


def _drift(
    chunks: Sequence[Any],
    held_out: Scored,
    reference: list | None,
    per_pass: int,
    context: ParallelContext,
    on_pass: Callable[[], None],
) -> Tensor | None:
    """float64 scalar: mean log-ratio over all mismatched responses, for objectives that need it; right on the last
    stage."""
    if held_out.mismatched is None:
        return None
    size = len(held_out.mismatched.stream.store)
    mean = torch.zeros((), dtype=torch.float64, device=context.device)
    for start in range(0, size, per_pass):
        on_pass()
        count = min(per_pass, size - start)
        batches = held_out.mismatched_batches(start, count, context.data_rank)
        assert batches is not None
        mean += mean_ratio(list(chunks), reference, batches, context) * (count / size)
    return mean


@dataclass(frozen=True)
class Also:
    """What is measured beside the objective's own metrics; each is a sum over a count.

    names: `lengths/...`: scored tokens of the responses (pairs: chosen and rejected; lists: best and worst; unpaired:
    by label). `kl/token`: mean over scored tokens of log policy - log reference, which estimates the KL divergence on
    responses that the policy wrote itself, and is its mean log-ratio on others. calibrated: for a reward model also
    `rewards/ece`, see `calibration`.
    """

    kind: str
    names: tuple[str, ...]
    calibrated: bool

    @staticmethod
    def of(objective: Objective, has_reference: bool) -> Also:
        kind, scalar = kind_of(objective), objective.head == "scalar"
        branches = {"demonstrations": ("response",), "lists": ("best", "worst")}.get(kind, ("chosen", "rejected"))
        names = [f"lengths/{name}" for name in branches]
        if has_reference and not scalar:
            names.append("kl/token")
        return Also(kind, tuple(names), scalar)

    def means(self, kept: Sequence[Sequences], context: ParallelContext) -> dict[str, float]:
        """Over the micro-batches of all data-parallel ranks; the same on every rank."""
        size = 2 * len(self.names)
        sums = torch.zeros(size + 3 * BINS, dtype=torch.float64, device=context.device)
        for part in kept:
            pairs = [*self._lengths(part)]
            if "kl/token" in self.names:
                ratio_S = part.field("policy_S") - part.field("reference_S")
                pairs.append((ratio_S.sum(), part.tokens_S.sum()))
            sums[:size] += torch.stack([value.double() for pair in pairs for value in pair])
            if self.calibrated:
                # a pair's label is its order, whatever its scores; a list's order says nothing where two are equal
                sums[size:] += _confidences(part if self.kind == "lists" else replace(part, scores_S=None)).flatten()
        if context.holds_loss:
            context.sum_over_data(sums)
        values = context.from_last_stage(sums).cpu()
        found = {name: float(values[2 * k] / values[2 * k + 1].clamp(min=1)) for k, name in enumerate(self.names)}
        return found | ({"rewards/ece": calibration(values[size:].view(3, BINS))} if self.calibrated else {})

    def _lengths(self, part: Sequences) -> list[tuple[Tensor, Tensor]]:
        """(sum of lengths, how many) of each branch."""
        tokens_S, first, last = part.tokens_S, part.offsets_G1[:-1], part.offsets_G1[1:] - 1
        if self.kind == "unpaired":
            good_S = part.field("labels_S")
            return [((tokens_S * which).sum(), which.sum()) for which in (good_S, ~good_S)]
        groups = torch.tensor(len(first), device=tokens_S.device)
        ends = (first,) if self.kind == "demonstrations" else (first, last)
        return [(tokens_S[end].sum(), groups) for end in ends]


def _confidences(part: Sequences) -> Tensor:
    """float64 [3, BINS]: of every two responses of a group, how many have a confidence in the bin; how many of them are
    in the right order (a tie counts half); the sum of their confidences. Confidence: sigmoid(|r_i - r_j|). Two with the
    same score have no right order and do not count."""
    found = torch.zeros(3, BINS, dtype=torch.float64, device=part.policy_S.device)
    for margins, ordered in differences(part.field("policy_S"), part):
        margin = margins[ordered]
        confidence = margin.abs().sigmoid()
        bins = ((confidence - 0.5) * 2 * BINS).long().clamp(max=BINS - 1)
        right = (torch.sign(margin) + 1) / 2
        found.index_add_(1, bins, torch.stack([torch.ones_like(margin), right, confidence]))
    return found


def calibration(bins: Tensor) -> float:
    """Expected calibration error (Guo et al. 2017, equation 3): sum over bins of n_b / n |right_b - confidence_b|, from
    float64 [3, BINS] of counts, right ones and summed confidences. 0: a model that is right as often as it thinks."""
    count, right, confidence = bins
    return float((right - confidence).abs().sum() / count.sum().clamp(min=1))
