"""Every objective through the trainer: on grids its value, metrics and gradient are those of one process."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distributed import run_ranks
from tiny import MemoryStore, random_groups, write_llama
from train.engine import Case, assemble, build, pieces, worst

from megadpo.config import Config, DataConfig, ModelConfig, ReferenceConfig
from megadpo.data.batch import PackedBatch
from megadpo.data.packing import Budget
from megadpo.data.stream import Scored, Stream
from megadpo.data.tokenize import TokenizedGroup
from megadpo.objectives import DPO, OBJECTIVES, SFT, Mix
from megadpo.objectives.across_pairs import AOT, BCO, AOTUnpaired, BetaDPO
from megadpo.objectives.anchored import EXO, NCA, APODown, APOZero, DiscoPOP
from megadpo.objectives.divergences import FDPO
from megadpo.objectives.listwise import RRHF, PlackettLuceDPO
from megadpo.objectives.margins import IPO, ODPO, RewardRPO, RSOHinge, SPPOHard
from megadpo.objectives.pairwise import DPOP, RDPO, SPIN, DPOWithNLL, NormDPO, RobustDPO
from megadpo.objectives.reference_free import CLICK, CPO, ORPO, SimPO, SLiC
from megadpo.objectives.token_level import LDDPO, TDPO1, TDPO2, WPO, Cringe, Llama3DPO
from megadpo.objectives.unpaired import KTO, APOZeroUnpaired, BCOUnpaired
from megadpo.parallel.context import grid
from megadpo.train import run
from megadpo.train.evaluate import evaluate
from megadpo.train.optimizer import set_learning_rate
from megadpo.train.step import train_step

VOCAB = 67
NOISE = 1e-5
BATCH = 7

WHOLE = Mix((AOT(0.5), TDPO1(0.5), WPO(0.5), Cringe(0.3, 1.5, 8.0)), (0.5, 1.0, 2.0, 3.0))
"""Every statistic of the head at once, and a part for which each passes through the whole batch's slopes."""

PAIRS = [
    DPO(0.5, 0.1),
    RobustDPO(0.5, 0.2),
    RDPO(0.5, 0.1),
    NormDPO(2.0),
    DPOP(0.5, 3.0),
    SPIN(0.5),
    DPOWithNLL(0.5, 0.7, "response"),
    DPOWithNLL(0.5, 0.7, "tokens"),
    IPO(0.5),
    IPO(0.5, "sum"),
    RSOHinge(0.05),
    ODPO(0.5, 0.8),
    RewardRPO(0.5, 0.5),
    SPPOHard(0.2),
    EXO(0.5),
    NCA(0.5),
    APOZero(0.5),
    APODown(0.5),
    DiscoPOP(0.5, 0.2),
    FDPO(0.3, "forward_kl"),
    FDPO(0.5, "js"),
    FDPO(0.3, "alpha"),
    LDDPO(0.5, 0.3),
    Llama3DPO(0.5),
    TDPO1(0.5),
    TDPO2(0.5, 0.7),
    WPO(0.5),
    Cringe(0.3, 1.5, 8.0, top_k=3),
    AOT(0.5),
    AOTUnpaired(0.5),
    BCO(0.5),
    BetaDPO(0.5),
    SLiC(20.0, 0.3),
    SimPO(2.0),
    ORPO(0.5, "response"),
    ORPO(0.5, "tokens"),
    CPO(0.5),
    CPO(0.5, 0.1, normalise="sum"),
    CLICK(0.5, 20.0),
    Mix((DPO(0.5), BCO(0.2), SFT()), (0.8, 0.2, 1.0)),
    Mix((SimPO(), SFT()), (1.0, 0.3)),
    WHOLE,
]
SINGLES = [KTO(0.5, 1.2, 0.8), BCOUnpaired(0.5), APOZeroUnpaired(0.5), SFT()]
LISTS = [PlackettLuceDPO(0.5), RRHF()]
SLICE = (DPOWithNLL, LDDPO, TDPO1, TDPO2, WPO, Cringe, AOT, BCO, CLICK, Mix, KTO, PlackettLuceDPO)
"""What the normal run tries: one of each way in which a grid could matter. `make test-long` has all."""


def test_every_wired_objective_is_here() -> None:
    """All but reward models, which have tests of their own (tests/train/test_reward.py)."""
    objectives = {kind() for kind in OBJECTIVES.values() if kind is not Mix}
    wired = {type(o) for o in objectives if o.head == "logprob"}
    assert {type(o) for o in (*PAIRS, *SINGLES, *LISTS)} == wired | {Mix}


