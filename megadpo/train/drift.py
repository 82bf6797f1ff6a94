"""How far FP8 moves log-probabilities: the same weights, the same groups, once in FP8 and once in the model's dtype.

A few groups of the training data are the probe: the same at every measurement, start and grid. Nothing of a run depends
on whether it was measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megadpo.config import Config
from megadpo.data.stream import Stream
from megadpo.errors import NumericsError
from megadpo.model.fp8 import without_fp8
from megadpo.parallel.context import ParallelContext
from megadpo.train.optimizer import settled
from megadpo.train.passes import score
from megadpo.train.state import TrainState


@dataclass(frozen=True)
class Drift:
    """Differences in nats (of a reward model: of its rewards), FP8 against the model's dtype."""

    token: float
    """Mean over scored tokens of the absolute difference; of a reward model over responses."""
    token_max: float
    response: float
    """Mean over responses of the absolute difference of their sums."""
    margin: float | None
    """Mean over groups of the absolute difference of: first response (chosen, best) minus the mean of the others. None:
    groups have one response."""

    @property
    def metrics(self) -> dict[str, float]:
        """As they stand in the log."""
        named = {
            "fp8/token_drift": self.token,
            "fp8/token_drift_max": self.token_max,
            "fp8/response_drift": self.response,
            "fp8/margin_drift": self.margin,
        }
        return {name: value for name, value in named.items() if value is not None}


def probe_groups(size: int, count: int) -> np.ndarray:
    """int64: numbers of `count` groups (fewer where there are no more), evenly over a store of so many."""
    return np.unique(np.linspace(0, size - 1, min(count, size)).round().astype(np.int64))


def measure(
    chunks: Sequence[Any], stream: Stream, groups: np.ndarray, per_pass: int, context: ParallelContext
) -> Drift:
    """The drift over these groups; the same on every rank. per_pass: groups given to the pipeline at once."""
    sums = torch.zeros(6, dtype=torch.float64, device=context.device)
    largest = torch.zeros(1, dtype=torch.float64, device=context.device)
    with settled(list(chunks)), _nothing_noted(chunks):
        for start in range(0, len(groups), per_pass):
            batches = stream.batches(groups[start : start + per_pass], context.data_rank, reference=None)
            in_fp8 = score(chunks, batches, context, as_trained=True)
            with without_fp8(chunks):
                plain = score(chunks, batches, context)
            for batch, one, other in zip(batches, in_fp8, plain, strict=False):
                token_N = (one.logprob_N - other.logprob_N).double().abs()
                response_S = (one.sums_S - other.sums_S).double()
                margin_G = margins(response_S, batch.offsets_G1)
                sums += torch.stack([figure for x in (token_N, response_S, margin_G) for figure in _sum_and_count(x)])
                if len(token_N):
                    largest = torch.maximum(largest, token_N.max())
    if context.holds_loss:
        context.sum_over_data(sums)
        context.max_over_data(largest)
    *sums_and_counts, most = context.from_last_stage(torch.cat([sums, largest])).tolist()
    token, response, margin = (
        total / count if count else None
        for total, count in zip(sums_and_counts[::2], sums_and_counts[1::2], strict=True)
    )
    return Drift(token or 0.0, most, response or 0.0, margin)


def margins(difference_S: Tensor, offsets_G1: Tensor) -> Tensor:
    """float64, one for every group of at least two responses: the first's difference minus the mean of the others'."""
    found = []
    for start, end in zip(offsets_G1.tolist(), offsets_G1[1:].tolist(), strict=False):
        if end - start > 1:
            found.append(difference_S[start] - difference_S[start + 1 : end].mean())
    return torch.stack(found) if found else difference_S.new_zeros(0)


def _sum_and_count(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.abs().sum(), torch.tensor(float(len(x)), dtype=torch.float64, device=x.device)


@contextmanager
def _nothing_noted(chunks: Sequence[Any]) -> Iterator[None]:
    """Transformer Engine's delayed scaling notes the largest numbers of every pass in FP8, in the first row of each
    module's history (pytorch/module/base.py: fp8_meta); what passes inside leave there is taken out again."""

    def histories() -> dict[int, Tensor]:
        metas = [
            meta
            for chunk in chunks
            for module in chunk.modules()
            for meta in (getattr(module, "fp8_meta", None) or {}).values()
        ]
        return {
            id(meta): meta.amax_history for meta in metas if isinstance(getattr(meta, "amax_history", None), Tensor)
        }

    before = {key: history.clone() for key, history in histories().items()}
    try:
        yield
    finally:
        for key, history in histories().items():
            # a module that had none had seen nothing
            history.copy_(before.get(key, torch.zeros_like(history)))


class DriftWatch:
    """Measures as the run file says, and stops a run whose drift is over the limit. Does nothing without FP8."""

    def __init__(
        self,
        state: TrainState,
        stream: Stream,
        config: Config,
        context: ParallelContext,
        per_pass: int,
        on_pass: Callable[[], None],
    ) -> None:
        """stream: the training data. per_pass: see `measure`. on_pass: called before a measurement."""
        self._state, self._stream, self._context = state, stream, context
        self._per_pass, self._on_pass = per_pass, on_pass
        self._model, self._train = config.model, config.train

    def at_start(self, log: Any) -> None:
        """Measure before the first step of this start, and tell of it; a new run's goes into the log as step 0. Raises
        as `check`."""
        if self._model.fp8_format is None:
            return
        step = self._state.step
        # Transformer Engine's scales are in no checkpoint, so that every start is without them
        if self._model.fp8_recipe == "delayed" and (step == 0 or self._model.real_fp8):
            log.line("FP8 drift  not measured before the first step: delayed scaling knows no scales yet")
            return
        drift = self._measured()
        margin = "" if drift.margin is None else f", {drift.margin:.2g} of the margin"
        log.line(
            f"FP8 drift  step {step}: {drift.token:.2g} nats per token (at most {drift.token_max:.2g}), "
            f"{drift.response:.2g} per response{margin}, on a probe of {len(self._groups)} groups"
        )
        if step == 0:
            log.step({"step": 0, **drift.metrics})
        self.check(drift)

    def log_step(self, log: Any, record: dict[str, Any]) -> None:
        """Write a step's record, with the drift where it is due. Raises as `check`, once it is written."""
        every = self._train.fp8_probe_steps
        if self._model.fp8_format is None or every == 0 or self._state.step % every:
            log.step(record)
            return
        drift = self._measured()
        log.step({**record, **drift.metrics})
        self.check(drift)

    def check(self, drift: Drift) -> None:
        """Raise NumericsError, on every rank, where it is over the limit or no number."""
        limit = self._train.fp8_drift_limit
        if limit is None or drift.token <= limit:
            return
        model = self._model
        ends = model.fp8_recipe == "delayed" or model.first_last_layers_bf16  # not possible, or done
        raise NumericsError(
            f"step {self._state.step}: FP8 moves log-probabilities by {drift.token:.3g} nats per token, "
            f"train.fp8_drift_limit = {limit:g}: {'' if ends else 'set model.first_last_layers_bf16, '}take another "
            "model.fp8_recipe, or raise the limit; checkpoints are those of the steps before"
        )

    @property
    def _groups(self) -> np.ndarray:
        return probe_groups(len(self._stream.store), self._train.fp8_probe_groups)

    def _measured(self) -> Drift:
        self._on_pass()
        return measure(self._state.chunks, self._stream, self._groups, self._per_pass, self._context)
