"""The scorecard in docs/reliability.md is what the soak measured, and nothing else."""

import json

import soak


def test_the_page_has_the_measured_rows() -> None:
    page = soak.PAGE.read_text()
    kept = json.loads(soak.KEPT.read_text()) if soak.KEPT.exists() else {}
    assert kept.keys() <= soak.ROWS.keys()
    assert f"{soak.BEGIN}\n{soak.table(kept)}\n{soak.END}" in page, "python tools/soak.py writes it"


def test_a_row_without_a_measurement_says_so() -> None:
    assert soak.table({}).count("not measured") == len(soak.ROWS)
