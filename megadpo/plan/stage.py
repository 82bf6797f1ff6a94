"""A pipeline stage with one layer or two, measured for one micro-batch: what forward leaves behind for backward, how
full it gets, what it sends. `profile` puts whole stages together from these.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from megadpo.config import Config, DataConfig, ModelConfig, ParallelConfig
from megadpo.convert.shape import ModelShape
from megadpo.data.batch import PackedBatch
from megadpo.model.head import Asked, HeadOutput, Rivals
from megadpo.model.policy import Policy
from megadpo.model.reference import build_reference
from megadpo.objectives import Objective
from megadpo.parallel.context import ParallelContext
from megadpo.plan import counts
from megadpo.plan.buckets import Weight
from megadpo.plan.counts import without_te
from megadpo.plan.dry_run import tell_buffers, tell_head
from megadpo.plan.even import Load, even_batch
from megadpo.plan.fake_world import fake_rank
from megadpo.plan.fp8_memory import Kept, keep_in_fp8
from megadpo.plan.numbers import Collective
from megadpo.plan.recorder import Recorder
from megadpo.train.optimizer import wrap

NO_DATA = DataConfig(train=())
LAYER = "decoder.layers.0."


@dataclass(frozen=True)
class Working:
    """Bytes of working memory."""

    activations: int = 0
    logits: int = 0

    def __add__(self, other: Working) -> Working:
        return Working(self.activations + other.activations, self.logits + other.logits)

    def __sub__(self, other: Working) -> Working:
        return Working(self.activations - other.activations, self.logits - other.logits)

    def __mul__(self, times: int) -> Working:
        return Working(self.activations * times, self.logits * times)

    @property
    def total(self) -> int:
        return self.activations + self.logits


@dataclass(frozen=True)
class Pass:
    """One direction of one micro-batch."""

    fullest: Working
    """Over what is there without this micro-batch."""
    calls: tuple[Collective, ...]
    flops: float


class Layer(NamedTuple):
    """What tells layers apart."""

    experts: bool = False
    fp8: Kept | None = None


@dataclass(frozen=True)
class StageKind:
    """What decides the numbers of a short stage. Hashable: measurements are kept for the life of the process."""

    shape: ModelShape
    """Of a model that is as long as needed here."""
    model: ModelConfig
    parallel: ParallelConfig
    """Of as many stages as it takes to have one like this."""
    objective: Objective
    tokens: int
    scored: int
    gpu: bool
    fp8: Kept | None
    """Of its layers."""
    first: bool
    last: bool
    frozen: bool = False
    """Of a reference: its head is asked for log-probabilities alone, whatever the objective wants of the policy's."""


@dataclass(frozen=True)
class Stage:
    """What was measured of it."""

    weights: tuple[Weight, ...]
    """In the order in which the module has them."""
    in_layer: tuple[bool, ...]
    """Of each weight, whether it belongs to the first layer."""
    buffer_bytes: int
    """Of the layer's buffers that belong to the weights."""
    saved: Working
    """What one micro-batch leaves between its forward and its backward pass."""
    forward: Pass
    backward: Pass
    scoring: Working
    """At the fullest instant of a forward pass without gradient."""
    buffers: int


def kind_of(
    shape: ModelShape,
    config: Config,
    layer: Layer,
    layers: int,
    first: bool,
    last: bool,
    tokens: int,
    scored: int,
    gpu: bool,
) -> StageKind:
    """A stage of `layers` layers, all like `layer`, with the embedding (first), with the head (last)."""
    stages = 1 if first and last else 2 if first or last else 3
    count = layers * stages
    short = replace(
        shape,
        num_layers=count,
        experts=shape.experts and replace(shape.experts, layers=(layer.experts,) * count),
        window=shape.window and replace(shape.window, layers=(shape.window.layers * count)[:count]),
    )
    given = config.parallel
    grid = ParallelConfig(
        tensor_model_parallel_size=given.tensor_model_parallel_size,
        pipeline_model_parallel_size=stages,
        expert_model_parallel_size=given.expert_model_parallel_size if shape.experts else 1,
        sequence_parallel=given.sequence_parallel,
    )
    model = replace(without_te(config).model, path="")
    # what the head is asked for is all that matters of the objective; without a head nothing does
    return StageKind(short, model, grid, config.objective, tokens, scored, gpu, layer.fp8, first, last)


def chunk_of(kind: StageKind, config: Config, context: ParallelContext, recorder: Recorder) -> DistributedDataParallel:
    """A stage's model chunk, wrapped; its weights and gradients told to the recorder."""
    chunk = wrap(counts.modules_of(kind.shape, config, context), kind.parallel)[0]
    if kind.fp8 is not None:
        keep_in_fp8(chunk.module, kind.fp8, [True] * kind.shape.num_layers)
    recorder.claim(counts.weight_tensors([chunk]), "weights")
    recorder.claim(counts.gradient_tensors([chunk]), "gradients")
    return chunk


