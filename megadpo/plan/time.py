"""Seconds of a step on a grid, and where they go. Pure functions of sizes; the constants are in constants.py.

What a rank holds and sends (`RankNumbers`) is counted elsewhere, by the code that runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from megadpo.config import Config
from megadpo.convert.shape import ModelShape
from megadpo.model.flops import TRAINING, forward_flops
from megadpo.observe.gpus import Gpu
from megadpo.plan import constants as c
from megadpo.plan.fp8_memory import layers_in_fp8
from megadpo.plan.layers import Grid, LayerKind, LayerTime, head_time, layer_time
from megadpo.plan.machine import Device, Wire, wire
from megadpo.plan.numbers import RankNumbers
from megadpo.plan.pipeline import StageTime, Timeline, simulate
from megadpo.plan.workload import Work
from megadpo.train.loop import groups_per_pass


@dataclass(frozen=True)
class Parts:
    """Seconds of one step, on the pipeline rank that has most to compute. Their sum is the step."""

    layers: float
    """Linear layers, norms and the rest of the layers but attention."""
    attention: float
    head: float
    recompute: float
    """Of activations, in the backward passes; with the collectives that are repeated."""
    tensor: float
    """Tensor-, sequence- and expert-parallel collectives that nothing hides."""
    pipeline: float
    """Waiting for other stages, messages included."""
    data: float
    """Gradient reduction and parameter gather that nothing hides."""
    optimizer: float
    reference: float
    """The reference's pass: in every step (resident, swapped), or once, its part of each step (precomputed)."""
    passes: float
    """Further forward passes that the objective asks for."""
    other: float

    @property
    def total(self) -> float:
        return sum(vars(self).values())


@dataclass(frozen=True)
class Estimate:
    parts: Parts
    update: float
    """Seconds between two updates, as the log will show them: without a reference's pass before training."""
    mfu: float
    """Model FLOPs over what the GPUs could do in bfloat16 in that time: 3 forward passes of the rows that are no
    padding, a prompt counted once (model/flops.py); neither recompute nor the reference counts."""
    pairs_per_second: float
    """Groups."""
    tokens_per_second_per_gpu: float
    """Rows of the stream that are no padding."""

    @property
    def step(self) -> float:
        return self.parts.total


@dataclass(frozen=True)
class Situation:
    """All that the time depends on."""

    shape: ModelShape
    reference: ModelShape
    config: Config
    gpu: Gpu
    gpus: int
    work: Work
    layers: tuple[int, ...]
    """Layers of every (virtual) stage in order."""
    reference_layers: tuple[int, ...]
    """The reference's."""
    steps: int
    """Of the run."""
    scored_steps: float
    """Steps' worth of groups that a precomputed reference is run on."""

    @property
    def stages(self) -> int:
        return self.config.parallel.pipeline_model_parallel_size

    @property
    def grid(self) -> Grid:
        parallel = self.config.parallel
        return Grid(
            parallel.tensor_model_parallel_size, parallel.expert_model_parallel_size, parallel.sequence_parallel
        )

    @property
    def replicas(self) -> int:
        return self.gpus // (self.config.parallel.tensor_model_parallel_size * self.stages)

    @property
    def device(self) -> Device:
        model = self.config.model
        return Device(self.gpu, model.fp8_recipe if model.real_fp8 else None)

    def wire(self, group: str, ranks: int) -> Wire:
        """Ranks are laid out tensor first, then data, then pipeline; experts are dealt to neighbours."""
        tensor, expert = self.grid.tensor, self.grid.expert
        pipeline = tensor * self.replicas
        strides = {"data": tensor, "expert data": expert if expert > 1 else tensor, "pipeline": pipeline}
        strides["embedding"] = (self.stages - 1) * pipeline  # the first stage and the last
        stride = strides.get(group, 1)
        return wire(self.gpu, ranks, stride, self.gpus)


@dataclass(frozen=True)
class _Stage:
    """One micro-batch in one (virtual) stage: seconds."""

    layers: float
    """Forward and backward."""
    attention: float
    head: float
    recompute: float
    tensor: float
    forward: float
    backward: float


def estimate(situation: Situation, every: Sequence[RankNumbers], reference: Sequence[RankNumbers]) -> Estimate:
    """every: of a rank of every pipeline stage, without a reference. reference: the same of its shape."""
    stages = _stages(situation, every)
    timeline = _run(situation, stages, forward_only=False)
    rank = max(range(situation.stages), key=lambda r: timeline.busy[r])
    mine = stages[rank :: situation.stages]
    count = situation.work.micro_batches

    def of(name: str) -> float:
        return count * sum(getattr(stage, name) for stage in mine)

    forward = _run(situation, stages, forward_only=True).length
    optimizer = max(_optimizer(situation, stage) for stage in every)
    in_step, before = _reference(situation, reference, optimizer)
    extra = _extra_passes(situation) * forward
    parts = Parts(
        layers=of("layers"),
        attention=of("attention"),
        head=of("head"),
        recompute=of("recompute"),
        tensor=of("tensor"),
        pipeline=timeline.length - timeline.busy[rank],
        data=_data(situation, every, stages, timeline),
        optimizer=optimizer,
        reference=in_step + before,
        passes=extra,
        other=c.STEP_SECONDS,
    )
    update = parts.total - before
    work, replicas = situation.work, situation.replicas
    return Estimate(
        parts,
        update,
        mfu=model_flops(situation) / (update * situation.gpus * situation.gpu.bf16_flops),
        pairs_per_second=situation.config.batch.global_batch_size / update,
        tokens_per_second_per_gpu=work.mean_rows * count * replicas / update / situation.gpus,
    )