def filled(batch: PackedBatch) -> PackedBatch:
    """With labels, scores and formatting that depend on the data alone."""
    number = torch.repeat_interleave(torch.tensor(batch.groups, dtype=torch.int64), batch.offsets_G1.diff())
    place = torch.arange(len(number)) - torch.repeat_interleave(batch.offsets_G1[:-1], batch.offsets_G1.diff())
    return replace(
        batch,
        labels_S=number % 3 != 0,
        scores_S=(number % 4 + 1.5) / (place + 1),
        body_N=batch.targets_N % 5 != 0,
    )


def mismatched(stream: Stream, numbers: np.ndarray, rank: int) -> list[PackedBatch]:
    """Every prompt of the batch with the next one's response."""
    groups = [stream.store.group(int(n)) for n in numbers]
    after = [*groups[1:], groups[0]]
    pairs = [TokenizedGroup(a.origin, a.prompt_ids, (b.response_ids[0],)) for a, b in zip(groups, after, strict=True)]
    other = replace(stream, store=MemoryStore(pairs))
    return other.batches(np.arange(len(pairs)), rank, None)


def steps(device: torch.device, case: Case, reference_folder: Path, jobs: list[Any]) -> list[dict[str, Any]]:
    """One step of each job (objective, store) from the same weights: the rate is 0. The reference is another model."""
    with grid(case.parallel, device, seed=1) as context:
        state, stream = build(case, context)
        reference = build(replace(case, folder=reference_folder), context)[0].modules
        for module in reference:
            module.eval().requires_grad_(False)
        results = []
        prepare = state.optimizer.prepare_grads
        for objective, store in jobs:
            own = replace(stream, store=store)
            kept: dict[str, Any] = {}
            state.optimizer.prepare_grads = lambda kept=kept: (
                kept.setdefault("gradients", pieces(state, lambda p: p.main_grad)),
                prepare(),
            )[1]
            set_learning_rate(state.optimizer, 0.0)
            numbers = np.arange(BATCH)
            batches = [filled(b) for b in own.batches(numbers, context.data_rank, None)]
            strangers = None
            if "mismatched_kl" in objective.needs:
                strangers = mismatched(own, numbers, context.data_rank)
            model = reference if objective.needs_reference else None
            sums, norm = train_step(state, batches, objective, model, context, strangers)
            results.append({"sums": sums, "norm": norm, **kept})
        return results


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Case, Path]:
    folder = write_llama(tmp_path_factory.mktemp("policy"), layers=2, hidden=16, ffn=24, vocab=VOCAB)
    other = write_llama(tmp_path_factory.mktemp("reference"), layers=2, hidden=16, ffn=24, vocab=VOCAB, seed=9)
    return Case(folder, random_groups(BATCH, vocab=VOCAB)), other


def jobs(objectives: list[Any]) -> list[Any]:
    stores = {k: random_groups(BATCH, vocab=VOCAB, responses=k, seed=k) for k in (1, 2, 3)}
    return [(o, stores[o.responses or 3]) for o in objectives]


def compare(made: tuple[Case, Path], objectives: list[Any]) -> None:
    case, reference = made
    work = jobs(objectives)
    [single] = run_ranks(1, steps, replace(case, budget=Budget(600)), reference, work)
    grids = [
        (4, replace(case, tensor=2, pipeline=2, budget=Budget(64))),
        (2, replace(case, budget=Budget(64, groups=2))),  # data-parallel 2
    ]
    for world, layout in grids:
        results = run_ranks(world, steps, layout, reference, work)
        for index, objective in enumerate(objectives):
            want = single[index]
            ranks = [rank[index] for rank in results]
            where = f"{objective} on {world} ranks"
            for rank in ranks:
                assert rank["sums"].loss == pytest.approx(want["sums"].loss, rel=NOISE), where
                assert rank["sums"].metrics == pytest.approx(want["sums"].metrics, rel=NOISE, abs=2e-5), where
                assert rank["norm"] == pytest.approx(want["norm"], rel=NOISE), where
            exact = assemble([want], "gradients", VOCAB)
            assert all(g.norm() > 0 for g in exact.values()), where
            difference, name = worst(assemble(ranks, "gradients", VOCAB), exact)
            assert difference < NOISE, f"{where}: gradient of {name} differs by {difference:.1e}"


def test_a_slice_on_grids(made: tuple[Case, Path]) -> None:
    every = [*PAIRS, *SINGLES, *LISTS]
    compare(made, [WHOLE, *(next(o for o in every if isinstance(o, kind)) for kind in SLICE)])


@pytest.mark.slow
def test_every_objective_on_grids(made: tuple[Case, Path]) -> None:
    compare(made, [*PAIRS, *SINGLES, *LISTS])


def test_another_batch_would_be_seen(made: tuple[Case, Path]) -> None:
    """The comparison can fail: the same objective over another micro-batch's pairs is far over the noise."""
    case, reference = made
    store = random_groups(BATCH, vocab=VOCAB, responses=2, seed=2)
    less = MemoryStore(store.groups[1:] + store.groups[:1])
    less.groups[-1] = store.groups[1]
    for objective in (AOT(0.5), BCO(0.5)):
        work = [(objective, store), (objective, MemoryStore(less.groups))]
        [[one, other]] = run_ranks(1, steps, replace(case, budget=Budget(600)), reference, work)
        assert abs(one["sums"].loss - other["sums"].loss) > 100 * NOISE


