"""What a run starts from: the model folder checked, the data tokenised, the run folder claimed."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from megadpo.config import Config
from megadpo.config.check import check_grid, unused_reference
from megadpo.convert.families import read_shape, with_head
from megadpo.convert.fit import fp8_misfits, graph_misfits, misfits
from megadpo.convert.importer import check_hf
from megadpo.convert.shape import ModelShape
from megadpo.data.kinds import wanted
from megadpo.data.prepare import prepare
from megadpo.data.store import GroupStore
from megadpo.data.stream import Stream, mismatched_stream, open_streams
from megadpo.data.tokenizer import check_vocabulary, load_tokenizer
from megadpo.errors import ConfigError
from megadpo.model.flops import group_cost
from megadpo.objectives.names import name_of
from megadpo.observe.log import write_run_files
from megadpo.observe.progress import Screen, Terminal
from megadpo.parallel.context import from_first_rank
from megadpo.parallel.owner import Ownership
from megadpo.parallel.ranks import Rank
from megadpo.parallel.watchdog import UNWATCHED, Watchdog
from megadpo.train import identity
from megadpo.train.export import check_target, keep_template
from megadpo.train.loop import run_length


@dataclass(frozen=True)
class Shapes:
    """What the model folders' config.json say."""

    policy: ModelShape
    reference: ModelShape


@dataclass(frozen=True)
class Inputs:
    """Checked, and on the disk. Every rank has the same."""

    shape: ModelShape
    reference_shape: ModelShape
    train: GroupStore
    held_out: GroupStore | None

    @property
    def stores(self) -> list[GroupStore]:
        return [self.train] if self.held_out is None else [self.train, self.held_out]


def read_shapes(config: Config, world_size: int, kl: bool = False) -> Shapes:
    """Raises ModelError for a folder that is no supported model, ConfigError for a grid that does not fit it.

    kl: a reference is scored for an objective without one, too. Where none is, settings of it are an error.
    """
    policy = with_head(read_shape(_folder(config.model.path)), config.objective.head, config.model.path)
    compares = config.objective.needs_reference or kl
    reference = read_shape(_folder(config.reference.path)) if config.reference.path and compares else policy
    shapes = Shapes(policy, reference)
    problems = grid_problems(config, shapes, world_size)
    if not compares:
        problems += unused_reference(config)
    if "kl_N" in config.objective.needs:
        problems += _incomparable(policy, reference, config)
    if problems:
        raise ConfigError("\n".join(problems))
    return shapes


def grid_problems(config: Config, shapes: Shapes, world_size: int) -> list[str]:
    """Why the grid does not fit the models or the world; none where it does."""
    policy, reference = shapes.policy, shapes.reference
    problems = check_grid(
        config,
        num_attention_heads=policy.num_attention_heads,
        num_query_groups=policy.num_query_groups,
        num_layers=policy.num_layers,
        ffn_hidden_size=policy.ffn_hidden_size,
        world_size=world_size,
        kv_channels=policy.kv_channels,
    )
    problems += misfits(policy, config.parallel) + fp8_misfits(policy, config.model, config.parallel)
    problems += graph_misfits(policy, config.model)
    # a reference without experts may stand beside a policy whose experts are dealt
    grid = config.parallel if reference.experts else replace(config.parallel, expert_model_parallel_size=1)
    of_reference = misfits(reference, grid) + fp8_misfits(reference, config.model, grid)
    if config.parallel.tp_comm_overlap and reference.hidden_size != policy.hidden_size:
        problems.append(
            f"parallel.tp_comm_overlap = true: policy and reference share its buffers, and their hidden sizes are "
            f"{policy.hidden_size} and {reference.hidden_size}; leave it out"
        )
    return problems + [f"reference: {line}" for line in of_reference if line not in problems]


def _incomparable(policy: ModelShape, reference: ModelShape, config: Config) -> list[str]:
    """What keeps the two models' whole distributions from being compared, token by token of the vocabulary."""
    pairs = {
        "vocabularies of {} and {} tokens": (policy.vocab_size, reference.vocab_size),
        "logits capped at {} and {}": (policy.logit_soft_cap, reference.logit_soft_cap),
    }
    return [
        f"reference.path = {config.reference.path}: policy and reference have {words.format(*two)}, and "
        f"objective.loss_type {name_of(config.objective)} compares their distributions; give a reference of the "
        "policy's kind, or leave it out"
        for words, two in pairs.items()
        if two[0] != two[1]
    ]


