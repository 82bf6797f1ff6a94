"""`megadpo bench` in every rank: steps of the real thing, timed from outside. docs/bench.md explains the numbers.

Nothing of the step is written anew for it: the parts are told by hooks that modules, optimizer and Megatron-Core's
schedule offer (its `timers`), so what is measured is what trains.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megadpo.config import Config
from megadpo.data.kinds import wanted
from megadpo.data.packing import Bin
from megadpo.data.stream import Scored, Stream, open_streams
from megadpo.data.synthetic import Lengths, random_groups, write_store
from megadpo.files import storage_errors
from megadpo.model.attention import choose_backend
from megadpo.model.build import DTYPES
from megadpo.model.drawn import draw_weights
from megadpo.model.flops import group_cost
from megadpo.observe.log import RunLog
from megadpo.observe.memory import forget_peak, peak_memory
from megadpo.observe.parts import Part, Parts, profiler
from megadpo.observe.versions import versions
from megadpo.parallel import mcore_fixes
from megadpo.parallel.calls import Calls, waited, watched
from megadpo.parallel.context import ParallelContext, grid, join_world
from megadpo.parallel.ranks import Rank
from megadpo.train.bench_report import (
    PACKAGES,
    Measured,
    PerRank,
    Setting,
    append_row,
    batch_text,
    check_table,
    commit_here,
    device_text,
    grid_text,
    objective_text,
    precision_text,
    text_of,
)
from megadpo.train.inputs import Inputs, Shapes, read_inputs, read_shapes
from megadpo.train.loop import groups_per_pass, portions_of, run_length
from megadpo.train.optimizer import learning_rate, set_learning_rate, settled
from megadpo.train.portions import Portions
from megadpo.train.run import STORED, Weights, assembled
from megadpo.train.score import score_groups
from megadpo.train.speed import Meter
from megadpo.train.state import TrainState
from megadpo.train.step import train_step


@dataclass(frozen=True)
class Asked:
    """What the command line says beside the run file."""

    steps: int = 10
    warm_up: int = 3
    synthetic: Lengths | None = None
    """Random groups of these lengths and random weights, instead of data.train and the model's weights."""
    trace: str | None = None
    """File for a trace of one more step; -RANK is put before its ending."""
    as_json: bool = False
    append: str | None = None
    command: str = ""
    """As the user would write it again."""


def run_bench(asked: Asked, config: Config, rank: Rank) -> int:
    """Measure, and tell on rank 0. Nothing but logs is written to the run folder."""
    shapes = read_shapes(config, rank.world_size)
    if asked.append is not None and rank.rank == 0:
        check_table(Path(asked.append).expanduser())
    device = join_world(rank.rank, rank.world_size, rank.local_rank, rank.init_method)
    config = replace(
        config,
        data=replace(config.data, eval=()),
        # as many groups are scored ahead as the steps take, and no more
        train=replace(config.train, max_steps=asked.warm_up + asked.steps + (asked.trace is not None)),
    )
    with ExitStack() as stack:
        if asked.synthetic is None:
            inputs = read_inputs(config, shapes, rank, device.type == "cuda", training=None)
        else:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="megadpo-bench-")))
            inputs = _synthetic_inputs(asked.synthetic, config, shapes, folder)
        context = stack.enter_context(grid(config.parallel, device, config.seed))
        weights = STORED if asked.synthetic is None else _drawn(config.seed, context)
        log = stack.enter_context(RunLog(config.run_dir, 0, config, enabled=context.is_first and not asked.as_json))
        measured, stream = _measured(asked, config, inputs, weights, context, log)
    dist.destroy_process_group()
    if rank.rank == 0:
        _tell(asked, _setting(asked, config, inputs, stream, rank.world_size, device), measured)
    return 0


def _synthetic_inputs(lengths: Lengths, config: Config, shapes: Shapes, folder: Path) -> Inputs:
    """Every rank makes the same for itself: ranks on other machines see other disks."""
    assert config.train.max_steps is not None
    count = config.train.max_steps * config.batch.global_batch_size
    vocab = shapes.policy.vocab_size
    groups = random_groups(count, lengths, vocab, config.seed, wanted(config))
    return Inputs(shapes.policy, shapes.reference, write_store(folder, groups, vocab), None)


def _drawn(seed: int, context: ParallelContext) -> Weights:
    return Weights(
        lambda chunks, shape, folder, on_tensor: draw_weights(chunks, shape, seed, context), lambda folder: "drawn"
    )


