"""Logits of a plain text, for comparing a model with what others compute. Training never makes them."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megadpo.config import ModelConfig, ParallelConfig
from megadpo.convert.importer import load_hf
from megadpo.convert.shape import ModelShape
from megadpo.data.batch import PackedBatch, Segment
from megadpo.model.build import build_chunks
from megadpo.model.policy import Policy
from megadpo.parallel.context import ParallelContext, grid, join_world


def folder_logits(
    shape: ModelShape,
    weights: Path,
    ids: Sequence[int],
    positions: Sequence[Sequence[int]],
    dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """float32 [len(ids), vocabulary] for each list of positions, in this process alone.

    weights: a Hugging Face folder, an imported one, or a checkpoint of a run. dtype: what they are rounded to first.
    Joins and leaves a process group.
    """
    with tempfile.TemporaryDirectory() as meeting:
        device = join_world(0, 1, 0, f"file://{meeting}/rendezvous")
        try:
            with grid(ParallelConfig(), device, 0) as context:
                chunks = build_chunks(shape, ParallelConfig(), context, ModelConfig(str(weights), "float32"))
                load_hf(chunks, shape, weights)
                for weight in chunks[0].parameters():
                    weight.data.copy_(weight.data.to(dtype or weight.dtype))
                return [text_logits(chunks[0], ids, context, at).cpu() for at in positions]
        finally:
            dist.destroy_process_group()


@torch.no_grad()
def text_logits(
    policy: Policy, ids: Sequence[int], context: ParallelContext, positions: Sequence[int] | None = None
) -> Tensor:
    """float32 [len(ids), vocabulary] of one sequence; every tensor-parallel rank gets all of it. One pipeline stage.

    positions: of the tokens, rising; 0, 1, 2 ... where not given.
    """
    assert context.pipeline_size == 1, "logits of a text are for models on one pipeline stage"
    length = -(-len(ids) // context.tensor_size) * context.tensor_size
    tokens = torch.zeros(length, dtype=torch.int64)
    tokens[: len(ids)] = torch.tensor(ids)
    positions_T = torch.arange(length)
    if positions is not None:
        positions_T[: len(ids)] = torch.tensor(positions)
    nothing = torch.zeros(0, dtype=torch.int64)
    batch = PackedBatch(
        tokens_T=tokens,
        positions_T=positions_T,
        rows_N=nothing,
        targets_N=nothing,
        tokens_S=nothing,
        offsets_G1=torch.zeros(1, dtype=torch.int64),
        reference_S=None,
        segments=(Segment(0, len(ids), 0, 0),),
        groups=(),
        used=len(ids),
    ).to(context.device)
    hidden_TD = policy.hidden_states(batch, int(positions_T.max()) + 1)[:, 0]
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