@lru_cache(maxsize=4096)
def measured(kind: StageKind) -> Stage:
    """Build it on fake tensors and run one micro-batch forward and backward."""
    objective, parallel = kind.objective, kind.parallel
    world, rank = place(kind)
    load = Load(kind.tokens, kind.scored, 1)
    batch = even_batch(load, objective, column=False)
    config = Config(run_dir="", model=kind.model, data=NO_DATA, objective=objective, parallel=parallel)
    with fake_rank(parallel, world, rank, kind.gpu) as context, Recorder(context) as recorder:
        chunk = chunk_of(kind, config, context, recorder)
        tell_head(recorder, chunk.module)
        tell_buffers(recorder)
        if kind.shape.latent is None:
            chunk.module.rotary_pos_emb(kind.tokens, packed_seq=True)  # a table that stays
        there = _working(recorder.live)
        recorder.start()
        hidden_TD = None
        if not kind.first:
            rows = kind.tokens // (parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1)
            dtype = chunk.module.config.params_dtype
            hidden_TD = torch.empty(rows, 1, kind.shape.hidden_size, dtype=dtype, requires_grad=True)
            chunk.module.set_input_tensor([hidden_TD])
        with torch.no_grad():
            chunk(*_asked(batch.to(context.device), chunk.module, kind))
        scoring = _working(vars(recorder.peak)) - there
        recorder.start()
        output = chunk(*_asked(batch.to(context.device), chunk.module, kind))
        saved = _working(recorder.live) - there
        forward = Pass(_working(vars(recorder.peak)) - there, recorder.collectives, recorder.flops)
        recorder.start()
        _backward(output)
        backward = Pass(_working(vars(recorder.peak)) - there, recorder.collectives, recorder.flops)
        named = list(chunk.module.named_parameters())
        return Stage(
            weights=tuple(_weight(parameter) for _, parameter in named),
            in_layer=tuple(name.startswith(LAYER) for name, _ in named),
            buffer_bytes=sum(b.nbytes for name, b in chunk.module.named_buffers() if name.startswith(LAYER)),
            saved=saved,
            forward=forward,
            backward=backward,
            scoring=scoring,
            buffers=recorder.live["buffers"],
        )


@dataclass(frozen=True)
class Frozen:
    """Bytes of a short stage of a model that is not trained."""

    layer: int
    """Its first layer."""
    ends: int
    """Embedding, last norm, head, as far as it has them."""


@lru_cache(maxsize=4096)
def frozen(kind: StageKind, fp8_weights: bool) -> Frozen:
    """Build it as a run builds its resident reference."""
    world, rank = place(kind)
    with fake_rank(kind.parallel, world, rank, kind.gpu) as context:
        [module] = build_reference(kind.shape, kind.parallel, context, kind.model, fp8_weights)
        if kind.fp8 is not None:
            keep_in_fp8(module, kind.fp8, [True] * kind.shape.num_layers, trained=False)
        named = [*module.named_parameters(), *module.named_buffers()]
        layers = counts.nbytes(tensor for name, tensor in named if name.startswith("decoder.layers."))
        one = counts.nbytes(tensor for name, tensor in named if name.startswith(LAYER))
        return Frozen(one, counts.nbytes(tensor for _, tensor in named) - layers)


def place(kind: StageKind) -> tuple[int, int]:
    """(ranks of the smallest world that the grid fits in, a rank in the stage that is meant)."""
    grid = kind.parallel
    stages = grid.pipeline_model_parallel_size
    per_stage = max(grid.tensor_model_parallel_size, grid.expert_model_parallel_size)
    stage = 0 if kind.first else stages - 1 if kind.last else 1
    return stages * per_stage, stage * per_stage


def _working(parts: Any) -> Working:
    return Working(parts["activations"], parts["logits"])


def _weight(parameter: torch.nn.Parameter) -> Weight:
    return Weight(
        size=parameter.numel(),
        expert=not getattr(parameter, "allreduce", True),
        shared=getattr(parameter, "shared_embedding", False),
        summed=getattr(parameter, "sequence_parallel", False),
        fp8=getattr(parameter, "in_fp8", False),
    )


def _asked(batch: PackedBatch, module: Policy, kind: StageKind) -> tuple[PackedBatch, Asked]:
    """As train.passes.asked_of asks, with a reference's head and hidden rows where the objective compares with them."""
    if kind.frozen:
        return batch, Asked()
    objective = kind.objective
    weight_VE = module.head_weight() if "kl_N" in objective.needs else None
    if weight_VE is not None:
        weight_VE = torch.empty_like(weight_VE)
        batch = replace(batch, reference_hidden_NE=weight_VE.new_empty(len(batch.targets_N), weight_VE.shape[1]))
    rivals = None if objective.top_k is None else Rivals(objective.top_k, 0, 0)
    return batch, Asked("collision_N" in objective.needs, rivals, weight_VE)


def _backward(output: HeadOutput | Tensor) -> None:
    if isinstance(output, Tensor):
        torch.autograd.backward(output, torch.empty_like(output))
        return
    results = [output.logprob_N, output.kl_N, output.rival_N]
    torch.stack([result.sum() for result in results if result is not None]).sum().backward()