def _measured(
    asked: Asked, config: Config, inputs: Inputs, weights: Weights, context: ParallelContext, log: RunLog
) -> tuple[Measured, Stream]:
    fixed = context.device.type == "cuda"
    cost = group_cost(inputs.shape)
    streams = open_streams(config, inputs.stores, context.data_size, cost, fixed_length=fixed)
    state, [train, *_], reference = assembled(config, inputs, streams, context, log, weights)
    meter = Meter.of(inputs.shape, train.stream, config.model.dtype, context)
    length = run_length(config, len(inputs.train))
    portions = portions_of(train, length, reference, config, context, lambda: None)

    def step(parts: Parts) -> tuple[list[list[Bin]], int]:
        return _step(state, portions, config, context, parts)

    with log.phase("warm-up: steps", asked.warm_up) as progress:
        for number in range(asked.warm_up):
            step(Parts(context.device))
            progress(number + 1)
    forget_peak(context.device)
    dist.barrier()
    parts = Parts(context.device)
    done: list[tuple[list[list[Bin]], int]] = []
    with log.phase("measured: steps", asked.steps) as progress, _told(parts, state, portions, reference) as calls:
        for number in range(asked.steps):
            parts.step()
            done.append(step(parts))
            progress(number + 1)
        parts.step()
    times = parts.read()
    memory = peak_memory(context.device)
    waiting = waited(calls, times.calls, context.groups.pp)
    spent = dict(times.parts)
    spent["waiting"] = waiting
    spent["communication"] = max(spent["communication"] - waiting, 0.0)
    own = PerRank(
        context.rank,
        context.pipeline_rank,
        {name: seconds / asked.steps for name, seconds in spent.items()},
        memory,
        statistics.fmean(times.steps),
    )
    ranks = _of_all_ranks((own, times.steps), context)
    # a step is as long as on the rank where it is longest
    longest = [max(steps) for steps in zip(*(steps for _, steps in ranks), strict=True)]
    most = max(own.peak_memory for own, _ in ranks)
    records = [meter.step(*one, seconds, most) for one, seconds in zip(done, longest, strict=True)]
    ahead = _seconds_ahead(state, train, config, context) if train.column is not None else None
    if asked.trace is not None:
        _trace(asked.trace, state, portions, reference, context, step)
    return Measured(records, [own for own, _ in ranks], ahead), train.stream


def _of_all_ranks(value: Any, context: ParallelContext) -> list[Any]:
    found: list[Any] = [None] * context.world_size
    dist.all_gather_object(found, value)
    return found


def _step(
    state: TrainState, portions: Portions, config: Config, context: ParallelContext, parts: Parts
) -> tuple[list[list[Bin]], int]:
    """One update, as `train.loop.fit` does it; its bins, and its scored tokens."""
    assert config.train.max_steps is not None
    with parts.part("data"):
        portion = portions.at(state.consumed)
        set_learning_rate(state.optimizer, learning_rate(config.optimizer, state.step, config.train.max_steps))
    what = (portion.batches, config.objective, portions.resident, context, portion.mismatched, config.seed)
    sums, _ = train_step(state, *what, partial(portions.prepare, state.consumed + len(portion.groups)))
    return portion.bins, sums.tokens


def _seconds_ahead(state: TrainState, train: Scored, config: Config, context: ParallelContext) -> float:
    """Of scoring one global batch with the reference before training, as a precomputed column is made: once to warm up,
    once timed. The policy stands for it; they cost the same."""
    with settled(state.chunks):
        for consumed in (0, config.batch.global_batch_size):
            groups = train.stream.next_groups(consumed, config.batch.global_batch_size)
            dist.barrier()
            started = time.perf_counter()
            score_groups(state.chunks, train.stream, groups, groups_per_pass(config), context, lambda done: None)
    return context.most(time.perf_counter() - started)


def _trace(
    file: str,
    state: TrainState,
    portions: Portions,
    reference: list | None,
    context: ParallelContext,
    step: Callable[[Parts], object],
) -> None:
    path = Path(file).expanduser()
    path = path.with_name(f"{path.name.partition('.')[0]}-{context.rank}.{path.name.partition('.')[2] or 'json'}")
    parts = Parts(context.device, trace=True)
    with storage_errors(path, "--trace"):
        path.parent.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    with profiler(str(path)), _told(parts, state, portions, reference):
        step(parts)
        if context.device.type == "cuda":
            torch.cuda.synchronize()


# What tells the parts ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timers:
    """What Megatron-Core's schedule takes for its timers: told when a pass of a micro-batch begins and ends."""

    parts: Parts
    names: dict[str, Part]

    def __call__(self, name: str, log_level: int | None = None) -> Timer:
        return Timer(self.parts, self.names.get(name))


@dataclass(frozen=True)
class Timer:
    parts: Parts
    part: Part | None

    def start(self, barrier: bool = False) -> None:
        if self.part is not None:
            self.parts.enter(self.part)

    def stop(self, barrier: bool = False) -> None:
        if self.part is not None:
            self.parts.leave()


