"""One micro-batch: a packed stream of groups in which each prompt stands once.

A group's rows are its prompt without the last token, then, per response, the prompt's last token and the response
without its last token. So every row predicts at most one token, every response is treated alike, and a response's rows
attend to the prompt's and to their own. Positions go on from the prompt in every response.

    group       p0 p1 p2 | p3 c0 c1 | p3 r0 r1
    positions    0  1  2 |  3  4  5 |  3  4  5
    predicts     .  .  . | c0 c1 c2 | r0 r1 r2

A reward model (`scalar`) judges a response at its last token, which must therefore be read, and not only predicted: a
group's rows are then the whole prompt, and every response whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from megadpo.data.mismatch import MismatchedStore
from megadpo.data.store import GroupStore
from megadpo.data.tokenize import BODY, SCORED


@dataclass(frozen=True)
class Segment:
    """Rows [start, end) attend causally to themselves and fully to rows [prefix_start, prefix_end)."""

    start: int
    end: int
    prefix_start: int
    prefix_end: int


@dataclass(frozen=True)
class PackedBatch:
    """T rows of the stream, N scored tokens, S responses, G groups. All tensors on one device."""

    tokens_T: Tensor
    """int64; padding rows hold token 0."""
    positions_T: Tensor
    """int64, position of each row in its own sequence."""
    rows_N: Tensor
    """int64, the row that predicts each scored token; responses one after the other."""
    targets_N: Tensor
    """int64, the token that it must predict."""
    tokens_S: Tensor
    """int64, scored tokens of each response."""
    offsets_G1: Tensor
    """int64 [G + 1], the responses of group g are offsets[g] to offsets[g + 1]."""
    reference_S: Tensor | None
    """float64, log-probability of each response under the reference, where it is known."""
    segments: tuple[Segment, ...]
    groups: tuple[int, ...]
    """Numbers of the groups in their store."""
    used: int
    """Rows that are not padding."""
    reference_N: Tensor | None = None
    """float32, log-probability of each scored token under the reference, where the objective looks at tokens."""
    reference_hidden_NE: Tensor | None = None
    """The reference's last hidden states of rows_N, in its dtype, where the objective looks at whole distributions."""
    labels_S: Tensor | None = None
    """bool, whether each response is a desirable one, where the data have labels."""
    scores_S: Tensor | None = None
    """float32, what a judge gave to each response, where the data have scores; NaN for a response without."""
    scalar: bool = False
    """For a reward model: rows_N are the last rows of the responses, one each."""
    body_N: Tensor | None = None
    """bool, False for scored tokens that are the form of a turn and not its text, where that was asked for."""

    def to(self, device: torch.device) -> PackedBatch:
        moved = {
            f.name: getattr(self, f.name).to(device, non_blocking=True)
            for f in fields(self)
            if isinstance(getattr(self, f.name), Tensor)
        }
        return replace(self, **moved)


def stream_tokens(store: GroupStore | MismatchedStore, share: bool = True, scalar: bool = False) -> np.ndarray:
    """int64 [G]: rows of the stream that each group takes, with its prompt once (share) or once per response."""
    prompt, response, group_S = _lengths(store, scalar)
    copies = 1 if share else np.diff(store.offsets)
    return (prompt * copies + np.bincount(group_S, response, len(prompt))).astype(np.int64)


def scored_rows(store: GroupStore | MismatchedStore, scalar: bool = False) -> np.ndarray:
    """int64 [G]: rows of each group that meet the head; of a reward model, one of every response."""
    responses_G = np.diff(store.offsets)
    if scalar:
        return responses_G
    group_S = np.repeat(np.arange(len(responses_G)), responses_G)
    return np.bincount(group_S, store.scored_lengths, len(responses_G)).astype(np.int64)


def attention_area(
    store: GroupStore | MismatchedStore, share: bool = True, scalar: bool = False, window: int | None = None
) -> np.ndarray:
    """float64 [G]: attended pairs of rows in each group; what attention costs beyond the linear layers.

    window: a row attends only to the last so many rows, itself included.
    """
    prompt, response, group_S = _lengths(store, scalar)
    own = _triangle(prompt[group_S] + response, window) - _triangle(prompt[group_S], window)
    copies = 1 if share else np.diff(store.offsets)
    return _triangle(prompt, window) * copies + np.bincount(group_S, own, len(prompt))


