"""Labels, scores, marks and mismatched responses in the engine: the grid, the micro-batches and the reference's form do
not matter to them either."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from distributed import run_ranks
from tiny import MemoryStore, random_groups, write_llama

from megadpo.data.mismatch import mismatched
from megadpo.data.packing import Budget
from megadpo.data.tokenize import SCORED
from megadpo.objectives import Objective
from megadpo.objectives.margins import ODPO
from megadpo.objectives.supervised import SFT
from megadpo.objectives.unpaired import KTO
from train.engine import Case, assemble, run, worst

VOCAB = 67
NOISE = 1e-5


def unpaired(count: int) -> MemoryStore:
    """Single responses with a label; every third prompt is the one before."""
    groups = random_groups(count, vocab=VOCAB, responses=1).groups
    return MemoryStore(
        [
            replace(
                group, prompt_ids=groups[n - 1].prompt_ids if n % 3 == 2 else group.prompt_ids, labels=(n % 4 != 1,)
            )
            for n, group in enumerate(groups)
        ]
    )


def scored_pairs(count: int) -> MemoryStore:
    groups = random_groups(count, vocab=VOCAB).groups
    return MemoryStore([replace(group, scores=(n % 5 + 0.5, -0.25 * n)) for n, group in enumerate(groups)])


def marked(count: int) -> MemoryStore:
    """Demonstrations in which two of three tokens are trained on."""
    groups = random_groups(count, vocab=VOCAB, responses=1).groups
    return MemoryStore(
        [
            replace(group, marks=((np.arange(len(group.response_ids[0])) % 3 != 1).astype(np.uint8) * SCORED,))
            for group in groups
        ]
    )


STORES: list[tuple[Objective, MemoryStore]] = [
    (KTO(beta=0.5, desirable_weight=1.25), unpaired(18)),
    (ODPO(beta=0.5), scored_pairs(18)),
    (SFT(), marked(18)),
]


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> list[Case]:
    """Two steps and a held-out pass with a learning rate that takes the policy well away from its reference."""
    folder = write_llama(tmp_path_factory.mktemp("llama"), layers=2, vocab=VOCAB, tied=True)
    return [
        Case(folder, store, objective=objective, learning_rate=2e-2, steps=3, evaluated=True, budget=Budget(48))
        for objective, store in STORES
    ]


@pytest.fixture(scope="module")
def single(cases: list[Case]) -> list[dict[str, Any]]:
    [results] = run_ranks(1, run, [replace(case, budget=Budget(400)) for case in cases])
    return [{**r, **{w: assemble([r], w, VOCAB) for w in ("gradients", "weights")}} for r in results]


def compare(results: list[list[dict[str, Any]]], index: int, want: dict[str, Any]) -> None:
    ranks = [rank[index] for rank in results]
    for got, expected in zip([*ranks[0]["sums"], ranks[0]["held_out"]], [*want["sums"], want["held_out"]], strict=True):
        assert (got.groups, got.tokens) == (expected.groups, expected.tokens)
        assert got.loss == pytest.approx(expected.loss, rel=NOISE)
        assert got.metrics == pytest.approx(expected.metrics, rel=5 * NOISE, abs=1e-5)
    for what in ("gradients", "weights"):
        difference, name = worst(assemble(ranks, what, VOCAB), want[what])
        assert difference < 2 * NOISE, f"{what}: {name} differs by {difference:.1e}"


def test_they_train(single: list[dict[str, Any]]) -> None:
    for result in single:
        assert all(g.norm() > 0 for g in result["gradients"].values())
    kto, odpo, sft = single
    assert kto["sums"][0].loss == pytest.approx((1.25 * 6 + 2) / 2 / 8, rel=1e-4)  # step 0: half of the mean weight
    assert {"lengths/chosen", "lengths/rejected", "kl/token"} <= kto["held_out"].metrics.keys()
    assert "lengths/response" in sft["held_out"].metrics
    assert odpo["held_out"].metrics["kl/token"] != 0
    assert sft["held_out"].tokens < sum(marked(18).response_lengths)


def test_one_rank(cases: list[Case], single: list[dict[str, Any]]) -> None:
    variants = [
        *cases,
        replace(cases[0], budget=Budget(48, groups=1)),
        replace(cases[0], resident=True),
    ]
    results = run_ranks(1, run, variants)
    for index, want in enumerate([*single, single[0], single[0]]):
        compare(results, index, want)


def test_two_ranks(cases: list[Case], single: list[dict[str, Any]]) -> None:
    results = run_ranks(2, run, [*cases, replace(cases[0], resident=True)])
    for index, want in enumerate([*single, single[0]]):
        compare(results, index, want)


def test_four_ranks(cases: list[Case], single: list[dict[str, Any]]) -> None:
    grid = {"tensor": 2, "pipeline": 2, "sequence": True}
    results = run_ranks(4, run, [*(replace(case, **grid) for case in cases), cases[0]])
    for index, want in enumerate([*single, single[0]]):
        compare(results, index, want)


def test_the_kl_is_of_the_mismatched_responses(cases: list[Case]) -> None:
    """By hand: at step 2 the loss uses the mean over the global batch's mismatched responses, not the matched ones."""
    [[found]] = run_ranks(1, _drift, [cases[0]])
    assert found["z"] > 0.01
    assert found["z"] != pytest.approx(found["matched"], rel=0.1)
    assert found["loss"] == pytest.approx(found["by hand"], rel=1e-5)


def _drift(device: torch.device, cases: list[Case]) -> list[dict[str, float]]:
    """After one step, another over the same groups: its loss from the engine, and from one score per response."""
    from megadpo.parallel.context import grid
    from megadpo.train.optimizer import set_learning_rate
    from megadpo.train.score import score_groups
    from megadpo.train.step import train_step
    from train.engine import build, mismatched_of

    [case] = cases
    case = replace(case, store=MemoryStore(case.store.groups[:8]), steps=2)
    everything = np.arange(8)
    with grid(case.parallel, device, seed=1) as context:
        state, stream = build(case, context)
        other = replace(stream, store=mismatched(case.store, np.tile(everything, 2), 8, seed=0))

        def both() -> tuple[np.ndarray, np.ndarray]:
            scored = (
                score_groups(state.modules, s, np.arange(len(s.store)), 5, context, lambda done: None)
                for s in (stream, other)
            )
            return tuple(x.astype(np.float64) for x in scored)  # type: ignore[return-value]

        train = mismatched_of(case, state, stream, context)
        before, before_other = both()
        for _ in range(2):
            set_learning_rate(state.optimizer, case.learning_rate)
            now, now_other = both()
            batches = stream.batches(everything, 0, before.astype(np.float32))
            sums, _norm = train_step(
                state, batches, case.objective, None, context, train.mismatched_batches(state.consumed, 8, 0)
            )
        z = max(0.0, float((now_other - before_other)[8:].mean()))
        reward, drift, good = 0.5 * (now - before), 0.5 * z, case.store.labels_S
        s = 1 / (1 + np.exp(-(reward - drift)))
        by_hand = float(np.where(good, 1.25 * (1 - s), s).mean())
    matched = float((now - before).mean())
    return [{"z": z, "matched": matched, "loss": sums.loss, "by hand": by_hand}]
