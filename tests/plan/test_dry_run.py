"""A step on fake tensors against the same step on real ones: what is sent, and how full it gets."""

import time
from dataclasses import replace
from pathlib import Path

import pytest
from distributed import run_ranks
from ranks import (
    HELD_IN_FP8,
    LATENT,
    LLAMA,
    MIXED,
    OLMO,
    RESIDENT,
    REWARD,
    SWAPPED,
    TIED,
    UNEVEN,
    Case,
    recorded_for_real,
)

from megadpo.config import ParallelConfig
from megadpo.convert.families import read_shape
from megadpo.objectives import SFT
from megadpo.objectives.across_pairs import AOT
from megadpo.objectives.reward_model import BradleyTerry
from megadpo.objectives.token_level import TDPO2, WPO, Cringe
from megadpo.objectives.unpaired import KTO
from megadpo.plan.dry_run import even_batches, walk
from megadpo.plan.even import Load

LOAD = Load(tokens=64, scored=38, micro_batches=2)
SHORT = replace(LLAMA, num_layers=2)
SINGLE = replace(LLAMA, num_layers=1)
"""Where it is about the head, or what stands beside the policy."""
STEPS = [
    Case("one rank", SHORT, ParallelConfig(), 1),
    Case("float32, no sharding", SHORT, ParallelConfig(use_distributed_optimizer=False), 1, "float32"),
    Case("full recompute", SHORT, ParallelConfig(), 1, recompute="full"),
    Case("resident reference", SHORT, ParallelConfig(), 1, reference=RESIDENT),
    Case("reference in FP8", SINGLE, ParallelConfig(), 1, reference=HELD_IN_FP8),
    Case("swapped reference", SINGLE, ParallelConfig(), 1, reference=SWAPPED),
    Case("whole batch at once", SINGLE, ParallelConfig(), 1, objective=AOT()),
    Case("reward model", replace(REWARD, num_layers=1), ParallelConfig(), 1, objective=BradleyTerry()),
    Case("TP2", SHORT, ParallelConfig(2), 2),
    Case("KTO", SINGLE, ParallelConfig(2), 2, objective=KTO()),
    Case("KL to the reference", SINGLE, ParallelConfig(2), 2, reference=RESIDENT, objective=TDPO2()),
    Case("drawn tokens", SINGLE, ParallelConfig(2), 2, objective=Cringe()),
    Case("squared probabilities", SINGLE, ParallelConfig(2), 2, objective=WPO()),
    Case("SFT, PP2", SHORT, ParallelConfig(1, 2), 2, objective=SFT()),
    Case("TP2, norm over all heads", replace(OLMO, num_layers=2), ParallelConfig(2, sequence_parallel=True), 2),
    Case("PP2, uneven stages, tied", replace(UNEVEN, num_layers=3, tied=True), ParallelConfig(1, 2), 2),
    Case("PP2 virtual", LLAMA, ParallelConfig(1, 2, 2), 2, recompute="selective"),
    Case("DP2, overlap", SHORT, ParallelConfig(overlap_grad_reduce=True, overlap_param_gather=True), 2),
    Case("DP2, no sharding", SHORT, ParallelConfig(use_distributed_optimizer=False), 2),
    Case("EP2", replace(MIXED, num_layers=2), ParallelConfig(expert_model_parallel_size=2), 2),
    Case("TP2 PP2, resident", TIED, ParallelConfig(2, 2, sequence_parallel=True), 4, reference=RESIDENT),
    Case(
        "TP2 EP2 DP2",
        replace(MIXED, num_layers=2),
        ParallelConfig(2, expert_model_parallel_size=2, sequence_parallel=True),
        4,
    ),
    Case("latent attention, TP2 DP2", replace(LATENT, num_layers=2), ParallelConfig(2, sequence_parallel=True), 4),
]
SHAPES = Path(__file__).parents[2] / "launch" / "recipes" / "shapes"


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_step_is_the_real_one(ranks: int) -> None:
    compare(ranks, every=False)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_on_more_ranks(ranks: int) -> None:
    compare(ranks, every=True)


def compare(ranks: int, every: bool) -> None:
    """Collectives, operations and all that lasts are equal; the peak of what does not is, up to a message that a real
    rank still holds while it is on its way, and a number per token."""
    cases = [case for case in STEPS if case.ranks == ranks]
    batches = [even_batches(LOAD, case.config) for case in cases]
    real = run_ranks(ranks, recorded_for_real, cases, batches)
    for number, case in enumerate(cases):
        for rank in {number % ranks, ranks - 1 - number % ranks} if every else {number % ranks}:
            fake, other = walk(case.shape, case.config, ranks, rank, LOAD, gpu=False).numbers, real[rank][number]
            where = f"{case.name}, rank {rank}"
            assert fake.collectives == other.collectives, where
            assert fake.flops == other.flops, where
            assert fake.parameters == other.parameters, where
            for part in ("weights", "gradients", "optimizer", "reference", "buffers"):
                assert getattr(fake.memory, part) == getattr(other.memory, part), f"{where}: {part}"
            one, two = fake.memory.activations + fake.memory.logits, other.memory.activations + other.memory.logits
            assert one == pytest.approx(two, rel=0.05), where


def walked(name: str, grid: ParallelConfig, world: int, rank: int, load: Load, recompute: str = "none") -> float:
    """Seconds of this process, whatever else the machine does."""
    shape = read_shape(SHAPES / name)
    began = time.process_time()
    found = walk(shape, Case("", shape, grid, 1, recompute=recompute).config, world, rank, load)
    assert found.numbers.rank == rank
    assert {one.ranks for one in found.numbers.collectives if one.group == "world"} == {world}
    return time.process_time() - began


GRID_70B = ParallelConfig(8, 4, sequence_parallel=True)
GRID_405B = ParallelConfig(8, 16, sequence_parallel=True)


def test_large_models_are_walked() -> None:
    """The last rank, with the head, of both; few micro-batches."""
    assert walked("llama3.1-70b", GRID_70B, 512, 511, Load(4096, 2048, 1, 2)) < 120
    assert walked("llama3.1-405b", GRID_405B, 4096, 4095, Load(8192, 4096, 1, 2), "full") < 120


@pytest.mark.slow
def test_large_models_in_two_minutes() -> None:
    """First and last rank of a 70B on 512 GPUs and of a 405B on 4096, a whole step with full pipelines."""
    steps = [("llama3.1-70b", GRID_70B, 512, Load(4096, 2048, 8, 2), "none")]
    steps += [("llama3.1-405b", GRID_405B, 4096, Load(8192, 4096, 32, 2), "full")]
    for name, grid, world, load, recompute in steps:
        for rank in (0, world - 1):
            seconds = walked(name, grid, world, rank, load, recompute)
            assert seconds < 120
