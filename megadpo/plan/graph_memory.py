"""What CUDA graphs hold (model/graphs.py), whatever is in flight: memory that no replay of another graph may use.

Each holds what its part of a layer leaves between the passes, its input and output, the gradient that goes into its
backward pass and, in FP8, its own casts of the weights. Graphs of one turn share the rest of their memory. Weights'
gradients are taken to be added inside the product, and to need none. Not compared with a device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from unittest.mock import patch

import torch
from megatron.core.tensor_parallel import layers
from torch import Tensor

from megadpo.config import Config
from megadpo.model.graphs import Part
from megadpo.plan import counts, pipeline
from megadpo.plan.dry_run import tell_buffers
from megadpo.plan.fake_world import fake_rank
from megadpo.plan.fp8_memory import linear_layers
from megadpo.plan.recorder import Recorder
from megadpo.plan.stage import NO_DATA, Layer, StageKind, chunk_of, place


@dataclass(frozen=True)
class Graphed:
    """Bytes of the captured part of one layer."""

    saved: int
    """What a micro-batch leaves of it without graphs: it is among Stage.saved."""
    held: int
    """By the graphs of one micro-batch, for good."""
    working: int
    """What more the passes take at their fullest."""
    casts: int
    """Kept beside the weights without graphs; of a captured layer each graph has its own, in `held`."""


@lru_cache(maxsize=4096)
def graphed(kind: StageKind) -> Graphed:
    """Run the part of the first layer of a stage on fake tensors. kind: of one layer without ends."""
    parallel = kind.parallel
    world, rank = place(kind)
    config = Config(run_dir="", model=kind.model, data=NO_DATA, objective=kind.objective, parallel=parallel)
    with fake_rank(parallel, world, rank, kind.gpu) as context, Recorder(context) as recorder:
        chunk = chunk_of(kind, config, context, recorder)
        tell_buffers(recorder)
        layer = chunk.module.decoder.layers[0]
        _add_inside(layer)
        rows = kind.tokens // (parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1)
        there = recorder.live["activations"]
        dtype = chunk.module.config.params_dtype
        hidden_TD = torch.empty(rows, 1, kind.shape.hidden_size, dtype=dtype, requires_grad=True)
        recorder.start()
        found = layer.row_by_row(hidden_TD)
        left = recorder.live["activations"] - there
        fullest = recorder.peak.activations - there
        outputs = [output for output in found if output.requires_grad]
        gradients = [torch.empty_like(output) for output in outputs]
        recorder.start()
        with patch.object(layers, "fused_weight_gradient_mlp_cuda", Added, create=True):
            torch.autograd.backward(outputs, gradients)
        given = counts.nbytes(gradients)
        fullest = max(fullest, recorder.peak.activations - there - given)
        casts = counts.nbytes(cast for name, cast in Part(layer).named_buffers() if name.endswith("fp8_casts"))
        # without a graph the shared experts' output is gone when it has been added to the others'
        passing = counts.nbytes(found[4:])
    return Graphed(left - passing, left + given + casts, fullest - left, casts)


class Added:
    """Stands in for the products that add to the float32 gradients."""

    @staticmethod
    def wgrad_gemm_accum_fp32(x: Tensor, dy: Tensor, main_grad: Tensor) -> None:
        return

    wgrad_gemm_accum_fp16 = wgrad_gemm_accum_fp32


def _add_inside(layer: torch.nn.Module) -> None:
    module: Any
    for module in linear_layers(layer).values():
        module.gradient_accumulation_fusion = True
        del module.weight.grad_added_to_main_grad  # else a gradient without numbers is made in its place


@dataclass(frozen=True)
class ChunkGraphs:
    """Bytes of a model chunk's."""

    held: int
    saved: int
    """Of one micro-batch, without graphs."""
    casts: int


def of_chunk(
    chunk: Iterable[Layer], scopes: Sequence[str], turns: int, measured: Callable[[Layer], Graphed]
) -> ChunkGraphs:
    """chunk: its layers. turns: micro-batches that may be in flight. scopes: model.cuda_graphs."""
    mine = [measured(layer) for layer in chunk if ("moe_router" if layer.experts else "mlp") in scopes]
    return ChunkGraphs(
        held=turns * (sum(one.held for one in mine) + max((one.working for one in mine), default=0)),
        saved=sum(one.saved for one in mine),
        casts=sum(one.casts for one in mine),
    )


@lru_cache(maxsize=1024)
def turns_of(rank: int, ranks: int, chunks: int) -> tuple[int, ...]:
    """Of every chunk of a pipeline rank, the most micro-batches in flight, whatever their number in a step."""
    most = [1] * chunks
    for count in range(ranks, 4 * ranks + 1, ranks):
        now = [0] * chunks
        for backward, chunk, _ in pipeline.order(rank, ranks, chunks, count):
            now[chunk] += -1 if backward else 1
            most[chunk] = max(most[chunk], now[chunk])
    return tuple(most)
