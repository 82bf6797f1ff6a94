"""Models with experts and latent attention train the same on every grid: loss, gradient norm, every gradient, every
updated weight. That the gradients of one rank are right is in tests/model/test_expert_streams.py."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distributed import run_ranks
from families_table import COMMON, write
from tiny import random_groups

from megadpo import checkpoint
from megadpo.data.packing import Budget
from megadpo.parallel.context import grid
from megadpo.train.optimizer import set_learning_rate, settled
from megadpo.train.score import score_groups
from megadpo.train.step import train_step
from train.engine import Case, assemble, build, pieces, run, worst

VOCAB = int(COMMON["vocab_size"])
NOISE = 2e-5


@pytest.fixture(scope="module", params=["deepseek_v3", "gpt_oss", pytest.param("mixtral", marks=pytest.mark.slow)])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Latent attention, shared experts, a selection bias and a plain layer; sinks and biases; neither."""
    folder = write(request.param, tmp_path_factory.mktemp("model") / request.param)
    return Case(folder, random_groups(16, vocab=VOCAB), learning_rate=1e-4)


@pytest.fixture(scope="module")
def single(base: Case) -> dict[str, Any]:
    """One rank, one micro-batch per step; twice, to see that nothing is left to chance."""
    [results] = run_ranks(1, run, [replace(base, budget=Budget(400))] * 2)
    one, two = (x | {what: assemble([x], what, VOCAB) for what in ("gradients", "weights")} for x in results)
    assert one["grad_norms"] == two["grad_norms"]
    assert all(torch.equal(one["weights"][key], two["weights"][key]) for key in one["weights"])
    return one


def compare(results: list[list[dict[str, Any]]], cases: list[Case], want: dict[str, Any]) -> None:
    for index, case in enumerate(cases):
        ranks = [rank[index] for rank in results]
        assert [x.loss for x in ranks[0]["sums"]] == pytest.approx([x.loss for x in want["sums"]], rel=NOISE), case
        assert ranks[0]["grad_norms"] == pytest.approx(want["grad_norms"], rel=NOISE), case
        np.testing.assert_allclose(ranks[0]["column"], want["column"], atol=5e-5)
        for what in ["weights"] if case.distributed else ["gradients", "weights"]:
            difference, name = worst(assemble(ranks, what, VOCAB), want[what])
            assert difference < NOISE, f"{case}: {what}: {name} differs by {difference:.1e}"


def fitting(cases: list[Case], short: int) -> list[Case]:
    """gpt-oss: the first `short`, and none that splits experts, which have biases there."""
    if cases[0].folder.name != "gpt_oss":
        return cases
    return [case for case in cases[:short] if case.tensor == 1 or case.expert > 1]


def test_two_ranks(base: Case, single: dict[str, Any]) -> None:
    split = replace(base, tensor=2, sequence=True)
    cases = fitting(
        [
            replace(base, expert=2, distributed=True, overlap=True, bucket_size=500),
            replace(split, expert=2),
            replace(base, pipeline=2, virtual=2),
            base,  # data-parallel 2, every expert on both
            replace(base, expert=2),
            replace(base, expert=2, recompute="full"),
            replace(base, expert=2, recompute="selective", budget=Budget(64, groups=1)),
            replace(base, expert=2, share=False),
            split,
            replace(split, distributed=True),
            replace(split, expert=2, distributed=True),
            replace(base, pipeline=2),
        ],
        short=4,
    )
    compare(run_ranks(2, run, cases), cases, single)


def test_four_ranks(base: Case, single: dict[str, Any]) -> None:
    split = replace(base, tensor=2, sequence=True)
    cases = fitting(
        [
            replace(split, pipeline=2, expert=2),
            replace(split, expert=2),  # x data-parallel 2
            replace(base, expert=2, distributed=True),  # two of every expert
            replace(split, expert=4, distributed=True),
            replace(base, pipeline=2, virtual=2, expert=2, resident=True),
        ],
        short=1,
    )
    compare(run_ranks(4, run, cases), cases, single)


def go_on(device: torch.device, cases: list[Case], folder: Path, stop: int, save: bool) -> list[dict[str, Any]]:
    """Each case up to step `stop`, from the newest checkpoint where there is one."""
    found = []
    for case in cases:
        with grid(case.parallel, device, 0) as context:
            state, stream = build(case, context)
            column = score_groups(state.modules, stream, np.arange(len(case.store)), 5, context, lambda done: None)
            newest = checkpoint.latest(folder)
            if newest is not None:
                checkpoint.load(state, newest)
            losses = []
            while state.step < stop:
                set_learning_rate(state.optimizer, 1e-4)
                groups = stream.next_groups(state.consumed, case.batch)
                batches = stream.batches(groups, context.data_rank, column)
                sums, norm = train_step(state, batches, case.objective, None, context)
                losses += [sums.loss, norm]
            if save:
                checkpoint.save(state, folder, 10, 1, context)
            with settled(state.chunks):
                found.append({"losses": losses, "weights": pieces(state, lambda p: p.data)})
    return found


@pytest.mark.parametrize(
    "base", ["deepseek_v3", *(pytest.param(x, marks=pytest.mark.slow) for x in ("gpt_oss", "mixtral"))], indirect=True
)
def test_a_checkpoint_goes_on_on_another_grid(base: Case, tmp_path: Path) -> None:
    """Masters and moments of experts find their way between grids that deal them out differently."""
    dealt, alone = replace(base, expert=2, distributed=True), replace(base, distributed=True)
    whole = run_ranks(2, go_on, [dealt], tmp_path / "none", 3, False)
    want = assemble([rank[0] for rank in whole], "weights", VOCAB)
    run_ranks(2, go_on, [dealt], tmp_path, 2, True)
    cases = [dealt, replace(dealt, tensor=2, sequence=True), replace(alone, pipeline=2), alone]
    results = run_ranks(2, go_on, cases, tmp_path, 3, False)
    for index in range(len(cases)):
        ranks = [rank[index] for rank in results]
        assert ranks[0]["losses"] == pytest.approx(whole[0][0]["losses"][-2:], rel=NOISE)
        difference, name = worst(assemble(ranks, "weights", VOCAB), want)
        assert difference < NOISE, f"{name} differs by {difference:.1e}"
    [[one]] = run_ranks(1, go_on, [alone], tmp_path, 3, True)
    assert worst(assemble([one], "weights", VOCAB), want)[0] < NOISE
    assert one["losses"] == pytest.approx(whole[0][0]["losses"][-2:], rel=NOISE)
