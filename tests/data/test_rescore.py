"""Scores go to the responses that they belong to, whatever form the row has."""

import json
from pathlib import Path
from typing import Any

import pytest

from megadpo.data.records import Group, read_groups
from megadpo.data.rescore import check_out, write_scores
from megadpo.errors import StorageError

USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."}


@pytest.mark.parametrize(
    ("row", "scores", "after"),
    [
        (
            {"prompt": "a", "chosen": "b", "rejected": "c"},
            (1.0, 2.0),
            {"chosen_score": 1.0, "rejected_score": 2.0},
        ),
        (
            {"prompt": "a", "chosen": "b", "rejected": "c", "margin": 7, "chosen_score": 9},
            (3.0, 1.0),
            {"chosen_score": 3.0, "rejected_score": 1.0, "margin": 2.0},
        ),
        ({"messages": [USER, ANSWER]}, (0.5,), {"score": 0.5}),
        ({"prompt": "a", "completion": "b", "label": True}, (0.5,), {"score": 0.5}),
        # Read best first: c (score 3), then b
        (
            {"prompt": "a", "completions": [{"response": "b", "score": 1}, {"response": "c", "score": 3}]},
            (10.0, 20.0),
            {"completions": [{"response": "b", "score": 20.0}, {"response": "c", "score": 10.0}]},
        ),
        ({"prompt": "a", "responses": ["b", "c"]}, (10.0, 20.0), {"scores": [10.0, 20.0]}),
        (
            {"prompt": "a", "responses": ["b", "c"], "scores": [1, 2]},
            (10.0, 20.0),
            {"scores": [20.0, 10.0]},
        ),
    ],
)
def test_rows(row: dict[str, Any], scores: tuple[float, ...], after: dict[str, Any], tmp_path: Path) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(json.dumps(row) + "\n" + json.dumps(row) + "\n")
    assert write_scores(str(source), None, "auto", {"in.jsonl:1": scores}, out) == 1
    first, second = (json.loads(line) for line in out.read_text().splitlines())
    assert first == row | after
    assert second.keys() == first.keys()
    read = next(iter(read_groups(str(out), None, "auto")))
    assert isinstance(read, Group)
    if len(scores) > 1:
        differences = read.scores[0] - read.scores[-1] if read.scores else None
        assert differences == (abs(scores[0] - scores[1]) if read.ranked else scores[0] - scores[1])


def test_where_scores_may_go(tmp_path: Path) -> None:
    check_out(tmp_path / "new" / "scores.jsonl")
    (tmp_path / "there.jsonl").touch()
    for wrong in ("there.jsonl", "scores.parquet"):
        with pytest.raises(StorageError):
            check_out(tmp_path / wrong)
