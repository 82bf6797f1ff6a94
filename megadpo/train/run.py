"""A whole run in every rank: data, model, reference, training, export. Reads from top to bottom."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch.distributed as dist

from megadpo import checkpoint
from megadpo.config import Config
from megadpo.convert.hf_files import weights_digest, weights_warnings
from megadpo.convert.importer import load_hf
from megadpo.convert.shape import ModelShape
from megadpo.data.batch import stream_tokens
from megadpo.data.store import GroupStore
from megadpo.data.stream import Scored, Stream, open_streams
from megadpo.errors import ConfigError
from megadpo.model.build import build_chunks, check_machine
from megadpo.model.flops import group_cost
from megadpo.model.fp8 import precision
from megadpo.model.graphs import capture
from megadpo.model.parts import parts
from megadpo.model.policy import Policy
from megadpo.model.reference import build_reference
from megadpo.objectives.names import title
from megadpo.observe.log import RunLog
from megadpo.observe.versions import package_warnings, versions
from megadpo.parallel import mcore_fixes
from megadpo.parallel.context import ParallelContext, grid, join_world
from megadpo.parallel.owner import Ownership
from megadpo.parallel.ranks import Rank
from megadpo.parallel.stop import StopSignal
from megadpo.parallel.user_buffers import start_user_buffers
from megadpo.parallel.watchdog import UNWATCHED, Watchdog
from megadpo.train import identity
from megadpo.train.evaluate import evaluate
from megadpo.train.export import export, export_target
from megadpo.train.inputs import Inputs, mismatched_streams, read_inputs, read_shapes
from megadpo.train.loop import fit, groups_per_pass, run_length
from megadpo.train.optimizer import build_optimizer, wrap
from megadpo.train.score import check_column, fill_column, known_groups, reference_digest, score_groups, stored_column
from megadpo.train.state import TrainState


@dataclass(frozen=True)
class Weights:
    """Where weights come from."""

    fill: Callable[[list[Policy], ModelShape, Path, Callable[[], None]], object]
    """Fills this rank's chunks of a model of that shape; its folder may be looked at, and the function is called at
    signs of progress."""
    digest: Callable[[Path], str]
    """Tells those of one folder from those of another."""


STORED = Weights(load_hf, weights_digest)
"""They are read from the folder."""


def run_training(config: Config, rank: Rank) -> int:
    """Train, or go on from the run folder's newest checkpoint, then export; the exit code of this process."""
    shapes = read_shapes(config, rank.world_size)
    run_dir = Path(config.run_dir).expanduser()
    with Ownership(run_dir) as owned, Watchdog(config.train.hang_timeout) as watch:
        device = join_world(rank.rank, rank.world_size, rank.local_rank, rank.init_method)
        check_machine(config.model, config.parallel, device)
        inputs = read_inputs(config, shapes, rank, device.type == "cuda", training=owned, watch=watch)
        length = run_length(config, len(inputs.train))
        with (
            grid(config.parallel, device, config.seed) as context,
            RunLog(run_dir, length.steps, config, enabled=context.is_first) as log,
        ):
            code = _train(config, inputs, context, log, watch)
        dist.destroy_process_group()
        if code == 0 and rank.rank == 0 and config.export.enabled:
            newest = checkpoint.latest(run_dir)
            assert newest is not None
            export(config, newest, export_target(config), replace=config.export.path is None, watch=watch)
    return code


def _train(config: Config, inputs: Inputs, context: ParallelContext, log: RunLog, watch: Watchdog) -> int:
    """0 at the end of the run; the stop signal's exit code where one came first."""
    streams = _streams(config, inputs.stores, inputs, context)
    log.banner(_banner(config, inputs, streams[0], context))
    state, scored, reference = assembled(config, inputs, streams, context, log, watch=watch)
    watch.slowly("resuming")
    newest = checkpoint.resume(state, Path(config.run_dir).expanduser(), log.line)
    if newest is not None:
        log.line(f"going on from {newest}")
    log.resume(state.step)
    train, held_out = scored[0], scored[1] if len(scored) > 1 else None
    # Only from here on does a signal wait for the end of a step: before, there is nothing to save.
    with StopSignal() as stop:
        finished = fit(state, train, held_out, reference, config, context, log, lambda: stop.requested, watch)
    return 0 if finished else stop.exit_code


def assembled(
    config: Config,
    inputs: Inputs,
    streams: list[Stream],
    context: ParallelContext,
    log: RunLog,
    weights: Weights = STORED,
    watch: Watchdog = UNWATCHED,
) -> tuple[TrainState, list[Scored], list[Policy] | None]:
    """A run before its first step: policy and optimizer, the streams with what the reference says of them, and the
    reference itself where it is resident."""
    _user_buffers(config, inputs, streams[0])
    policy = _load(config, inputs.shape, config.model.path, context, weights, watch)
    counts = [run_length(config, len(inputs.train)).groups, None]
    scored, reference = _with_reference(
        config, inputs, streams, counts, policy, context, log, weights=weights, watch=watch
    )
    watch.slowly("building the optimizer")
    chunks = wrap(policy, config.parallel)
    state = TrainState(chunks, build_optimizer(chunks, config.optimizer, config.parallel))
    if config.model.cuda_graphs:
        watch.slowly("capturing CUDA graphs")
        widest = max(shape.hidden_size for shape in (inputs.shape, inputs.reference_shape))
        log.line(capture(chunks, config.model.cuda_graphs, streams[0].budget.tokens, widest, context))
    return state, scored, reference


