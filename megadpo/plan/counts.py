"""What a rank holds before its first step: parameters, and the bytes of weights, gradients and optimizer state.

Nothing is computed from sizes: the model is built, wrapped and given its optimizer by the functions that training
calls, and what is there is counted. So Megatron-Core's padding, its dealing of layers to stages and of optimizer state
to data-parallel ranks are in the numbers. The same functions count a real rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor

from megadpo.config import Config, ModelConfig
from megadpo.convert.shape import ModelShape
from megadpo.model.build import build_chunks
from megadpo.model.policy import Policy
from megadpo.model.reference import build_reference
from megadpo.parallel.context import ParallelContext
from megadpo.plan.fake_world import fake_rank
from megadpo.train.optimizer import build_optimizer, wrap
from megadpo.train.state import TrainState


@dataclass(frozen=True)
class Held:
    """Of one rank, without activations."""

    parameters: int
    """Numbers that are trained. A weight that two stages hold (tied embeddings) counts on each."""
    weights: int
    """Bytes, with the padding of the buffers that the distributed optimizer gathers into."""
    gradients: int
    """Bytes of the gradient buffers, padding included."""
    optimizer: int
    """Bytes of float32 masters, where they are no view of the weights, and of both moments."""


def held(shape: ModelShape, config: Config, world_size: int, rank: int, gpu: bool = True) -> Held:
    """What rank `rank` of `world_size` holds. The grid fits the model and the world."""
    config = without_te(config)
    with fake_rank(config.parallel, world_size, rank, gpu) as context:
        return held_by(build(shape, config, context))


def build(
    shape: ModelShape, config: Config, context: ParallelContext, fill: Callable[[Tensor], object] | None = None
) -> TrainState:
    """Model, gradient buffers and optimizer of this rank, fake or real, as before its second step.

    fill: called on every parameter, before the optimizer copies them.
    """
    chunks = wrap(modules_of(shape, config, context), config.parallel)
    if fill is not None:
        for parameter in parameters_of(chunks):
            fill(parameter.data)
    optimizer = build_optimizer(chunks, config.optimizer, config.parallel)
    _make_moments(optimizer)
    return TrainState(chunks, optimizer)


def modules_of(shape: ModelShape, config: Config, context: ParallelContext) -> list[Policy]:
    """This rank's bare model chunks."""
    return build_chunks(shape, config.parallel, context, config.model)


def reference_of(shape: ModelShape, config: Config, context: ParallelContext) -> list[Policy]:
    """This rank's chunks of a frozen model beside the policy."""
    return build_reference(shape, config.parallel, context, config.model, config.reference.fp8_weights)


def without_te(config: Config) -> Config:
    """Without what needs Transformer Engine, whose kernels take no fake tensors: FP8 products and the overlap inside
    tensor-parallel layers. Nor do Triton's; its head holds the same memory as the chunked one."""
    backend = "chunked" if config.model.logprob_backend == "triton" else config.model.logprob_backend
    model = replace(ModelConfig(config.model.path, config.model.dtype, config.model.recompute), logprob_backend=backend)
    return replace(config, model=model, parallel=replace(config.parallel, tp_comm_overlap=False))


def held_by(state: TrainState) -> Held:
    """Of a rank that stands."""
    weights, gradients = list(weight_tensors(state.chunks)), list(gradient_tensors(state.chunks))
    return Held(
        parameters=sum(parameter.numel() for parameter in parameters_of(state.chunks)),
        weights=nbytes(weights),
        gradients=nbytes(gradients),
        optimizer=nbytes([*weights, *optimizer_tensors(state.optimizer)]) - nbytes(weights),
    )


def parameters_of(chunks: Iterable[torch.nn.Module]) -> list[torch.nn.Parameter]:
    """Each once."""
    found = {id(parameter): parameter for chunk in chunks for parameter in chunk.parameters()}
    return list(found.values())


def weight_tensors(chunks: Iterable[torch.nn.Module]) -> Iterator[Tensor]:
    """Parameters, and buffers that belong to the weights (a router's frozen biases)."""
    for chunk in chunks:
        yield from chunk.parameters()
        yield from (buffer for _, buffer in chunk.named_buffers())  # data parallelism has a list called buffers


def gradient_tensors(chunks: Iterable[DistributedDataParallel]) -> Iterator[Tensor]:
    for chunk in chunks:
        for buffer in [*chunk.buffers, *chunk.expert_parallel_buffers]:
            yield buffer.grad_data


def optimizer_tensors(optimizer: MegatronOptimizer) -> Iterator[Tensor]:
    """What is updated (masters; the weights themselves where there are none) and the moments."""
    for adam in _adams(optimizer):
        for group in adam.param_groups:
            yield from group["params"]
        for state in adam.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor))


def nbytes(tensors: Iterable[Tensor]) -> int:
    """Of the storages behind them, each once."""
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def _make_moments(optimizer: MegatronOptimizer) -> None:
    """AdamW makes them in its first step."""
    for adam in _adams(optimizer):
        for group in adam.param_groups:
            for parameter in group["params"]:
                if not adam.state[parameter]:
                    adam.initialize_state(parameter)


def _adams(optimizer: MegatronOptimizer) -> list:
    """Megatron-Core keeps one for experts and one for the other weights; a rank may have nothing for one of them."""
    return [part.optimizer for part in optimizer.chained_optimizers if part.optimizer is not None]
