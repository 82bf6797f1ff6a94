"""What one step works through: lengths of the data, prepared or assumed, dealt to micro-batches as a run does it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from megadpo.convert.shape import ModelShape
from megadpo.data.batch import attention_area, scored_rows, stream_tokens
from megadpo.data.packing import Budget, deal
from megadpo.data.store import GroupStore
from megadpo.model.flops import attended_pairs, group_cost
from megadpo.plan import constants

SAMPLED_GROUPS = 1024
"""About so many are dealt, in whole global batches; what a step has is their mean."""


@dataclass(frozen=True)
class Lengths:
    """Of a data set, or of a sample of it."""

    groups: int
    """Of the data set."""
    rows_G: np.ndarray
    """int64: rows of the stream of each group of the sample."""
    area_G: np.ndarray
    """float64: pairs of rows of which one attends to the other."""
    window_area_G: np.ndarray
    """float64: the same in a layer with a window; equal where the model has none."""
    scored_G: np.ndarray
    """int64: rows that meet the head."""
    cost_G: np.ndarray
    """float64: what balances the ranks, in units of one row's linear layers."""
    useful_rows_G: np.ndarray
    """int64: rows with each prompt once, whether it stands once or not: what MFU counts."""
    useful_area_G: np.ndarray
    """float64: attended pairs of those, inside a window where a layer has one; the mean over the layers."""
    longest: int
    """Rows of the longest group of the data set."""
    said: str
    """Where they are from, for the user."""


@dataclass(frozen=True)
class _Store:
    """What data/batch.py reads of a GroupStore."""

    prompt_lengths: np.ndarray
    response_lengths: np.ndarray
    scored_lengths: np.ndarray
    offsets: np.ndarray


def of_store(store: GroupStore, share: bool, shape: ModelShape) -> Lengths:
    return _lengths(store, len(store), share, shape, f"{store.folder} ({len(store)} groups)")


@dataclass(frozen=True)
class Assumed:
    """Data that nobody has looked at: log-normal lengths."""

    groups: int
    responses: int
    """Of a group."""
    prompt: float
    """Mean tokens."""
    response: float
    """Mean tokens."""
    spread: float = constants.ASSUMED_SPREAD
    """Standard deviation of the logarithm; 0: every length is the mean."""

    def text(self, max_length: int) -> str:
        kind = "responses" if self.responses > 1 else "response"
        return (
            f"{self.groups} groups of {self.responses} {kind}, prompts of {self.prompt:g} and responses of "
            f"{self.response:g} tokens on average, log-normal (spread {self.spread:g}), cut at {max_length}"
        )


def assumed(
    data: Assumed, max_length: int, share: bool, shape: ModelShape, most_rows: int | None = None, sample: int = 4096
) -> Lengths:
    """A sample of such data, cut so that prompt + response fit `max_length`, the prompt first, as data.truncation_mode
    keep_end does, and that a group takes at most `most_rows` rows.
    """
    rng = np.random.default_rng(0)

    def draw(mean: float, *size: int) -> np.ndarray:
        lengths = mean * np.exp(data.spread * rng.standard_normal(size) - data.spread**2 / 2)
        return np.maximum(np.rint(lengths), 1).astype(np.int64)

    answers_GS = np.minimum(draw(data.response, sample, data.responses), max_length - 1)
    copies = 1 if share else data.responses
    if most_rows is not None:
        answers_GS = np.minimum(answers_GS, max(most_rows // data.responses - 1, 1))
    prompts_G = np.minimum(draw(data.prompt, sample), max_length - answers_GS.max(axis=1))
    if most_rows is not None:
        prompts_G = np.minimum(prompts_G, np.maximum((most_rows - answers_GS.sum(axis=1)) // copies, 1))
    answers_S = answers_GS.reshape(-1)
    store = _Store(prompts_G, answers_S, answers_S, np.arange(sample + 1) * data.responses)
    found = _lengths(store, data.groups, share, shape, data.text(max_length))
    if not data.spread:
        return found
    # Among many groups there are some with nothing but responses as long as they may be.
    longest = data.responses * (max_length - 1)
    return replace(found, longest=longest if most_rows is None else min(longest, most_rows))


def _lengths(store: GroupStore | _Store, groups: int, share: bool, shape: ModelShape, said: str) -> Lengths:
    scalar = shape.head != "vocabulary"
    scored_G = scored_rows(store, scalar)  # type: ignore[arg-type]
    rows_G = stream_tokens(store, share, scalar)  # type: ignore[arg-type]
    area_G = attention_area(store, share, scalar)  # type: ignore[arg-type]
    window_G = area_G
    if shape.window is not None:
        window_G = attention_area(store, share, scalar, shape.window.size)  # type: ignore[arg-type]
    cost_G = group_cost(shape).of(store, share, scalar)  # type: ignore[arg-type]
    once_G = stream_tokens(store, scalar=scalar)  # type: ignore[arg-type]
    pairs_G = attended_pairs(shape, store)  # type: ignore[arg-type]
    return Lengths(groups, rows_G, area_G, window_G, scored_G, cost_G, once_G, pairs_G, int(rows_G.max()), said)


@dataclass(frozen=True)
class Work:
    """One step, dealt to the data-parallel ranks. Rows, areas and scored rows are of one micro-batch: of all ranks on
    average (`mean_...`), and of the rank that has most (the step waits for it).
    """

    micro_batches: int
    """Of every data-parallel rank."""
    tokens: int
    """Rows of a micro-batch, padding included."""
    mean_rows: float
    mean_area: float
    mean_scored: float
    useful_rows: float
    """On average; see Lengths."""
    useful_area: float
    most_area: float
    most_window_area: float
    """In a layer with a window."""
    most_scored: float

    @property
    def padding(self) -> float:
        """Share of all rows."""
        return 1 - self.mean_rows / self.tokens


def work(lengths: Lengths, batch: int, ranks: int, tokens: int, most_groups: int | None, multiple: int) -> Work:
    """Deal some global batches of `batch` groups as data/packing.py does, into streams of `tokens` rows.

    multiple: the number of micro-batches is rounded up to a multiple of it.
    """
    rng = np.random.default_rng(1)
    budget = Budget(tokens, most_groups)
    found = []
    for _ in range(max(1, min(3, SAMPLED_GROUPS // batch))):
        groups = rng.integers(0, len(lengths.rows_G), batch)
        rows_G, area_G, scored_G = lengths.rows_G[groups], lengths.area_G[groups], lengths.scored_G[groups]
        dealt = deal(rows_G, lengths.cost_G[groups], budget, ranks)
        shares = [np.array([group for bin_ in part for group in bin_], dtype=np.int64) for part in dealt]
        area = [float(area_G[share].sum()) for share in shares]
        inside = [float(lengths.window_area_G[groups][share].sum()) for share in shares]
        scored = [float(scored_G[share].sum()) for share in shares]
        sums = (rows_G.sum(), area_G.sum(), scored_G.sum())
        useful = (lengths.useful_rows_G[groups].sum(), lengths.useful_area_G[groups].sum())
        found.append((len(dealt[0]), *(each / ranks for each in (*sums, *useful)), max(area), max(inside), max(scored)))
    bins, *means = np.mean(np.array(found, dtype=np.float64), axis=0).tolist()
    count = -(-round(bins) // multiple) * multiple
    rows, *others = (value / count for value in means)
    return Work(count, tokens, min(rows, tokens), *others)
