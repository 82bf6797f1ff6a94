"""One whole step of one rank without its devices: what it holds, what it sends, how full it gets.

`walk` runs train.step.train_step on fake tensors: forward and backward of all micro-batches in the schedule's order,
head, gradient reduction, clipping, AdamW, parameter gather. `record` is the same on a rank that stands, fake or real.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from megadpo.config import Config, ModelConfig
from megadpo.convert.shape import ModelShape
from megadpo.data.batch import PackedBatch
from megadpo.model.head import HeadOutput
from megadpo.model.policy import Policy
from megadpo.parallel.context import ParallelContext
from megadpo.plan import counts
from megadpo.plan.even import Load, even_batch
from megadpo.plan.fake_world import fake_rank
from megadpo.plan.fp8_memory import HOPPER, Kept, keep_in_fp8, layers_in_fp8
from megadpo.plan.numbers import RankNumbers
from megadpo.plan.recorder import Recorder
from megadpo.train.passes import with_reference
from megadpo.train.step import train_step


@dataclass(frozen=True)
class Walk:
    """A dry run of one rank."""

    numbers: RankNumbers
    seconds: float


def walk(
    shape: ModelShape,
    config: Config,
    world_size: int,
    rank: int,
    load: Load,
    gpu: bool = True,
    reference: ModelShape | None = None,
) -> Walk:
    """One step of rank `rank` of `world_size`. The grid fits the model and the world.

    gpu: as fake_world.fake_rank. reference: shape of reference.path, the policy's where None. FP8 is counted as on a
    Hopper, and weights that fp8_param_gather keeps in FP8 as if they were in bfloat16 with casts beside them.
    """
    began = time.perf_counter()
    fp8, config = config.model, counts.without_te(config)
    batches = even_batches(load, config)
    with fake_rank(config.parallel, world_size, rank, gpu) as context:
        numbers = record(shape, config, context, batches, reference, fp8=fp8)
    return Walk(numbers, time.perf_counter() - began)


def even_batches(load: Load, config: Config) -> list[PackedBatch]:
    """A step's micro-batches, all alike. Make them outside a fake world: their data are real."""
    column = config.objective.needs_reference and config.reference.mode != "resident"
    return [even_batch(load, config.objective, column)] * load.micro_batches


def has_second(config: Config) -> bool:
    """Whether there is a second model, beside the policy or coming and going."""
    return config.objective.needs_reference and config.reference.mode != "precomputed"


def record(
    shape: ModelShape,
    config: Config,
    context: ParallelContext,
    batches: Sequence[PackedBatch],
    reference: ModelShape | None = None,
    fill: Callable[[Tensor], object] | None = None,
    before: int = 0,
    fp8: ModelConfig | None = None,
) -> RankNumbers:
    """Build this rank, fake or real, and record one step of it over its micro-batches.

    fill: see counts.build. before: steps that are taken first and not recorded. fp8: what FP8 is to be
    counted; see `walk`.
    """
    with Recorder(context) as recorder:
        state = counts.build(shape, config, context, fill)
        kept = None if fp8 is None else Kept.of(fp8, HOPPER)
        if fp8 is not None and kept is not None:
            for module in state.modules:
                keep_in_fp8(module, replace(kept, gathered=False), layers_in_fp8(fp8, shape.num_layers))
        recorder.claim(counts.weight_tensors(state.chunks), "weights")
        recorder.claim(counts.gradient_tensors(state.chunks), "gradients")
        recorder.claim(counts.optimizer_tensors(state.optimizer), "optimizer")
        other = _frozen(counts.reference_of(reference or shape, config, context), fill) if has_second(config) else None
        frozen = None if kept is None else kept.frozen
        for module in other or []:
            if fp8 is not None and frozen is not None:
                keep_in_fp8(module, frozen, layers_in_fp8(fp8, (reference or shape).num_layers), trained=False)
        recorder.claim(counts.weight_tensors(other or []), "reference")
        for module in [*state.modules, *(other or [])]:
            tell_head(recorder, module)
        tell_buffers(recorder)
        mismatched = batches if "mismatched_kl" in config.objective.needs else None
        arguments = (state, batches, config.objective)
        visit = Visit(other, recorder) if other is not None and config.reference.mode == "swapped" else None
        for _ in range(before + 1):
            recorder.start()
            if visit is None:
                train_step(*arguments, other, context, mismatched, config.seed)
                continue
            train_step(*arguments, None, context, mismatched, config.seed, before_update=visit.come)
            with_reference(visit.chunks, [*batches, *(mismatched or [])], context)
            visit.leave()
        return RankNumbers(
            rank=context.rank,
            stage=context.pipeline_rank,
            parameters=counts.held_by(state).parameters,
            memory=recorder.peak,
            collectives=recorder.collectives,
            flops=recorder.flops,
        )


class Visit:
    """A swapped reference comes when activations are gone, scores and leaves (train/swapped.py). It does so for several
    steps at once; here for one, so that every step has its share of what that sends and computes."""

    def __init__(self, chunks: list[Policy], recorder: Recorder) -> None:
        self.chunks, self._recorder = chunks, recorder
        self._shapes = {parameter: parameter.shape for parameter in counts.parameters_of(chunks)}
        self.leave()

    def come(self) -> None:
        with self._recorder.counting_as("reference"):
            for parameter, size in self._shapes.items():
                parameter.data = torch.empty(size, dtype=parameter.dtype, device=parameter.device)

    def leave(self) -> None:
        for parameter in self._shapes:
            parameter.data = torch.empty(0, dtype=parameter.dtype, device=parameter.device)


def _frozen(modules: list[Policy], fill: Callable[[Tensor], object] | None) -> list[Policy]:
    """With something in them: weights in FP8 have zeros, and the others what `fill` gives."""
    if fill is not None:
        for parameter in counts.parameters_of(modules):
            fill(parameter.data)
        for module in modules:
            for buffer in module.buffers():
                buffer.zero_()
    return modules


def tell_head(recorder: Recorder, module: Policy) -> None:
    """What the head makes, forward and backward, counts as logits."""
    if not module.post_process:
        return
    undo: list[Any] = []

    def begin(*_: Any) -> None:
        undo.append(recorder.counting_as("logits"))
        undo[-1].__enter__()

    def end(*_: Any) -> None:
        undo.pop().__exit__(None, None, None)

    def after_forward(head: torch.nn.Module, inputs: Any, output: HeadOutput) -> None:
        end()
        for result in (output.logprob_N, output.kl_N, output.rival_N):
            if result is not None and result.grad_fn is not None:
                result.grad_fn.register_prehook(begin)
                result.grad_fn.register_hook(end)

    module.output_layer.register_forward_pre_hook(begin)
    module.output_layer.register_forward_hook(after_forward)


def tell_buffers(recorder: Recorder) -> None:
    """Megatron-Core's buffer for gathered activations counts as such. It lasts as long as the grid."""
    buffer = parallel_state.get_global_memory_buffer()
    get = buffer.get_tensor

    def get_tensor(*args: Any, **kwargs: Any) -> Tensor:
        with recorder.counting_as("buffers"):
            return get(*args, **kwargs)

    buffer.get_tensor = get_tensor
