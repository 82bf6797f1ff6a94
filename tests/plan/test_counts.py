"""Parameters and bytes of a rank, against ranks that were really built."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks
from megatron.core import parallel_state
from ranks import BIASED, HEADS, LATENT, LLAMA, MIXED, OLMO, REWARD, TIED, UNEVEN, Case, held_for_real

from megadpo.config import ParallelConfig
from megadpo.errors import MachineError
from megadpo.plan import fake_world
from megadpo.plan.counts import held
from megadpo.plan.fake_world import fake_rank

GRIDS = [
    Case("one rank", LLAMA, ParallelConfig(), 1),
    Case("float32", LLAMA, ParallelConfig(), 1, "float32"),
    Case("no sharding", TIED, ParallelConfig(use_distributed_optimizer=False), 1),
    Case("no sharding, float32", BIASED, ParallelConfig(use_distributed_optimizer=False), 1, "float32"),
    Case("reward model", REWARD, ParallelConfig(), 1),
    Case("TP2", LLAMA, ParallelConfig(2), 2),
    Case("TP2, tied, float32", TIED, ParallelConfig(2), 2, "float32"),
    Case("TP2, sequence parallel", BIASED, ParallelConfig(2, sequence_parallel=True), 2),
    Case("TP2, norm over all heads", OLMO, ParallelConfig(2, sequence_parallel=True), 2),
    Case("PP2, uneven stages", UNEVEN, ParallelConfig(1, 2), 2),
    Case("PP2, tied", TIED, ParallelConfig(1, 2), 2),
    Case("PP2, tied, no sharding", TIED, ParallelConfig(1, 2, use_distributed_optimizer=False), 2),
    Case("PP2 virtual", LLAMA, ParallelConfig(1, 2, 2), 2),
    Case("DP2", LLAMA, ParallelConfig(), 2),
    Case("DP2, float32", HEADS, ParallelConfig(), 2, "float32"),
    Case("DP2, overlap", LLAMA, ParallelConfig(overlap_grad_reduce=True, overlap_param_gather=True), 2),
    Case("DP2, no sharding", LLAMA, ParallelConfig(use_distributed_optimizer=False), 2),
    Case("EP2", MIXED, ParallelConfig(expert_model_parallel_size=2), 2),
    Case("TP2, experts split", MIXED, ParallelConfig(2, sequence_parallel=True), 2),
    Case("PP2, experts", MIXED, ParallelConfig(1, 2), 2, "float32"),
    Case("TP2, latent attention", LATENT, ParallelConfig(2, sequence_parallel=True), 2),
    Case("TP2 PP2", UNEVEN, ParallelConfig(2, 2, sequence_parallel=True), 4),
    Case("TP2 DP2, tied", TIED, ParallelConfig(2), 4),
    Case("PP2 DP2, tied", TIED, ParallelConfig(1, 2), 4),
    Case("PP2 virtual, DP2", UNEVEN, ParallelConfig(1, 2, 2), 4),
    Case("DP4", BIASED, ParallelConfig(), 4),
    Case("TP2 EP2 DP2", MIXED, ParallelConfig(2, expert_model_parallel_size=2, sequence_parallel=True), 4),
    Case("EP2 PP2", MIXED, ParallelConfig(1, 2, expert_model_parallel_size=2), 4),
    Case("TP4", replace(LLAMA, num_query_groups=4), ParallelConfig(4), 4),
]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_every_rank_holds_what_a_built_one_holds(ranks: int) -> None:
    cases = [case for case in GRIDS if case.ranks == ranks]
    real = run_ranks(ranks, held_for_real, cases)
    for number, case in enumerate(cases):
        for rank in range(ranks):
            assert held(case.shape, case.config, ranks, rank, gpu=False) == real[rank][number], f"{case.name}, {rank}"


def test_a_gpu_rank_holds_the_same() -> None:
    case = Case("", UNEVEN, ParallelConfig(2, 2, sequence_parallel=True), 16)
    for rank in (0, 5, 15):
        assert held(case.shape, case.config, 16, rank) == held(case.shape, case.config, 16, rank, gpu=False)


def test_nothing_is_left_behind() -> None:
    def seen() -> list[object]:
        replaced = [getattr(owner, name) for owner, name, _ in fake_world.departures(gpu=True)]
        return [*replaced, dist.is_initialized(), parallel_state.model_parallel_is_initialized()]

    def fail() -> None:
        with fake_rank(ParallelConfig(2), 4, 3):
            assert dist.get_rank() == 3
            assert type(torch.empty(1)) is not torch.Tensor
            raise KeyError

    before, state = seen(), torch.get_rng_state()
    with pytest.raises(KeyError):
        fail()
    assert seen() == before
    assert torch.equal(torch.get_rng_state(), state)
    assert type(torch.empty(1)) is torch.Tensor


def test_no_second_world() -> None:
    with fake_rank(ParallelConfig(), 2, 0), pytest.raises(MachineError, match="a process of its own"):
        fake_rank(ParallelConfig(), 2, 1).__enter__()