def _triangle(rows: np.ndarray, window: int | None) -> np.ndarray:
    """Attended pairs of a sequence of so many rows."""
    steep = rows if window is None else np.minimum(rows, window)
    return steep * (steep + 1) / 2 + (rows - steep) * steep


def _lengths(store: GroupStore | MismatchedStore, scalar: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows of each prompt [G] (without `scalar`, its last token belongs to the responses), of each response [S], and
    its group [S]."""
    prompt = store.prompt_lengths.astype(np.float64) - (0 if scalar else 1)
    return prompt, store.response_lengths.astype(np.float64), np.repeat(np.arange(len(prompt)), np.diff(store.offsets))


def pack(
    store: GroupStore | MismatchedStore,
    groups: Sequence[int],
    length: int,
    reference: np.ndarray | None,
    share: bool = True,
    scalar: bool = False,
) -> PackedBatch:
    """Lay the groups out in a stream of exactly `length` rows. `groups` may be empty; then all rows are padding.

    reference: float64 [S of the store], or None. share: a prompt stands once for all its responses; otherwise once for
    each, which costs more and gives the same numbers. scalar: for a reward model.
    """
    spare = 0 if scalar else 1  # tokens that are predicted, but not read
    tokens = np.zeros(length, dtype=np.int64)
    positions = np.zeros(length, dtype=np.int64)
    segments: list[Segment] = []
    rows: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    bodies: list[np.ndarray] = []
    counts: list[int] = []
    offsets = [0]
    at = 0
    for number in groups:
        group = store.group(number)
        prompt = group.prompt_ids
        before = len(prompt) - spare
        prefix = (at, at)
        if share:
            prefix = (at, at + before)
            tokens[at : at + before] = prompt[:before]
            positions[at : at + before] = np.arange(before)
            if before:
                segments.append(Segment(*prefix, at, at))
            at += before
        for k, response in enumerate(group.response_ids):
            own = prompt[before:] if share else prompt
            end = at + len(own) + len(response) - spare
            tokens[at : at + len(own)] = own
            tokens[at + len(own) : end] = response[: len(response) - spare]
            positions[at:end] = np.arange(end - at) + (before if share else 0)
            segments.append(Segment(at, end, *(prefix if share else (at, at))))
            marks = np.full(len(response), SCORED) if group.marks is None else group.marks[k]
            scored = (marks & SCORED) > 0
            counts.append(int(scored.sum()))
            rows.append(np.array([end - 1]) if scalar else np.arange(end - len(response), end)[scored])
            targets.append(response[-1:] if scalar else response[scored])
            bodies.append((marks[scored] & BODY) > 0)
            at = end
        offsets.append(offsets[-1] + len(group.response_ids))
    members = [np.arange(store.offsets[number], store.offsets[number + 1]) for number in groups]
    responses_S = _concatenate(members)
    assert at <= length, f"{at} rows in a stream of {length}"
    return PackedBatch(
        tokens_T=torch.from_numpy(tokens),
        positions_T=torch.from_numpy(positions),
        rows_N=torch.from_numpy(_concatenate(rows)),
        targets_N=torch.from_numpy(_concatenate(targets)),
        tokens_S=torch.tensor(counts, dtype=torch.int64),
        offsets_G1=torch.tensor(offsets, dtype=torch.int64),
        reference_S=None if reference is None else torch.from_numpy(reference[responses_S].astype(np.float64)),
        segments=tuple(segments),
        groups=tuple(int(number) for number in groups),
        used=at,
        scalar=scalar,
        labels_S=None if store.labels_S is None else torch.from_numpy(store.labels_S[responses_S]),
        scores_S=None if store.scores_S is None else torch.from_numpy(store.scores_S[responses_S]),
        body_N=torch.from_numpy(_concatenate(bodies, np.bool_)) if store.bodies else None,
    )


def _concatenate(parts: list[np.ndarray], dtype: type = np.int64) -> np.ndarray:
    return np.concatenate(parts).astype(dtype) if parts else np.zeros(0, dtype=dtype)
