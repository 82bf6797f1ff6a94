"""The table of published figures: every case is a grid that a run would start on, and its row has both sides."""

from pathlib import Path

import plan_published
import pytest
from counted import count

from megadpo.observe.gpus import GPUS
from megadpo.plan.grids import Candidate, Space, reasons
from megadpo.train.inputs import read_shapes


@pytest.mark.parametrize("case", plan_published.CASES, ids=lambda case: case.what)
def test_case(case: plan_published.Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = plan_published.config_of(case, tmp_path)
    tensor, pipeline, chunks = case.grid
    data = case.gpus // tensor // pipeline
    one = Candidate(tensor, pipeline, chunks, data, 1, tensor > 1, case.tokens, case.recompute, case.reference)
    rows = case.responses * (case.sequence - 1)
    assert not reasons(Space(config, read_shapes(config, 1), GPUS[case.gpu], case.gpus, rows), one)
    monkeypatch.setattr(plan_published, "rank_numbers", count)
    cells = plan_published.row(case, tmp_path).split(" | ")
    assert len(cells) == 7
    assert case.published in cells[2]
    assert (f"{case.rate} tok/s/GPU" in case.published) if case.rate else ("tok/s/GPU" not in case.published)
    assert ("%" in cells[3]) == (case.rate is not None)
    assert "tok/s/GPU" in cells[4]


def test_published_speed_in_our_formula(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: Llama 3.1 8B, 8192 causal rows, all of them scored, at the published tokens per second. Its memory is
    over the device's."""
    [case] = [one for one in plan_published.CASES if one.rate == 14451]
    monkeypatch.setattr(plan_published, "rank_numbers", count)
    cells = plan_published.row(case, tmp_path).split(" | ")
    layer = 4096 * (4096 + 2 * 1024) + 4096 * 4096 + 3 * 4096 * 14336
    attention = 2 * 4096 * (8192 + 1) / 2  # products of queries and values, attended rows on average
    token = 3 * 2 * (32 * (layer + attention) + 4096 * 128256)
    assert float(cells[3].removesuffix(" %")) == pytest.approx(100 * 14451 * token / 989.4e12, abs=0.06)


def test_what_does_not_fit_is_marked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_published, "rank_numbers", count)
    assert "does not fit" not in plan_published.row(plan_published.CASES[4], tmp_path)
    monkeypatch.setattr(plan_published, "usable", lambda gpu: 2**30)
    assert "**does not fit**" in plan_published.row(plan_published.CASES[4], tmp_path)
