"""When to step, log, evaluate, save and stop. No tensors here."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from megadpo import checkpoint
from megadpo.config import Config
from megadpo.data.store import GROUPS_FILE
from megadpo.data.stream import Scored, Stream
from megadpo.errors import DataChangedError, NumericsError
from megadpo.observe.memory import peak_memory
from megadpo.observe.spikes import Spikes
from megadpo.parallel.context import ParallelContext
from megadpo.parallel.watchdog import Watchdog
from megadpo.train.drift import DriftWatch
from megadpo.train.evaluate import evaluate
from megadpo.train.nonfinite import Culprit, culprits
from megadpo.train.optimizer import learning_rate, set_learning_rate, settled
from megadpo.train.portions import Portions
from megadpo.train.speed import Meter
from megadpo.train.state import TrainState
from megadpo.train.step import NotFiniteError, Sums, train_step
from megadpo.train.swapped import SwappedPortions


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

    def rewind(self, step: int) -> None: ...


class Saver:
    """The run's checkpoints; in the background where the run file says so, one at a time."""

    def __init__(self, state: TrainState, config: Config, steps: int, context: ParallelContext, log: Log) -> None:
        self._state, self._config, self._steps, self._context, self._log = state, config, steps, context, log
        self._saving: checkpoint.Saving | None = None
        self._before: checkpoint.Saving | None = None

    @property
    def pending(self) -> bool:
        """Whether a checkpoint waits to be finished; the same on every rank."""
        return self._saving is not None

    @property
    def writing(self) -> bool:
        """Whether this rank still has to do with it."""
        return self._saving is not None and not self._saving.done

    def save(self) -> None:
        self.settle()
        train = self._config.train
        self._saving = checkpoint.Saving(
            self._state,
            Path(self._config.run_dir).expanduser(),
            self._steps,
            train.save_total_limit,
            self._context,
            background=train.async_save,
            before=self._before,
        )
        if not train.async_save:
            self.settle()

    def advance(self) -> None:
        """Take the checkpoint a stage further; every rank calls it. Raises its StorageError."""
        saving, self._saving = self._saving, None  # one that failed is over
        assert saving is not None
        folder = saving.advance()
        if folder is None:
            self._saving = saving
        else:
            self._before = saving
            self._log.line(f"saved {folder}")

    def settle(self) -> None:
        """Wait for the checkpoint that is being written, if any. Raises its StorageError."""
        while self._saving is not None:
            self.advance()

    @contextmanager
    def settled_at_a_stop(self, watch: Watchdog) -> Iterator[None]:
        """What ends training on every rank together waits for the checkpoint that is being written: it is of a step
        before, and good."""
        try:
            yield
        except (NumericsError, DataChangedError):
            watch.slowly("saving")
            try:
                self.settle()
            except Exception as error:  # what ends the run is the news
                self._log.line(f"WARNING    the checkpoint that was being written is lost: {error}")
            raise


def fit(
    state: TrainState,
    train: Scored,
    held_out: Scored | None,
    reference: list | None,
    config: Config,
    context: ParallelContext,
    log: Log,
    stop_requested: Callable[[], bool],
    watch: Watchdog,
) -> bool:
    """Train to the end, or until a stop is requested on any rank; True when the end was reached.

    A checkpoint is there when this returns, whichever it was.
    """
    length = run_length(config, len(train.stream.store))
    saver = Saver(state, config, length.steps, context, log)
    portions = portions_of(train, length, reference, config, context, lambda: watch.slowly("the reference's visit"))
    drift = DriftWatch(
        state, train.stream, config, context, groups_per_pass(config), lambda: watch.slowly("FP8's probe")
    )
    meter = Meter.of(state.modules[0].shape, train.stream, config.model.dtype, context)
    spikes = Spikes()
    left_out: set[int] = set()

    def held_out_metrics() -> None:
        if held_out is not None:
            with portions.reference() as chunks:
                sums = run_evaluation(state, held_out, chunks, config, context, lambda: watch.slowly("evaluation"))
            log.step({"step": state.step, **_prefixed(sums)})

    def end_of_step() -> bool:
        if _due(config.train.eval_steps, state.step) and state.step < length.steps:
            held_out_metrics()
        return _end_of_step(state, length.steps, saver, train.stream, stop_requested, config, context, watch)

    if state.step >= length.steps:
        log.line(f"step {state.step} of {length.steps}: this run has reached its end")
        return True
    stopping = False
    with saver.settled_at_a_stop(watch):
        drift.at_start(log)
        while state.step < length.steps and not stopping:
            started = time.monotonic()
            portion = portions.at(state.consumed)
            watch.step(f"step {state.step + 1}")
            rate = learning_rate(config.optimizer, state.step, length.steps)
            set_learning_rate(state.optimizer, rate)
            groups = portion.groups
            if state.step in left_out:
                _leave_out(state, len(groups), len(train.stream.store), log)
                stopping = end_of_step()
                continue
            what = (portion.batches, config.objective, portions.resident, context, portion.mismatched, config.seed)
            try:
                sums, grad_norm = train_step(state, *what, partial(portions.prepare, state.consumed + len(groups)))
            except NotFiniteError as error:
                watch.slowly("the search for what is not finite")
                found = culprits(state, *what)
                _decide(error, found, train.stream, state, left_out, config, log)
                left_out.add(state.step)
                _rewind(state, error, saver, config, log)
                continue
            seconds, memory = time.monotonic() - started, context.most(peak_memory(context.device))
            drift.log_step(
                log,
                {
                    "step": state.step,
                    "epoch": state.consumed / len(train.stream.store),
                    "loss": sums.loss,
                    "grad_norm": grad_norm,
                    "learning_rate": rate,
                    **sums.metrics,
                    "num_scored_tokens": sums.tokens,
                    **meter.step(portion.bins, sums.tokens, seconds, memory),
                },
            )
            if spike := spikes.note(sums.loss):
                log.line(f"WARNING    step {state.step}: {spike}; {_named(groups, train.stream)}")
            stopping = end_of_step()
    watch.slowly("saving")
    saver.save()
    saver.settle()
    if not stopping:
        held_out_metrics()
    return not stopping


