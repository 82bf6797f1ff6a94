"""Logits of a plain text, for comparing a model with what others compute. Training never makes them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megadpo.data.batch import PackedBatch, Segment
from megadpo.model.policy import Policy
from megadpo.parallel.context import ParallelContext


@torch.no_grad()
def text_logits(policy: Policy, ids: Sequence[int], context: ParallelContext) -> Tensor:
    """float32 [len(ids), vocabulary] of one sequence; every tensor-parallel rank gets all of it. One pipeline stage."""
    assert context.pipeline_size == 1, "logits of a text are for models on one pipeline stage"
    length = -(-len(ids) // context.tensor_size) * context.tensor_size
    tokens = torch.zeros(length, dtype=torch.int64)
    tokens[: len(ids)] = torch.tensor(ids)
    nothing = torch.zeros(0, dtype=torch.int64)
    batch = PackedBatch(
        tokens_T=tokens,
        positions_T=torch.arange(length),
        rows_N=nothing,
        targets_N=nothing,
        tokens_S=nothing,
        offsets_G1=torch.zeros(1, dtype=torch.int64),
        reference_S=None,
        segments=(Segment(0, len(ids), 0, 0),),
        groups=(),
        used=len(ids),
    ).to(context.device)
    hidden_TD = policy.hidden_states(batch)[:, 0]
    if context.sequence_parallel:
        hidden_TD = _joined(hidden_TD, context, axis=0)
    tied = policy.tied_weight()
    part = hidden_TD[: len(ids)] @ (policy.output_layer.weight if tied is None else tied).t()
    logits = _joined(part, context, axis=1)[:, : policy.shape.vocab_size].float()
    cap = policy.shape.logit_soft_cap
    return cap * torch.tanh(logits / cap) if cap else logits


def _joined(part: Tensor, context: ParallelContext, axis: int) -> Tensor:
    """The tensor-parallel ranks' parts, one after the other along an axis."""
    parts = [torch.empty_like(part) for _ in range(context.tensor_size)]
    dist.all_gather(parts, part.contiguous(), group=context.groups.tp)
    return torch.cat(parts, axis)