def model_flops(situation: Situation) -> float:
    """Operations of a step, over all ranks, that MFU counts: those of the log (train/speed.py, Meter.useful)."""
    work = situation.work
    one = forward_flops(situation.shape).forward(work.useful_rows, work.useful_area, work.mean_scored)
    return TRAINING * one * work.micro_batches * situation.replicas


def _run(situation: Situation, stages: Sequence[_Stage], forward_only: bool) -> Timeline:
    times = [StageTime(stage.forward, stage.backward) for stage in stages]
    virtual = len(stages) // situation.stages
    message = 0.0
    if situation.stages > 1:
        rows = situation.work.tokens / situation.grid.outside
        size = rows * situation.shape.hidden_size * (2 if situation.config.model.dtype == "bfloat16" else 4)
        # Two neighbours; whether they share a node depends on how far apart they stand.
        message = situation.wire("pipeline", 2).seconds("send", 1, size)
    count = situation.work.micro_batches
    return simulate(times, situation.stages, count, message, blocking=virtual == 1, forward_only=forward_only)


def _stages(situation: Situation, numbers: Sequence[RankNumbers]) -> list[_Stage]:
    """Every (virtual) stage, in the order of the layers."""
    shape = situation.shape
    virtual = len(situation.layers) // situation.stages
    times: dict[LayerKind, LayerTime] = {}
    every = _kinds(situation)
    found, first = [], 0
    for number, layers in enumerate(situation.layers):
        kinds = every[first : first + layers]
        for kind in set(kinds) - times.keys():
            times[kind] = layer_time(shape, situation.grid, situation.work, situation.device, kind)
        rank = numbers[number % situation.stages]
        has_head = number == len(situation.layers) - 1
        found.append(_stage(situation, [times[kind] for kind in kinds], has_head, rank, virtual))
        first += layers
    return found


def _kinds(situation: Situation) -> list[LayerKind]:
    """Of every layer."""
    shape = situation.shape
    none = (False,) * shape.num_layers
    experts = shape.experts.layers if shape.experts else none
    windows = shape.window.layers if shape.window else none
    fp8 = layers_in_fp8(situation.config.model, shape.num_layers)
    return [LayerKind(*kind) for kind in zip(experts, fp8, windows, strict=True)]


def _stage(
    situation: Situation, layers: Sequence[LayerTime], has_head: bool, numbers: RankNumbers, virtual: int
) -> _Stage:
    recompute = situation.config.model.recompute
    head_f = head_b = 0.0
    if has_head:
        head = head_time(situation.shape, situation.grid.tensor, situation.work.most_scored, situation.device)
        head_f, head_b = head.forward, head.backward
    linear_f, linear_b = (sum(getattr(one.products, way) for one in layers) for way in ("forward", "backward"))
    attention_f, attention_b = (sum(getattr(one.attention, way) for one in layers) for way in ("forward", "backward"))
    again = {"none": 0.0, "selective": attention_f, "full": linear_f + attention_f}[recompute]
    exposed_f, exposed_b, exposed_again, hidden = _collectives(situation, numbers, virtual, recompute == "full")
    exposed_b += max(0.0, hidden - sum(one.wgrad for one in layers))
    return _Stage(
        layers=linear_f + linear_b,
        attention=attention_f + attention_b,
        head=head_f + head_b,
        recompute=again + exposed_again,
        tensor=exposed_f + exposed_b,
        forward=linear_f + attention_f + head_f + exposed_f,
        backward=linear_b + attention_b + head_b + exposed_b + again + exposed_again,
    )


PHASES: Mapping[str, tuple[float, float, float]] = {
    # of a layer's calls: forward; backward and waited for; backward, beside the weights' gradient
    "all_gather": (2, 2, 2),
    "reduce_scatter": (2, 0, 2),
    "all_reduce": (2, 0, 2),
    "all_to_all": (2, 2, 0),
}
"""A layer's calls in tensor- and expert-parallel groups. Under sequence parallelism the inputs of both column-parallel
layers are gathered and the outputs of both row-parallel layers reduce-scattered; backward, both gradients are gathered
before the products, the inputs once more beside them, and the input gradients reduce-scattered beside the weights'
products. Without it, sums in their place (tensor_parallel/layers.py). Full recompute repeats the forward ones."""