def _end_of_step(
    state: TrainState,
    steps: int,
    saver: Saver,
    stream: Stream,
    stop_requested: Callable[[], bool],
    config: Config,
    context: ParallelContext,
    watch: Watchdog,
) -> bool:
    """Save where it is due, after a batch that was left out too; whether to stop. Raises DataChangedError, on every
    rank and before anything is saved, where any of them sees that the data changed."""
    stopping, writing, changed = context.any_of(stop_requested(), saver.writing, stream.store.changed)
    if changed:
        raise DataChangedError(
            f"{stream.store.folder / GROUPS_FILE}: changed while the run was reading it; delete the folder, prepare "
            "the data again, and go on from the last checkpoint"
        )
    if saver.pending and not writing:
        saver.advance()
    if _due(config.train.save_steps, state.step) and state.step < steps and not stopping:
        watch.slowly("saving")
        saver.save()
    return stopping


def portions_of(
    train: Scored,
    length: Length,
    reference: list | None,
    config: Config,
    context: ParallelContext,
    on_visit: Callable[[], None],
) -> Portions:
    """A run's portions, with the reference that the run file asks for. on_visit: called before a swapped one comes."""
    of_run = (train, config.batch.global_batch_size, length.groups, context)
    if reference is not None and config.reference.mode == "swapped":
        return SwappedPortions(*of_run, reference, config.reference.swap_steps, on_visit)
    return Portions(*of_run, reference)


def _leave_out(state: TrainState, count: int, groups: int, log: Log) -> None:
    """Go on as if the batch were done, without its update."""
    state.step += 1
    state.consumed += count
    state.skipped += 1
    log.step({"step": state.step, "epoch": state.consumed / groups, "skipped": state.skipped})


def _decide(
    error: NotFiniteError,
    found: list[Culprit],
    stream: Stream,
    state: TrainState,
    left_out: set[int],
    config: Config,
    log: Log,
) -> None:
    """Tell of it where the run file lets the batch be left out; raise NumericsError where not."""
    if found:
        who = "; ".join(f"rank {one.rank}: the {one.what} of {_named(one.groups, stream)}" for one in found[:4])
        who += f"; and {len(found) - 4} more" if len(found) > 4 else ""
    else:
        who = "computed again it is finite: a fault of this machine is likely"
    policy, so_far = config.train.on_nonfinite, max(state.skipped, len(left_out))
    if policy == "stop":
        raise NumericsError(
            f"{error} ({who}); no update was made from it: look at these groups, lower optimizer.learning_rate, or set "
            "train.on_nonfinite to skip or rewind, and start again to go on from the last checkpoint"
        )
    if so_far >= config.train.max_skipped:
        raise NumericsError(
            f"{error} ({who}); no update was made from it, and {so_far} batches were left out before "
            f"(train.max_skipped = {config.train.max_skipped}): the weights or the settings are to blame; lower "
            "optimizer.learning_rate and start again from an earlier checkpoint"
        )
    log.line(f"WARNING    {error} ({who}); {policy}: this batch is left out")


def _rewind(state: TrainState, error: NotFiniteError, saver: Saver, config: Config, log: Log) -> None:
    """Back to the newest checkpoint, where the run file says so."""
    if config.train.on_nonfinite != "rewind":
        return
    saver.settle()
    folder = checkpoint.resume(state, Path(config.run_dir).expanduser(), log.line)
    if folder is None:
        raise NumericsError(
            f"{error}; train.on_nonfinite = rewind, but there is no checkpoint yet to go back to: lower "
            "train.save_steps, or set it to skip"
        )
    log.rewind(state.step)
    log.line(f"going on from {folder}")


def _named(groups: Sequence[int] | np.ndarray, stream: Stream) -> str:
    """Groups by number and origin, the first few."""
    some = [f"{int(group)} ({stream.store.group(int(group)).origin})" for group in groups[:3]]
    more = f" and {len(groups) - 3} more" if len(groups) > 3 else ""
    return f"group{'s' if len(groups) > 1 else ''} {', '.join(some)}{more}"


def run_evaluation(
    state: TrainState,
    held_out: Scored,
    reference: list | None,
    config: Config,
    context: ParallelContext,
    on_pass: Callable[[], None],
) -> Sums:
    """Held-out metrics of the model as it stands."""
    with settled(state.chunks):
        per_pass = groups_per_pass(config)
        return evaluate(state.chunks, held_out, config.objective, reference, per_pass, context, on_pass)


def groups_per_pass(config: Config) -> int:
    """Groups that a forward-only pass gives to the pipeline at once."""
    return 4 * config.batch.global_batch_size


def _prefixed(sums: Sums) -> dict[str, float]:
    return {"eval_loss": sums.loss, **{f"eval_{name}": value for name, value in sums.metrics.items()}}


def _due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0