def _streams(config: Config, stores: list[GroupStore], inputs: Inputs, context: ParallelContext) -> list[Stream]:
    """The training stream, then the held-out one where there is one."""
    cost = group_cost(inputs.shape)
    return open_streams(config, stores, context.data_size, cost, fixed_length=context.device.type == "cuda")


def _user_buffers(config: Config, inputs: Inputs, stream: Stream) -> None:
    rows, width = stream.budget.tokens, inputs.shape.hidden_size
    start_user_buffers(config.parallel, rows, width, config.model.real_fp8)


def _load(
    config: Config, shape: ModelShape, folder: str, context: ParallelContext, weights: Weights, watch: Watchdog
) -> list[Policy]:
    got_on = watch.phase(f"loading {folder}")
    chunks = build_chunks(shape, config.parallel, context, config.model)
    weights.fill(chunks, shape, Path(folder).expanduser(), got_on)
    return chunks


def _with_reference(  # noqa: PLR0913  what a run is made of
    config: Config,
    inputs: Inputs,
    streams: list[Stream],
    counts: list[int | None],
    policy: list[Policy],
    context: ParallelContext,
    log: RunLog,
    always: bool = False,
    weights: Weights = STORED,
    watch: Watchdog = UNWATCHED,
) -> tuple[list[Scored], list[Policy] | None]:
    """The streams with the reference's log-probabilities, or a resident or swapped reference, as the run file says.

    counts: of each stream, how many groups of it the run takes; None: every one once. The policy has its initial
    weights here, so it serves as its own reference where no other is named. always: for objectives that need none, too.
    """
    others = mismatched_streams(config, streams, counts)
    if not config.objective.needs_reference and not always:
        return [Scored(stream, None) for stream in streams], None
    if config.reference.mode != "precomputed":
        scored = [
            Scored(stream, None, None if other is None else Scored(other, None))
            for stream, other in zip(streams, others, strict=False)
        ]
        return scored, _reference_model(config, inputs, context, weights, watch)
    chunks = policy if config.reference.path is None else _reference_model(config, inputs, context, weights, watch)
    watch.slowly("checksums of the reference")
    digest = weights.digest(Path(config.reference.path or config.model.path).expanduser())

    def with_column(stream: Stream, count: int | None) -> Scored:
        return _scored(config, stream, stream.groups_within(count), chunks, digest, context, log, watch)

    return [
        replace(with_column(stream, count), mismatched=None if other is None else with_column(other, None))
        for stream, other, count in zip(streams, others, counts, strict=False)
    ], None


def _reference_model(
    config: Config, inputs: Inputs, context: ParallelContext, weights: Weights, watch: Watchdog
) -> list[Policy]:
    """A second model in the policy's own layout, frozen."""
    shape, reference = inputs.reference_shape, config.reference
    got_on = watch.phase("loading the reference")
    chunks = build_reference(shape, config.parallel, context, config.model, reference.fp8_weights)
    weights.fill(chunks, shape, Path(reference.path or config.model.path).expanduser(), got_on)
    return chunks


def _scored(
    config: Config,
    stream: Stream,
    groups: np.ndarray,
    chunks: list[Policy],
    weights: str,
    context: ParallelContext,
    log: RunLog,
    watch: Watchdog,
) -> Scored:
    """The stream with the reference's log-probabilities of `groups`, as far as they are not known yet."""
    store = stream.store
    # a policy that is its own reference gathers its weights in FP8, another model does not (model/reference.py)
    model = config.model if config.reference.path is None else replace(config.model, fp8_param_gather=False)
    digest = reference_digest(weights, store.digest, precision(model))
    per_pass = groups_per_pass(config)
    column = stored_column(store, digest, context)
    is_known = known_groups(column, stream)[groups]
    known, missing = groups[is_known], groups[~is_known]
    some = known[np.unique(np.linspace(0, len(known) - 1, min(config.reference.check_groups, len(known))).astype(int))]
    got_on = watch.phase("the reference's log-probabilities")
    if len(some):
        fresh = score_groups(chunks, stream, some, per_pass, context, lambda done: got_on())
        difference = check_column(column, stream, "fp8" if config.model.fp8_format else config.model.dtype, fresh)
        log.line(
            f"reference log-probabilities: those of {len(known)} groups are known from an earlier run; "
            f"{len(some)} groups computed again differ by at most {difference:.1e} nats"
        )
    if len(missing):
        with log.phase("reference log-probabilities", len(missing)) as progress:

            def on_pass(done: int) -> None:
                progress(done)
                got_on()

            fill_column(column, missing, digest, chunks, stream, per_pass, context, on_pass)
    return Scored(stream, column)