def with_and_without_strangers(device: torch.device, case: Case, reference_folder: Path) -> list[float]:
    """KTO's loss with z from responses to other prompts, and with z from the responses themselves."""
    with grid(case.parallel, device, seed=1) as context:
        state, stream = build(case, context)
        reference = build(replace(case, folder=reference_folder), context)[0].modules
        stream = replace(stream, store=random_groups(BATCH, vocab=VOCAB, responses=1, seed=1))
        set_learning_rate(state.optimizer, 0.0)
        batches = [filled(b) for b in stream.batches(np.arange(BATCH), 0, None)]
        objective = KTO(0.5)
        return [
            train_step(state, batches, objective, reference, context, other)[0].loss
            for other in (mismatched(stream, np.arange(BATCH), 0), batches)
        ]


def test_kto_listens_to_strangers(made: tuple[Case, Path]) -> None:
    [[strangers, own]] = run_ranks(1, with_and_without_strangers, *made)
    assert abs(strangers - own) > 1e-4


def drawn(device: torch.device, case: Case) -> list[float]:
    """Cringe's loss on the same pairs: twice, with another seed, later in the run."""
    with grid(case.parallel, device, seed=1) as context:
        state, stream = build(case, context)
        set_learning_rate(state.optimizer, 0.0)
        batches = stream.batches(np.arange(BATCH), 0, None)
        losses = []
        for seed, consumed in ((0, 0), (0, 0), (1, 0), (0, BATCH)):
            state.consumed = consumed
            losses.append(train_step(state, batches, Cringe(0.3), None, context, seed=seed)[0].loss)
        return losses


def test_draws_follow_from_seed_and_place_in_the_run(made: tuple[Case, Path]) -> None:
    [[one, again, seed, later]] = run_ranks(1, drawn, made[0])
    assert one == again
    assert len({one, seed, later}) == 3


def evaluated(device: torch.device, case: Case, reference_folder: Path, work: list[Any]) -> list[Any]:
    """Held-out totals of each job (objective, store), in passes of two groups and in one."""
    with grid(case.parallel, device, seed=1) as context:
        state, stream = build(case, context)
        reference = build(replace(case, folder=reference_folder), context)[0].modules
        return [
            [
                evaluate(state.modules, Scored(replace(stream, store=store), None), objective, model, size, context)
                for size in (2, len(store))
            ]
            for objective, store in work
            for model in [reference if objective.needs_reference else None]
        ]


def test_held_out_data_are_one_batch(made: tuple[Case, Path]) -> None:
    """Whatever is given to the pipeline at once, and on any grid: also where a loss looks across pairs or has terms
    with other denominators."""
    case, reference = made
    work = jobs([AOT(0.5), CPO(0.5), Mix((BCO(0.5), SFT())), LDDPO(0.5), WHOLE])
    [single] = run_ranks(1, evaluated, case, reference, work)
    ranks = run_ranks(2, evaluated, case, reference, work)
    for index in range(len(work)):
        want = single[index][1]
        for got in (single[index][0], *ranks[0][index], *ranks[1][index]):
            assert got.loss == pytest.approx(want.loss, rel=NOISE)
            assert got.groups == want.groups == BATCH
            assert got.metrics == pytest.approx(want.metrics, rel=NOISE, abs=2e-5)


STREAM = Stream(random_groups(2), Budget(64), ranks=1, multiple=1)
CONFIG = Config("run", ModelConfig("model"), DataConfig(("pairs.jsonl",)))
WITHOUT: tuple[Any, ...] = (None, [STREAM], [2], [], None, None)
"""The other arguments of `_with_reference`; a run that needs no reference looks at none but the streams."""


def test_a_reference_free_run_neither_loads_nor_scores_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("a reference was loaded or scored")

    for name in ("_reference_model", "_scored", "score_groups"):
        monkeypatch.setattr(run, name, never)
    weights = run.Weights(never, never)
    for objective in (SLiC(), SimPO(), ORPO(), CPO(), CLICK(), RRHF(), SFT(), Mix((SimPO(), SFT()))):
        for mode in ("precomputed", "resident"):
            config = replace(CONFIG, objective=objective, reference=ReferenceConfig(mode, path="elsewhere"))
            scored, reference = run._with_reference(config, *WITHOUT, weights=weights)
            assert reference is None
            assert [part.column for part in scored] == [None]
    with pytest.raises(AssertionError, match="loaded or scored"):
        run._with_reference(replace(CONFIG, objective=DPO()), *WITHOUT, weights=weights)
