"""The reference column: one log-probability per response of a store, by the same forward pass as training."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from megadpo.data.store import ReferenceColumns
from megadpo.data.stream import Stream
from megadpo.errors import NumericsError
from megadpo.parallel.context import ParallelContext
from megadpo.train.passes import score

CODE_VERSION = 2
"""Raise where a change of the forward pass could move reference log-probabilities."""

WRITE_EVERY = 60.0
"""Seconds between two writes of a column that is being filled."""

TOLERANCE = {"float32": 1e-3, "bfloat16": 0.5, "fp8": 10.0}
"""Nats by which a recomputed response may differ from the stored one, per 100 tokens. Other packing and other grids
give other roundings; another model or another text gives whole nats. In FP8 a tensor's scale depends on all that is
in the stream, so that responses differ by up to what FP8 moves them (docs/fp8.md); there, only another text is found.
"""


def reference_digest(weights: str, store: str, precision: str) -> str:
    """What a column depends on. `weights` and `store` are digests; tokenizer and template are in the store's.
    precision: see model/fp8.py."""
    return hashlib.sha256(f"{CODE_VERSION}:{weights}:{store}:{precision}".encode()).hexdigest()[:32]


def stored_column(store: ReferenceColumns, digest: str, context: ParallelContext) -> np.ndarray:
    """float64 [S], NaN where a response was never scored. As the first rank sees it: the file may grow meanwhile."""
    known = store.reference(digest)
    if known is None:
        known = np.full(len(store.response_lengths), np.nan, dtype=np.float64)
    return context.from_first(torch.from_numpy(known).to(context.device)).cpu().numpy()


def fill_column(
    column: np.ndarray,
    groups: np.ndarray,
    digest: str,
    chunks: Sequence[Any],
    stream: Stream,
    per_pass: int,
    context: ParallelContext,
    progress: Callable[[int], None],
) -> None:
    """Score `groups` into the column, which is written now and then, so that a run that is stopped loses little.

    Raises NumericsError where a log-probability is not finite; it names the group's row.
    """
    written = time.monotonic()
    for start in range(0, len(groups), per_pass):
        part = groups[start : start + per_pass]
        fresh = score_groups(chunks, stream, part, per_pass, context, lambda done: None)
        of_part = _responses(stream, part).numpy()
        if not np.isfinite(fresh[of_part]).all():
            bad = next(g for g in part if not np.isfinite(fresh[_responses(stream, [g]).numpy()]).all())
            raise NumericsError(
                f"the reference gives {stream.store.group(int(bad)).origin} a log-probability that is not finite: its "
                "weights, or that row, are damaged"
            )
        column[of_part] = fresh[of_part]
        done = min(start + per_pass, len(groups))
        if context.is_first and (done == len(groups) or time.monotonic() - written > WRITE_EVERY):
            stream.store.write_reference(digest, column)
            written = time.monotonic()
        progress(done)


def known_groups(column: np.ndarray, stream: Stream) -> np.ndarray:
    """bool [G of the store]: whether all responses of a group are in the column."""
    return np.bitwise_and.reduceat(~np.isnan(column), stream.store.offsets[:-1])


def score_groups(
    chunks: Sequence[Any],
    stream: Stream,
    groups: np.ndarray,
    per_pass: int,
    context: ParallelContext,
    progress: Callable[[int], None],
) -> np.ndarray:
    """float64 [S of the store], NaN except for the responses of `groups`; the same on every rank.

    per_pass: groups given to the pipeline at once. progress: told how many groups are done.
    """
    column = torch.zeros(int(stream.store.offsets[-1]), dtype=torch.float64, device=context.device)
    done = np.zeros(len(column), dtype=bool)
    for start in range(0, len(groups), per_pass):
        part = groups[start : start + per_pass]
        batches = stream.batches(part, context.data_rank, reference=None)
        for batch, scores in zip(batches, score(chunks, batches, context), strict=False):
            column[_responses(stream, batch.groups).to(column.device)] = scores.sums_S.double()
        done[_responses(stream, part).numpy()] = True
        progress(start + len(part))
    if context.holds_loss:
        context.sum_over_data(column)
    result = context.from_last_stage(column).cpu().numpy()
    result[~done] = np.nan
    return result


def _responses(stream: Stream, groups: Sequence[int] | np.ndarray) -> torch.Tensor:
    """int64: numbers of the groups' responses in the store, in order."""
    offsets = stream.store.offsets
    spans = [np.arange(offsets[g], offsets[g + 1]) for g in groups]
    return torch.from_numpy(np.concatenate(spans) if spans else np.zeros(0, dtype=np.int64))


def check_column(column: np.ndarray, stream: Stream, dtype: str, fresh: np.ndarray) -> float:
    """Compare a stored column with freshly computed entries (those that are not NaN); the largest difference, in nats.

    Raises NumericsError where one is over the tolerance: the column is not this model's on this data.
    """
    known = ~np.isnan(fresh)
    if not known.any():
        return 0.0
    difference = np.abs(column - fresh)[known]
    allowed = TOLERANCE[dtype] * np.maximum(stream.store.response_lengths[known] / 100, 1.0)
    worst = int((difference - allowed).argmax())
    if not difference[worst] <= allowed[worst]:
        raise NumericsError(
            f"the stored reference log-probability of a response is {column[known][worst]:.4f}, computed again it is "
            f"{fresh[known][worst]:.4f} (allowed difference {allowed[worst]:.4f}): the column is not this model's; "
            "remove the reference-*.arrow files from data.cache_dir, or set reference.mode: resident"
        )
    return float(difference.max())
