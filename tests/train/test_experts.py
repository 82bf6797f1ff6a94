"""A model with experts trains the same on every grid: loss, gradient norm, every gradient and every updated weight."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from distributed import run_ranks
from mixtures import COMMON, write_mixture
from tiny import random_groups

from megadpo.data.packing import Budget
from train.engine import Case, assemble, run, worst

VOCAB = COMMON["vocab_size"]
NOISE = 2e-5


@pytest.fixture(scope="module", params=["mixtral"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = write_mixture(request.param, tmp_path_factory.mktemp("model"))
    return Case(folder, random_groups(16, vocab=VOCAB), learning_rate=1e-4)


@pytest.fixture(scope="module")
def single(base: Case) -> dict[str, Any]:
    [[result]] = run_ranks(1, run, [replace(base, budget=Budget(400))])
    return result | {what: assemble([result], what, VOCAB) for what in ("gradients", "weights")}


def compare(results: list[list[dict[str, Any]]], cases: list[Case], want: dict[str, Any]) -> None:
    for index, case in enumerate(cases):
        ranks = [rank[index] for rank in results]
        assert [x.loss for x in ranks[0]["sums"]] == pytest.approx([x.loss for x in want["sums"]], rel=NOISE)
        assert ranks[0]["grad_norms"] == pytest.approx(want["grad_norms"], rel=NOISE), case
        np.testing.assert_allclose(ranks[0]["column"], want["column"], atol=5e-5)
        for what in ["weights"] if case.distributed else ["gradients", "weights"]:
            difference, name = worst(assemble(ranks, what, VOCAB), want[what])
            assert difference < NOISE, f"{case}: {what}: {name} differs by {difference:.1e}"


def test_two_ranks(base: Case, single: dict[str, Any]) -> None:
    split = replace(base, tensor=2, sequence=True)
    cases = [
        base,  # data-parallel 2, every expert on both
        replace(base, expert=2),
        replace(base, expert=2, distributed=True, overlap=True, bucket_size=500),
        replace(base, expert=2, recompute="full"),
        replace(base, expert=2, recompute="selective", budget=Budget(64, groups=1)),
        replace(base, expert=2, share=False),
        split,
        replace(split, expert=2),
        replace(split, expert=2, distributed=True),
        replace(base, pipeline=2),
    ]
    compare(run_ranks(2, run, cases), cases, single)
