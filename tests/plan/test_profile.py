"""The planner's short way against its long way."""

from dataclasses import replace

import pytest
from ranks import HELD_IN_FP8, LLAMA, MIXED, RESIDENT, REWARD, SWAPPED, UNEVEN, WIDE, Case
from test_counts import GRIDS

from megadpo.config import ParallelConfig
from megadpo.convert.shape import Experts
from megadpo.objectives import SFT
from megadpo.objectives.reward_model import BradleyTerry
from megadpo.objectives.token_level import TDPO2, WPO, Cringe
from megadpo.objectives.unpaired import KTO
from megadpo.plan.counts import held
from megadpo.plan.dry_run import walk
from megadpo.plan.even import Load
from megadpo.plan.fp8_memory import HOPPER
from megadpo.plan.numbers import Collective, RankNumbers
from megadpo.plan.profile import rank_numbers

LOAD = Load(tokens=512, scored=256, micro_batches=2)
SMALL = 128
"""Bytes: collectives of counts, norms and totals have less."""


def light(case: Case, world: int, rank: int, load: Load = LOAD, gpu: bool = True) -> RankNumbers:
    capability = HOPPER if gpu else None
    return rank_numbers(case.shape, case.config, world, rank, load.tokens, load.scored, load.micro_batches, capability)


SOME = {"no sharding", "PP2, tied", "DP2, float32", "TP2, experts split", "TP2 PP2", "EP2 PP2"}


@pytest.mark.parametrize(
    "case",
    [case if case.name in SOME else pytest.param(case, marks=pytest.mark.slow) for case in GRIDS],
    ids=lambda case: case.name,
)
def test_what_lasts_is_exact(case: Case) -> None:
    """On worlds four times as large as the smallest, so that everything is shared out."""
    world = case.ranks * 4
    for rank in {0, 3, world - 1}:
        numbers, built = (
            light(case, world, rank, Load(64, 32, 4), gpu=False),
            held(case.shape, case.config, world, rank),
        )
        assert numbers.parameters == built.parameters
        memory = numbers.memory
        assert (memory.weights, memory.gradients, memory.optimizer) == (built.weights, built.gradients, built.optimizer)


def test_many_buckets() -> None:
    """Gradients that are reduced while the backward pass runs come in buckets of 40 million, on the first stage."""
    large = replace(LLAMA, hidden_size=4096, ffn_hidden_size=11008, num_attention_heads=32, kv_channels=128)
    case = Case("", large, ParallelConfig(2, 2, overlap_grad_reduce=True, overlap_param_gather=True), 4)
    for rank in (0, 23):
        numbers, built = light(case, 24, rank), held(case.shape, case.config, 24, rank)
        assert (numbers.memory.gradients, numbers.memory.optimizer) == (built.gradients, built.optimizer)


WALKS = [
    (Case("TP2 PP3, sequence parallel", WIDE, ParallelConfig(2, 3, sequence_parallel=True), 6), (4,)),
    (Case("PP2 virtual, full recompute", WIDE, ParallelConfig(1, 2, 3), 2, recompute="full"), (3,)),
    (Case("resident", WIDE, ParallelConfig(1, 2, use_distributed_optimizer=False), 2, reference=RESIDENT), (3,)),
    (Case("resident in FP8", WIDE, ParallelConfig(2), 2, reference=HELD_IN_FP8), (0,)),
    (Case("swapped", WIDE, ParallelConfig(), 1, recompute="full", reference=SWAPPED), (0,)),
    (
        Case(
            "experts",
            replace(MIXED, hidden_size=256, kv_channels=64, vocab_size=512),
            ParallelConfig(2, expert_model_parallel_size=2, sequence_parallel=True),
            2,
        ),
        (1,),
    ),
]


@pytest.mark.parametrize(("case", "ranks"), WALKS, ids=lambda value: getattr(value, "name", ""))
def test_the_rest_is_close(case: Case, ranks: tuple[int, ...]) -> None:
    world = case.ranks * 2
    for rank in ranks:
        short, long = light(case, world, rank), walk(case.shape, case.config, world, rank, LOAD).numbers
        assert short.flops == pytest.approx(long.flops, rel=1e-12)
        assert _large(short) == _large(long)
        assert (short.memory.reference, short.memory.buffers) == (long.memory.reference, long.memory.buffers)
        working = [numbers.memory.activations + numbers.memory.logits for numbers in (short, long)]
        assert working[0] == pytest.approx(working[1], rel=0.1)
        assert short.memory.total == pytest.approx(long.memory.total, rel=0.03)