def _collectives(
    situation: Situation, numbers: RankNumbers, virtual: int, full: bool
) -> tuple[float, float, float, float]:
    """Seconds of one micro-batch in one virtual stage: forward, backward, repeated by recompute, and what can be hidden
    behind the products of the weights' gradients."""
    share = 1 / (situation.work.micro_batches * virtual)
    found = [0.0, 0.0, 0.0, 0.0]
    for one in numbers.collectives:
        phases = PHASES.get(one.kind)
        if one.group not in ("tensor", "expert") or phases is None:
            continue
        seconds = situation.wire(one.group, one.ranks).seconds(one.kind, one.calls, one.bytes) * share
        forward, waited, beside = phases
        repeated = forward if full else 0.0
        whole = forward + waited + repeated + beside
        for place, part in enumerate((forward, waited, repeated, beside)):
            found[place] += seconds * part / whole
    return found[0], found[1], found[2], found[3]


def _data(situation: Situation, numbers: Sequence[RankNumbers], stages: Sequence[_Stage], timeline: Timeline) -> float:
    """Seconds that gradients and parameters on their way between replicas add to a step: the gradients' after the last
    backward pass of the stage that is through last, then the parameters'."""
    parallel = situation.config.parallel
    through, gather = 0.0, 0.0
    for rank, one in enumerate(numbers):
        mine = stages[rank :: situation.stages]
        reduce_ = sum(_between_replicas(situation, one, kind) for kind in ("reduce_scatter", "all_reduce"))
        gathered = _between_replicas(situation, one, "all_gather")
        last_bucket = min(1.0, c.BUCKETS_LEFT / max(one.parameters, 1))
        if parallel.overlap_grad_reduce:
            reduce_ = max(reduce_ - sum(stage.backward for stage in mine), reduce_ * last_bucket)
        if parallel.overlap_param_gather:
            gathered = max(gathered - sum(stage.forward for stage in mine), gathered * last_bucket)
        tied = sum(
            situation.wire(group.group, group.ranks).seconds(group.kind, group.calls, group.bytes)
            for group in one.collectives
            if group.group == "embedding"
        )
        through = max(through, timeline.end[rank] + reduce_ + tied)
        gather = max(gather, gathered)
    return max(0.0, through - timeline.length) + gather


def _between_replicas(situation: Situation, numbers: RankNumbers, kind: str) -> float:
    return sum(
        situation.wire(one.group, one.ranks).seconds(kind, one.calls, one.bytes)
        for one in numbers.collectives
        if one.group in ("data", "expert data") and one.kind == kind
    )


def _optimizer(situation: Situation, numbers: RankNumbers) -> float:
    """The update of the rank's shard, and its gradient buffer zeroed: both bound by memory."""
    per_parameter = 12 if situation.config.model.dtype == "bfloat16" else 8  # master and moments; moments
    shard = numbers.memory.optimizer / per_parameter
    device = situation.device
    return device.stream(shard * c.OPTIMIZER_BYTES + numbers.parameters * c.ZERO_BYTES)


def _reference(situation: Situation, numbers: Sequence[RankNumbers], optimizer: float) -> tuple[float, float]:
    """Seconds of a step that the reference's pass takes: inside the step, and its share of a pass before training.

    numbers: of its own shape. optimizer: seconds of the update, beside which a swapped one is copied to the device.
    """
    if not situation.config.objective.needs_reference:
        return 0.0, 0.0
    there = replace(situation, shape=situation.reference, layers=situation.reference_layers)
    stages = _stages(there, numbers)
    alone = _run(there, stages, forward_only=True).length
    reference, steps = situation.config.reference, 1
    if reference.mode == "swapped":
        steps = reference.swap_steps
    elif reference.mode == "precomputed":
        steps = groups_per_pass(situation.config) // situation.config.batch.global_batch_size
    # One pass through the pipeline is for the micro-batches of several steps.
    twice = replace(there, work=replace(there.work, micro_batches=2 * there.work.micro_batches))
    further = _run(twice, stages, forward_only=True).length - alone if steps > 1 else 0.0
    seconds = (alone + (steps - 1) * further) / steps
    if reference.mode == "precomputed":
        return 0.0, seconds * situation.scored_steps / situation.steps
    if reference.mode == "resident":
        return seconds, 0.0
    width = 2 if situation.config.model.dtype == "bfloat16" else 4
    copy = max(one.parameters for one in numbers) * width / c.HOST_BANDWIDTH
    return seconds + max(0.0, copy - optimizer) / steps, 0.0


def _extra_passes(situation: Situation) -> int:
    """Forward passes that the objective asks for: to see the whole batch before its gradient (docs/design.md, Across
    the batch), to look at responses to other prompts (KTO)."""
    objective = situation.config.objective
    return int(objective.whole_batch) + int("mismatched_kl" in objective.needs)
