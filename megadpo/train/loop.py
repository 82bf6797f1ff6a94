"""When to step, log, evaluate, save and stop. No tensors here."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from megadpo import checkpoint
from megadpo.config import Config
from megadpo.data.stream import Scored
from megadpo.parallel.context import ParallelContext
from megadpo.train.evaluate import evaluate
from megadpo.train.optimizer import learning_rate, set_learning_rate, settled
from megadpo.train.state import TrainState
from megadpo.train.step import Sums, train_step


@dataclass(frozen=True)
class Length:
    """How far a run goes."""

    steps: int
    groups: int
    """Groups in all; the last step takes what is left."""


def run_length(config: Config, groups: int) -> Length:
    """Every group once per epoch, the last batch as small as it comes; max_steps, where given, decides instead."""
    size = config.batch.global_batch_size
    if config.train.max_steps is not None:
        return Length(config.train.max_steps, config.train.max_steps * size)
    every = groups * config.train.num_train_epochs
    return Length(math.ceil(every / size), every)


class Log(Protocol):
    """What the loop tells the user; `megadpo.observe.log.RunLog` on rank 0, silence on the others."""

    def step(self, record: dict[str, Any]) -> None: ...

    def line(self, text: str) -> None: ...


def fit(
    state: TrainState,
    train: Scored,
    held_out: Scored | None,
    reference: list | None,
    config: Config,
    context: ParallelContext,
    log: Log,
    stop_requested: Callable[[], bool],
) -> bool:
    """Train to the end, or until a stop is requested on any rank; True when the end was reached.

    A checkpoint is there when this returns, whichever it was.
    """
    length = run_length(config, len(train.stream.store))

    def save() -> None:
        run_dir = Path(config.run_dir).expanduser()
        folder = checkpoint.save(state, run_dir, length.steps, config.train.save_total_limit, context)
        log.line(f"saved {folder}")

    def held_out_metrics() -> None:
        if held_out is not None:
            log.step({"step": state.step, **_prefixed(run_evaluation(state, held_out, reference, config, context))})

    if state.step >= length.steps:
        log.line(f"step {state.step} of {length.steps}: this run has reached its end")
        return True
    stopping = False
    while state.step < length.steps and not stopping:
        started = time.monotonic()
        rate = learning_rate(config.optimizer, state.step, length.steps)
        set_learning_rate(state.optimizer, rate)
        count = min(config.batch.global_batch_size, length.groups - state.consumed)
        groups = train.stream.next_groups(state.consumed, count)
        bins = train.stream.bins(groups)
        batches = train.stream.pack(bins[context.data_rank], train.column)
        mismatched = train.mismatched_batches(state.consumed, count, context.data_rank)
        sums, grad_norm = train_step(state, batches, config.objective, reference, context, mismatched)
        filling = train.stream.filling(bins)
        seconds = time.monotonic() - started
        log.step(
            {
                "step": state.step,
                "epoch": state.consumed / len(train.stream.store),
                "loss": sums.loss,
                "grad_norm": grad_norm,
                "learning_rate": rate,
                **sums.metrics,
                "num_tokens": filling.rows,
                "num_scored_tokens": sums.tokens,
                "padding_fraction": filling.padding_fraction,
                "prompt_tokens_saved": filling.prompt_tokens_saved,
                "load_imbalance": filling.load_imbalance,
                "seconds": seconds,
                "pairs_per_second": count / seconds,
                "tokens_per_second": filling.rows / seconds,
            }
        )
        if _due(config.train.eval_steps, state.step) and state.step < length.steps:
            held_out_metrics()
        stopping = context.any_rank(stop_requested())
        if _due(config.train.save_steps, state.step) and state.step < length.steps and not stopping:
            save()
    save()
    if not stopping:
        held_out_metrics()
    return not stopping


def run_evaluation(
    state: TrainState, held_out: Scored, reference: list | None, config: Config, context: ParallelContext
) -> Sums:
    """Held-out metrics of the model as it stands."""
    with settled(state.chunks):
        return evaluate(state.chunks, held_out, config.objective, reference, groups_per_pass(config), context)


def groups_per_pass(config: Config) -> int:
    """Groups that a forward-only pass gives to the pipeline at once."""
    return 4 * config.batch.global_batch_size


def _prefixed(sums: Sums) -> dict[str, float]:
    return {"eval_loss": sums.loss, **{f"eval_{name}": value for name, value in sums.metrics.items()}}


def _due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0
