"""Mistakes put into the code must be seen by the tests that are there for them."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

from mutants import MUTANTS, QUICK, mutated, table


def test_every_mutant_still_applies() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 20
    for mutant in MUTANTS:
        compile(mutated(mutant), mutant.module, "exec")


def test_some_are_caught() -> None:
    _, alive = table([mutant for mutant in MUTANTS if mutant.name in QUICK])
    assert alive == []


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_all_are_caught() -> None:
    _, alive = table(MUTANTS)
    assert alive == []
