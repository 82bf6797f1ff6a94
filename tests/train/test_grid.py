"""The grid does not matter: loss, every gradient and every updated weight agree on all of them."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from distributed import run_ranks
from megadpo_kernels import Backend
from tiny import random_groups, write_llama

from megadpo.data.packing import Budget
from train.engine import Case, assemble, run, worst

VOCAB = 67  # does not divide by 2: the vocabulary is padded under tensor parallelism
NOISE = 1e-5


@pytest.fixture(scope="module", params=["untied", "tied"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """5 layers, which do not divide by 2 stages; 4 heads on 2 groups; biases."""
    folder = write_llama(
        tmp_path_factory.mktemp("llama"), layers=5, vocab=VOCAB, tied=request.param == "tied", bias=True
    )
    return Case(folder, random_groups(19, vocab=VOCAB))


def compare(results: list[list[dict[str, Any]]], index: int, want: dict[str, Any], gradients: bool = True) -> None:
    ranks = [rank[index] for rank in results]
    for got, expected in zip(ranks[0]["sums"], want["sums"], strict=True):
        assert got.groups == expected.groups
        assert got.tokens == expected.tokens
        assert got.loss == pytest.approx(expected.loss, rel=NOISE)
        assert got.metrics == pytest.approx(expected.metrics, rel=NOISE, abs=1e-5)
    assert ranks[0]["grad_norms"] == pytest.approx(want["grad_norms"], rel=NOISE)
    if want["column"] is not None:
        np.testing.assert_allclose(ranks[0]["column"], want["column"], atol=2e-5)
    for what in ["gradients", "weights"] if gradients else ["weights"]:
        difference, name = worst(assemble(ranks, what, VOCAB), want[what])
        assert difference < NOISE, f"{what}: {name} differs by {difference:.1e}"


@pytest.fixture(scope="module")
def single(base: Case) -> dict[str, Any]:
    """The same training on one rank, one micro-batch per step."""
    [[result]] = run_ranks(1, run, [replace(base, budget=Budget(400))])
    return {
        **result,
        "gradients": assemble([result], "gradients", VOCAB),
        "weights": assemble([result], "weights", VOCAB),
    }


def test_reference_equals_policy_at_the_start(single: dict[str, Any]) -> None:
    assert single["sums"][0].loss == pytest.approx(np.log(2), abs=1e-6)
    assert single["sums"][0].metrics["rewards/margins"] == pytest.approx(0, abs=1e-5)


def test_it_moves(base: Case, single: dict[str, Any]) -> None:
    """Every tensor gets a gradient, and the loss over the same groups falls."""
    assert all(g.norm() > 0 for g in single["gradients"].values())
    [[result]] = run_ranks(1, run, [replace(base, store=random_groups(8, vocab=VOCAB), steps=3)])
    losses = [sums.loss for sums in result["sums"]]
    assert losses[0] > losses[1] > losses[2]


def test_micro_batches(base: Case, single: dict[str, Any]) -> None:
    cases = [
        replace(base, budget=Budget(96)),
        replace(base, budget=Budget(64, groups=1)),
        replace(base, budget=Budget(400, groups=3)),
        replace(base, recompute="full"),
        replace(base, recompute="selective"),
        replace(base, resident=True),
        replace(base, share=False),
        replace(base, distributed=True),
    ]
    results = run_ranks(1, run, cases)
    for index in range(len(cases)):
        compare(results, index, single, gradients=not cases[index].distributed)


def test_two_ranks(base: Case, single: dict[str, Any]) -> None:
    cases = [
        replace(base, tensor=2),
        replace(base, tensor=2, sequence=True),
        replace(base, tensor=2, sequence=True, recompute="full"),
        replace(base, pipeline=2),
        replace(base, pipeline=2, virtual=2),
        replace(base, pipeline=2, resident=True),
        base,  # data-parallel 2
        replace(base, overlap=True),
        replace(base, distributed=True),
        replace(base, distributed=True, overlap=True, bucket_size=500),
    ]
    results = run_ranks(2, run, cases)
    for index, case in enumerate(cases):
        compare(results, index, single, gradients=not case.distributed)


def test_four_ranks(base: Case, single: dict[str, Any]) -> None:
    cases = [
        replace(base, tensor=2, pipeline=2),
        replace(base, tensor=2, pipeline=2, sequence=True),
        replace(base, tensor=2, pipeline=2, virtual=2, sequence=True),
        replace(base, tensor=2, sequence=True),  # x data-parallel 2
        replace(base, pipeline=2, distributed=True, overlap=True, bucket_size=500),  # x data-parallel 2
        replace(base, pipeline=4),
        base,  # data-parallel 4
    ]
    results = run_ranks(4, run, cases)
    for index, case in enumerate(cases):
        compare(results, index, single, gradients=not case.distributed)


def test_a_wrong_gradient_would_be_seen(base: Case, single: dict[str, Any]) -> None:
    """The comparison itself can fail: one more pair in the batch is far over the noise."""
    [[other]] = run_ranks(1, run, [replace(base, batch=9)])
    difference, _ = worst(assemble([other], "gradients", VOCAB), single["gradients"])
    assert difference > 100 * NOISE


def test_bfloat16_stays_near(base: Case, single: dict[str, Any]) -> None:
    """Not equal, but the same direction: bfloat16 has 8 bits of mantissa."""
    [[result]] = run_ranks(1, run, [replace(base, dtype="bfloat16", distributed=True)])
    for got, expected in zip(result["sums"], single["sums"], strict=True):
        assert got.loss == pytest.approx(expected.loss, rel=0.03)
    assert torch.isfinite(torch.tensor(result["grad_norms"])).all()


@pytest.mark.slow
@pytest.mark.timeout(1800)  # Triton's interpreter
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_every_grid_with_every_back_end(base: Case, single: dict[str, Any], backend: Backend) -> None:
    """All of the above with the head's other back ends (tests/kernels/test_engine.py has a slice of it)."""
    for grids in (test_micro_batches, test_two_ranks, test_four_ranks):
        grids(replace(base, logprob_backend=backend), single)
