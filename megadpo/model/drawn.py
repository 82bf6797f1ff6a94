"""Random weights, drawn where they are used: for measuring speed, which does not depend on them."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import torch

from megadpo.convert.shape import ModelShape
from megadpo.parallel.context import ParallelContext

SPREAD = 0.02
"""Standard deviation of matrices, as in most published initialisations."""


@torch.no_grad()
def draw_weights(chunks: Sequence[Any], shape: ModelShape, seed: int, context: ParallelContext) -> None:
    """Fill every parameter in place: matrices with normal numbers, norms with what leaves their input as it is, biases
    with 0. Replicas get the same numbers; other grids get others."""
    groups = context.groups
    for number, chunk in enumerate(chunks):
        for name, parameter in chunk.named_parameters():
            if parameter.dim() < 2:
                norm = name.endswith(("norm.weight", "norm_weight"))
                parameter.fill_(float(norm and not shape.norms.zero_centred))
                continue
            if getattr(parameter, "allreduce", True):
                split = context.tensor_rank if getattr(parameter, "tensor_model_parallel", False) else 0
            else:  # an expert's
                split = (groups.ep.rank() * groups.expt_tp.size() + groups.expt_tp.rank()) if groups.ep else 0
            tied = shape.tied and (name.startswith(("embedding.", "output_layer.")))
            place = "tied" if tied else f"{context.pipeline_rank}.{number}.{name}"
            generator = torch.Generator(context.device).manual_seed(zlib.crc32(f"{seed}.{split}.{place}".encode()))
            values = torch.empty(parameter.shape, dtype=torch.float32, device=context.device)
            parameter.copy_(values.normal_(0.0, SPREAD, generator=generator))