def _banner(config: Config, inputs: Inputs, stream: Stream, context: ParallelContext) -> list[str]:
    """What runs, and with which parts."""
    shape, parallel = inputs.shape, config.parallel
    grid_text = f"tensor {context.tensor_size} x pipeline {context.pipeline_size} x data {context.data_size}"
    if context.virtual_size > 1:
        grid_text += f", {context.virtual_size} virtual stages"
    if parallel.expert_model_parallel_size > 1:
        grid_text += f", experts dealt to {parallel.expert_model_parallel_size} ranks"
    if context.sequence_parallel:
        grid_text += ", sequence parallel"
    needs = config.objective.needs_reference
    tokens = stream_tokens(inputs.train, stream.share, stream.scalar)
    return [
        *package_warnings(versions()),
        *weights_warnings(config.model.path),
        f"model      {config.model.path} ({shape.family}, {shape.num_layers} layers, hidden {shape.hidden_size})",
        *parts(shape, parallel, config.model, context.device),
        f"grid       {grid_text}",
        f"objective  {title(config.objective)}",
        f"reference  {_reference(config) if needs else 'none needed'}",
        *(f"data.train {line}" for line in inputs.train.report.lines()),
        *(f"data.eval  {line}" for line in (inputs.held_out.report.lines() if inputs.held_out else [])),
        *_too_long(config, shape),
        f"batch      {config.batch.global_batch_size} groups per update, micro-batches of "
        f"{'up to ' if stream.grain else ''}{stream.budget.tokens} tokens "
        f"(a group takes {tokens.mean():.0f} on average, {tokens.max()} at most)",
        f"optimizer  AdamW ({mcore_fixes.adam_from()}), distributed: "
        f"{'yes' if parallel.use_distributed_optimizer else 'no'}",
    ]


def _reference(config: Config) -> str:
    reference = config.reference
    how = {"swapped": f"swapped in for {reference.swap_steps} steps at a time"}.get(reference.mode, reference.mode)
    weights = ", weights in FP8" if reference.fp8_weights else ""
    return f"{how}{weights}: {reference.path or 'its own initial weights'}"


def _too_long(config: Config, shape: ModelShape) -> list[str]:
    if config.data.max_length <= shape.max_position_embeddings:
        return []
    return [
        f"warning    data.max_length {config.data.max_length} is over the {shape.max_position_embeddings} positions "
        "that the model was made for (max_position_embeddings)"
    ]


def run_evaluation(config: Config, checkpoint_dir: str | None, kl: bool, rank: Rank) -> int:
    """Held-out metrics of a checkpoint: the one named, else the run folder's newest, else the model's folder itself.

    kl: score the reference, and measure the KL to it, also for an objective that does without one.
    """
    if not config.data.eval:
        raise ConfigError("data.eval is not given: name the held-out data in the run file or as data.eval=FILE")
    run_dir = Path(config.run_dir).expanduser()
    folder = Path(checkpoint_dir).expanduser() if checkpoint_dir else checkpoint.latest(run_dir)
    if folder is not None:
        identity.check_models(folder, config)
    if kl and config.objective.head == "scalar":
        raise ConfigError("--kl: a reward model has no distribution over tokens; leave it out")
    shapes = read_shapes(config, rank.world_size, kl)
    with Watchdog(config.train.hang_timeout) as watch:
        device = join_world(rank.rank, rank.world_size, rank.local_rank, rank.init_method)
        check_machine(config.model, config.parallel, device)
        inputs = read_inputs(config, shapes, rank, device.type == "cuda", training=None, watch=watch)
        with (
            grid(config.parallel, device, config.seed) as context,
            RunLog(run_dir, 0, config, enabled=context.is_first) as log,
        ):
            streams = _streams(config, inputs.stores[1:], inputs, context)
            _user_buffers(config, inputs, streams[0])
            policy = _load(config, inputs.shape, config.model.path, context, STORED, watch)
            [held_out], reference = _with_reference(
                config, inputs, streams, [None], policy, context, log, kl, watch=watch
            )
            watch.slowly("loading the checkpoint")
            step = checkpoint.load_weights(policy, folder).step if folder else 0
            got_on = watch.phase("evaluation")
            sums = evaluate(policy, held_out, config.objective, reference, groups_per_pass(config), context, got_on)
            sources = ", ".join(config.data.eval)
            log.line(f"{folder or config.model.path} (step {step}): {sums.groups} groups of {sources}")
            log.line(f"  eval_loss {sums.loss:.6f}")
            for name, value in sums.metrics.items():
                log.line(f"  eval_{name} {value:.6f}")
    dist.destroy_process_group()
    return 0
