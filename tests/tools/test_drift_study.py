"""The study's table and picture, from runs that are made up."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import drift_study
from drift_study import Plan, Trained, Way, compared, kept, picture, table


def trained(losses: list[float], accuracy: float | None, drift: float | None) -> Trained:
    figures = {} if drift is None else {f"{name}_drift": drift for name in ("token", "response", "margin")}
    start = figures | {"token_drift_max": 2 * drift} if drift else {}
    return Trained(losses, [1.0], None if accuracy is None else 0.5, accuracy, start, figures, 1.0)


PLAIN, MX = Way(None), Way("mxfp8", "hybrid", True)
RUNS = {
    (PLAIN, 0): trained([0.7, 0.6], 0.8, None),
    (PLAIN, 1): trained([0.7, 0.5], 0.7, None),
    (MX, 0): trained([0.7, 0.7], 0.7, 0.1),
    (MX, 1): trained([0.7, 0.4], 0.8, 0.3),
}


def test_table_and_picture() -> None:
    """Compared with the same order's bfloat16: loss differs by 0.1 in one of two steps; accuracy by -0.1 and +0.1."""
    [_, _, row, _, said] = table(RUNS, [0, 1])
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[:6] == ["mxfp8", "hybrid", "yes", "0.200, 0.400", "0.200", "0.200"]
    assert cells[6:9] == ["0.200", "0.200", "0.0500"]
    assert cells[10].endswith("± 0.100")
    assert said == "bfloat16: held-out loss 0.5000, accuracy 0.750."
    assert compared([RUNS[MX, 0]], [RUNS[PLAIN, 0]], "accuracy", 3) == "-0.100"
    assert compared([trained([1.0], None, 0.1)], [trained([1.0], None, None)], "accuracy", 3) == "-"
    drawn = picture({"small": RUNS}, {"small": [0, 1]})
    assert drawn.count("<rect") == 2
    assert "mxfp8 hybrid, ends in bf16" in drawn


def test_what_ran_is_kept(tmp_path: Path, monkeypatch: object) -> None:
    """A run that is in the file is not run again; another one is."""
    options = argparse.Namespace(keep=str(tmp_path / "kept"), probe=8)
    plan = Plan("small", tmp_path, 2, 4, 1e-3, [0], True)
    runs = iter([RUNS[MX, 0], RUNS[MX, 1]])
    monkeypatch.setattr(drift_study, "train", lambda *_: next(runs))  # type: ignore[attr-defined]
    assert kept(options, plan, MX, 0) == kept(options, plan, MX, 0) == RUNS[MX, 0]
    assert kept(options, plan, MX, 1) == RUNS[MX, 1]
    lines = [json.loads(line) for line in Path(options.keep).read_text().splitlines()]
    assert [line["run"] for line in lines] == [asdict(RUNS[MX, 0]), asdict(RUNS[MX, 1])]
