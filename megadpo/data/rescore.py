"""Rows of a data set with new scores written into them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from megadpo.data.records import COMPLETION_SCORE, Dropped, Group, Text, completion, read_groups
from megadpo.data.sources import Row, read_rows
from megadpo.errors import StorageError
from megadpo.files import storage_errors


def check_out(path: Path) -> None:
    """Raises StorageError where the scores could not be written there."""
    if path.suffix != ".jsonl":
        raise StorageError(f"{path}: scores are written as JSON lines; give a name that ends in .jsonl")
    if path.exists():
        raise StorageError(f"{path}: exists; give a new name, or remove it")
    with storage_errors(path, "OUT"):
        path.parent.mkdir(parents=True, exist_ok=True)


def write_scores(
    source: str, split: str | None, format: str, scores: Mapping[str, tuple[float, ...]], out: Path
) -> int:
    """Write every row of `source` with its scores, in its order, as JSON lines; how many rows have none.

    scores: of the responses of the row with that origin, as records.Group orders them. Pairs: `chosen_score`,
    `rejected_score`, and `margin` where the row has one. Lists: `score` of every completion, or the list `scores` where
    completions are bare text. One response: `score`. null where a row was left out.
    """
    missing = 0
    partial = out.with_name(f".{out.name}.partial")
    with storage_errors(out, "OUT"):
        try:
            with partial.open("x", encoding="utf-8") as file:
                for row, item in _rows(source, split, format):
                    known = scores.get(item.origin)
                    missing += known is None
                    if isinstance(item, Group):
                        row = scored_row(row, item, known)
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
            partial.rename(out)
        finally:
            partial.unlink(missing_ok=True)
    return missing


def _rows(source: str, split: str | None, format: str) -> Iterator[tuple[Row, Group | Dropped]]:
    rows = (row for _, row in read_rows(source, split))
    return zip(rows, read_groups(source, split, format), strict=True)


def scored_row(row: Row, group: Group, scores: tuple[float, ...] | None) -> Row:
    """The row with the scores of its group's responses."""
    values = scores or (None,) * len(group.responses)
    if group.kind == "lists":
        return _scored_list(row, dict(zip(group.responses, values, strict=True)), isinstance(group.prompt, str))
    if group.kind == "pairs":
        chosen, rejected = values
        margin = None if chosen is None or rejected is None else chosen - rejected
        return (
            row | {"chosen_score": chosen, "rejected_score": rejected} | ({"margin": margin} if "margin" in row else {})
        )
    return row | {"score": values[0]}


def _scored_list(row: Row, by_text: dict[Text, float | None], plain: bool) -> Row:
    """Responses may stand in another order in the row; equal texts have equal scores."""
    name = "completions" if "completions" in row else "responses"
    scores = [by_text[completion(item, plain)] for item in row[name]]
    if "scores" in row or not all(isinstance(item, dict) for item in row[name]):
        return row | {"scores": scores}
    return row | {name: [{**item, COMPLETION_SCORE[0]: score} for item, score in zip(row[name], scores, strict=True)]}
