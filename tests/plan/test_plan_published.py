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
    assert len(cells) == 6
    assert case.published in cells[2]
    assert "tok/s/GPU" in cells[3]