@contextmanager
def _told(parts: Parts, state: TrainState, portions: Portions, reference: list | None) -> Iterator[Calls]:
    """The stopwatch learns of everything in a step, for the length of a with-block."""
    config = state.modules[0].config
    with ExitStack() as stack:
        calls = stack.enter_context(watched(parts))
        timers = Timers(parts, {"forward-compute": "forward", "backward-compute": "backward"})
        stack.enter_context(_attribute(config, "timers", timers))
        if reference is not None:
            only = Timers(parts, {"forward-compute": "reference"})
            stack.enter_context(_attribute(reference[0].config, "timers", only))
            visit = portions.reference

            @contextmanager
            def visited() -> Iterator[list[Any] | None]:
                with parts.part("reference"), visit() as chunks:
                    yield chunks

            stack.enter_context(_attribute(portions, "reference", visited))
        for chunk in state.chunks:
            stack.enter_context(_attribute(chunk, "zero_grad_buffer", _within(parts, chunk.zero_grad_buffer)))
            head = getattr(chunk.module, "output_layer", None)
            if head is not None:
                for handle in _head_hooks(head, parts):
                    stack.callback(handle.remove)
        finish = config.finalize_model_grads_func
        stack.enter_context(_attribute(config, "finalize_model_grads_func", _within(parts, finish)))
        optimizer = state.optimizer

        def begin(*args: Any) -> Any:
            parts.enter("optimizer")
            return before(*args)

        def end(*args: Any) -> Any:
            result = update(*args)
            parts.leave()
            return result

        # from the gradients' way to the master weights to the update: norm and clipping lie between
        before, update = optimizer.prepare_grads, optimizer.step_with_ready_grads
        stack.enter_context(_attribute(optimizer, "prepare_grads", begin))
        stack.enter_context(_attribute(optimizer, "step_with_ready_grads", end))
        yield calls


def _within(parts: Parts, function: Callable[..., Any]) -> Callable[..., Any]:
    def timed(*args: Any, **kwargs: Any) -> Any:
        with parts.part("optimizer"):
            return function(*args, **kwargs)

    return timed


@contextmanager
def _attribute(owner: Any, name: str, value: Any) -> Iterator[None]:
    """The object's own attribute for a while; a method of its class comes back by itself."""
    own = name in vars(owner)
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own:
            setattr(owner, name, before)
        else:
            delattr(owner, name)


def _head_hooks(head: Any, parts: Parts) -> list[Any]:
    """Forward: the module. Backward: from the first gradient of what it gave to the gradient of what it got."""

    def before(module: Any, args: tuple) -> None:
        parts.enter("head")

    def after(module: Any, args: tuple, output: Any) -> None:
        parts.leave()
        hidden = args[0]
        if not (torch.is_grad_enabled() and hidden.requires_grad):
            return
        begun = False

        def begin(gradient: Tensor) -> None:
            nonlocal begun
            if not begun:
                begun = True
                parts.enter("head")

        def end(gradient: Tensor) -> None:
            if begun:
                parts.leave()

        for value in vars(output).values():
            if isinstance(value, Tensor) and value.requires_grad:
                value.register_hook(begin)
        hidden.register_hook(end)

    return [head.register_forward_pre_hook(before), head.register_forward_hook(after)]


# What is told ------------------------------------------------------------------------------------------------


def _setting(asked: Asked, config: Config, inputs: Inputs, stream: Stream, world: int, device: torch.device) -> Setting:
    found, shape = versions(), inputs.shape
    attention, _ = choose_backend(device, DTYPES[config.model.dtype], shape)
    te = mcore_fixes.have_te() and not config.model.fp8_emulation
    return Setting(
        device=device_text(list(found["devices"]), device.type == "cuda", world),
        driver=str(found["nvidia-driver"]),
        versions={name: str(found[name]) for name in PACKAGES},
        commit=commit_here(),
        model=f"{shape.family}, {shape.num_layers} layers, hidden {shape.hidden_size}, vocabulary {shape.vocab_size}",
        data=_data_text(asked, config, inputs),
        grid=grid_text(config.parallel, world, shape.experts is not None),
        precision=precision_text(config.model),
        objective=objective_text(config, inputs.reference_shape),
        batch=batch_text(config.batch, stream.budget, stream.grain is None),
        parts_in_use=f"layers: {'Transformer Engine' if te else 'Megatron-Core'}; attention: {attention}",
        command=asked.command,
    )


def _data_text(asked: Asked, config: Config, inputs: Inputs) -> str:
    if asked.synthetic is not None:
        mean = f"{asked.synthetic.prompt} + {asked.synthetic.response}"
        spread = f"spread {asked.synthetic.spread:g}, at most {asked.synthetic.most}"
        return f"random weights, random groups of {mean} tokens ({spread})"
    names = ", ".join(Path(source).name for source in config.data.train)
    return f"{names}, {len(inputs.train)} groups, max_length {config.data.max_length}"


def _tell(asked: Asked, setting: Setting, measured: Measured) -> None:
    if asked.append is not None:
        append_row(Path(asked.append).expanduser(), setting, measured)
    out = sys.__stdout__
    assert out is not None
    if asked.as_json:
        print(json.dumps({**asdict(setting), "what": setting.what, **measured.summary()}), file=out, flush=True)
    else:
        print(text_of(setting, measured), file=out, flush=True)