SHORT = replace(WIDE, num_layers=1)
OTHERS = [
    Case("KTO", SHORT, ParallelConfig(), 1, objective=KTO()),
    Case("KL to the reference", SHORT, ParallelConfig(2), 2, reference=RESIDENT, objective=TDPO2()),
    Case("drawn tokens", SHORT, ParallelConfig(2), 2, objective=Cringe()),
    Case("squared probabilities", SHORT, ParallelConfig(2), 2, objective=WPO()),
    Case("SFT", SHORT, ParallelConfig(), 1, objective=SFT()),
    Case("reward model", replace(SHORT, head=REWARD.head), ParallelConfig(), 1, objective=BradleyTerry()),
]


@pytest.mark.parametrize("case", OTHERS, ids=lambda case: case.name)
def test_other_heads_are_close(case: Case) -> None:
    """What the head is asked for beside log-probabilities, and heads that are none."""
    short, long = light(case, case.ranks, 0), walk(case.shape, case.config, case.ranks, 0, LOAD).numbers
    if "mismatched_kl" not in case.objective.needs:  # whose forward pass over others' responses is not in it
        assert short.flops == pytest.approx(long.flops, rel=1e-12)
        assert _large(short) == _large(long)
    one, two = (numbers.memory.activations + numbers.memory.logits for numbers in (short, long))
    assert one == pytest.approx(two, rel=0.1)
    assert short.memory.total == pytest.approx(long.memory.total, rel=0.03)


@pytest.mark.parametrize(
    ("layers", "stages", "chunks", "load"),
    [
        (9, 4, 2, Load(tokens=32, scored=16, micro_batches=4)),
        pytest.param(61, 8, 4, Load(tokens=64, scored=32, micro_batches=8), marks=pytest.mark.slow),
    ],
)
def test_the_fullest_rank_behind_dense_layers(layers: int, stages: int, chunks: int, load: Load) -> None:
    """DeepSeek-V3's layout: three dense layers, then experts, in uneven chunks. Every stage's rank walked; the fullest
    is neither an end nor beside one. (test_grid_search.py: the search looks at such a stage.)"""
    experts = Experts(stages, 2, 256, (False,) * 3 + (True,) * (layers - 3), shared_ffn_hidden_size=64)
    shape = replace(
        LLAMA, num_layers=layers, hidden_size=64, ffn_hidden_size=64, kv_channels=16, vocab_size=64, experts=experts
    )
    grid = ParallelConfig(1, stages, chunks, expert_model_parallel_size=stages)
    case, world = Case("", shape, grid, stages * stages), stages * stages
    ranks = range(0, world, stages)
    short = [light(case, world, rank, load) for rank in ranks]
    long = [walk(shape, case.config, world, rank, load).numbers for rank in ranks]
    for one, other in zip(short, long, strict=True):
        for part in ("weights", "gradients", "optimizer"):
            assert getattr(one.memory, part) == getattr(other.memory, part)
        assert one.memory.total == pytest.approx(other.memory.total, rel=0.03)
    totals = [[numbers.memory.total for numbers in found] for found in (short, long)]
    assert [one.index(max(one)) for one in totals] == [2, 2]


def _large(numbers: RankNumbers) -> dict[tuple[str, str, int], int]:
    """Bytes by kind and group."""
    found = {(one.kind, one.group, one.ranks): one for one in numbers.collectives}
    return {key: _rounded(one) for key, one in found.items() if one.bytes / one.calls > SMALL}


def _rounded(one: Collective) -> int:
    """Small calls of the same kind in the same group are in some of the sums."""
    return round(one.bytes, -3)


def test_more_grids_cost_little() -> None:
    case = Case("", UNEVEN, ParallelConfig(1, 2), 2)
    light(case, 8, 0)
    first = light(case, 8, 0)
    assert first == light(case, 8, 0)
    assert light(case, 64, 0).memory.optimizer < first.memory.optimizer