def read_inputs(
    config: Config,
    shapes: Shapes,
    rank: Rank,
    on_gpu: bool,
    training: Ownership | None,
    watch: Watchdog = UNWATCHED,
) -> Inputs:
    """Check and prepare everything on rank 0; the other ranks wait outside any collective and open what it made.

    training: of the run folder, to be taken first; the folder is claimed last, so that a start that is refused leaves
    no trace in it. None: nothing is trained.
    """

    def first(sign: Callable[[], None]) -> str:
        if training is not None:
            training.take(Screen(Terminal(sys.__stdout__)).line)
        stores = _prepare(config, shapes, watch, sign)
        watch.slowly("checking the data")
        ranks = rank.world_size // (
            config.parallel.tensor_model_parallel_size * config.parallel.pipeline_model_parallel_size
        )
        every = [store for store in stores if store is not None]
        # The budget fits, and mismatched responses can be had.
        streams = open_streams(config, every, ranks, group_cost(shapes.policy), fixed_length=on_gpu)
        if training is not None:
            mismatched_streams(config, streams, [run_length(config, len(every[0])).groups, None])
        else:
            mismatched_streams(config, streams[1:], [None])
        if training is not None:
            for store in every:
                store.check_bytes()
            _claim(config, every[0])
        return json.dumps([None if store is None else str(store.folder) for store in stores])

    waiting = "rank 0, which prepares the data,"
    if rank.rank:
        watch.slowly(waiting)
    train, held_out = json.loads(from_first_rank(rank.rank, rank.world_size, first, lambda: watch.slowly(waiting)))
    return Inputs(
        shapes.policy, shapes.reference, GroupStore.open(train), GroupStore.open(held_out) if held_out else None
    )


def _prepare(
    config: Config, shapes: Shapes, watch: Watchdog, sign: Callable[[], None]
) -> tuple[GroupStore, GroupStore | None]:
    """The training store, and the held-out one where there is one. sign: called for the other ranks as it gets on."""
    tokenizer = load_tokenizer(config.data.tokenizer or config.model.path, config.data.chat_template)
    check_vocabulary(tokenizer, shapes.policy.vocab_size)
    check_hf(shapes.policy, _folder(config.model.path))
    if config.reference.path and shapes.reference is not shapes.policy:
        check_hf(shapes.reference, _folder(config.reference.path))
    screen = Screen(Terminal(sys.__stdout__))

    def store(name: str, sources: tuple[str, ...]) -> GroupStore:
        got_on = watch.phase(f"tokenising {name}")

        def on_progress(done: int) -> None:
            task.to(done)
            got_on()
            sign()

        def end() -> None:
            watch.slowly(f"bringing {name} to the disk")

        with screen.task(f"{name}: rows", None) as task:
            return prepare(sources, config.data, config.model.path, wanted(config), config.batch, on_progress, end)

    train = store("data.train", config.data.train)
    return train, store("data.eval", config.data.eval) if config.data.eval else None


def mismatched_streams(config: Config, streams: list[Stream], counts: list[int | None]) -> Sequence[Stream | None]:
    """For objectives that need `mismatched_kl`, each stream's responses behind other prompts; None for others.

    counts: of each stream, how many groups of it the run takes, global_batch_size at a time; None: every one once, as
    one batch. Raises DataError where a batch has no such pairing.
    """
    if "mismatched_kl" not in config.objective.needs:
        return [None] * len(streams)
    found = []
    for stream, count in zip(streams, counts, strict=False):
        every = len(stream.store)
        order = np.arange(every) if count is None else stream.next_groups(0, count)
        size = every if count is None else config.batch.global_batch_size
        found.append(mismatched_stream(stream, order, size))
    return found


def _claim(config: Config, train: GroupStore) -> None:
    run_dir = _folder(config.run_dir)
    steps = run_length(config, len(train)).steps
    if config.optimizer.warmup_steps is not None and config.optimizer.warmup_steps >= steps:
        raise ConfigError(
            f"optimizer.warmup_steps = {config.optimizer.warmup_steps}: the run has only {steps} steps and would never "
            "reach its learning rate; lower it, or use optimizer.warmup_ratio"
        )
    check_target(config)
    identity.claim(run_dir, identity.of_run(config, train.digest))
    write_run_files(run_dir, config)
    keep_template(config, train.report.template)


def _folder(path: str) -> Path:
    return Path(path).expanduser()
