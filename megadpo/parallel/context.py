"""The grid: which rank this is, and the groups it talks in. The only file that knows Megatron-Core's parallel_state."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection

from megadpo import errors
from megadpo.config import ParallelConfig
from megadpo.errors import MachineError, MegadpoError
from megadpo.parallel import cpu_host, mcore_fixes
from megadpo.parallel.meeting import agent_store

COLLECTIVE_TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class ParallelContext:
    """Sizes, this rank's place, and process groups. Passed as an argument wherever ranks matter."""

    rank: int
    world_size: int
    tensor_rank: int
    tensor_size: int
    pipeline_rank: int
    pipeline_size: int
    virtual_size: int
    """Model chunks per pipeline rank; 1 without interleaving."""
    data_rank: int
    data_size: int
    sequence_parallel: bool
    device: torch.device
    groups: ProcessGroupCollection

    @property
    def holds_loss(self) -> bool:
        """Whether this rank is in the last pipeline stage."""
        return self.pipeline_rank == self.pipeline_size - 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def stages(self) -> list[tuple[int | None, bool, bool]]:
        """For each model chunk here: (virtual stage, has the embedding, has the head)."""
        return [
            (
                stage if self.virtual_size > 1 else None,
                self.pipeline_rank == 0 and stage == 0,
                self.holds_loss and stage == self.virtual_size - 1,
            )
            for stage in range(self.virtual_size)
        ]

    def amax_group(self) -> dist.ProcessGroup:
        """Ranks that share FP8's scales, as Megatron-Core's own FP8 contexts have it."""
        return parallel_state.get_amax_reduction_group(with_context_parallel=True)

    def sum_over_data(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over data-parallel ranks, in place."""
        dist.all_reduce(values, group=self.groups.dp)
        return values

    def max_over_data(self, values: torch.Tensor) -> torch.Tensor:
        """Largest of all data-parallel ranks, element by element, in place."""
        dist.all_reduce(values, op=dist.ReduceOp.MAX, group=self.groups.dp)
        return values

    def gather_over_data(self, value: Any) -> list[Any]:
        """What every data-parallel rank has, in rank order; anything small that can be pickled, tensors on the CPU."""
        found: list[Any] = [None] * self.data_size
        dist.all_gather_object(found, value, group=self.groups.dp)
        return found

    def from_last_stage(self, values: torch.Tensor) -> torch.Tensor:
        """Give every rank what the last stage of its pipeline holds, in place."""
        if self.pipeline_size > 1:
            dist.broadcast(values, src=dist.get_process_group_ranks(self.groups.pp)[-1], group=self.groups.pp)
        return values

    def from_first(self, values: torch.Tensor) -> torch.Tensor:
        """The first rank's values, in place on every rank."""
        torch.distributed.broadcast(values, 0)
        return values

    def most(self, value: float) -> float:
        """The largest of all ranks of the world."""
        seen = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(seen, op=dist.ReduceOp.MAX)
        return float(seen)

    def any_of(self, *flags: bool) -> list[bool]:
        """For each flag, whether it is set on any rank of the world; one exchange for all."""
        seen = torch.tensor([float(flag) for flag in flags], device=self.device)
        dist.all_reduce(seen, op=dist.ReduceOp.MAX)
        return [value > 0 for value in seen.tolist()]


def join_world(rank: int, world_size: int, local_rank: int, init_method: str) -> torch.device:
    """Join the process group: NCCL where there is a GPU for this rank, gloo otherwise."""
    cpu_host.install()
    mcore_fixes.install()
    if torch.cuda.is_available():
        index = local_rank % torch.cuda.device_count()  # SLURM may show each task only its own GPU
        torch.cuda.set_device(index)
        device, backend = torch.device("cuda", index), "nccl"
    else:
        device, backend = torch.device("cpu"), "gloo"
    if not dist.is_initialized():
        store = agent_store(os.environ, rank, world_size, init_method, COLLECTIVE_TIMEOUT)
        dist.init_process_group(
            backend,
            init_method=None if store else init_method,
            store=store,
            rank=rank,
            world_size=world_size,
            timeout=COLLECTIVE_TIMEOUT,
        )
    return device


def from_first_rank(
    rank: int, world_size: int, work: Callable[[Callable[[], None]], str], on_sign: Callable[[], None] = lambda: None
) -> str:
    """Run `work` on rank 0 only and give its text to every rank; call it after `join_world`.

    The others look at the rendezvous store now and then, so however long it takes, no collective times out and signals
    get through. `work` is given a function to call as it gets on; `on_sign` is then called on the others. Where it
    raises, it raises on every rank: a MegadpoError as it is, anything else as MachineError.
    """
    store = dist.PrefixStore("first rank", dist.distributed_c10d._get_default_store())

    def sign() -> None:
        store.add("signs", 1)

    if rank == 0:
        try:
            text, error = work(sign), None
        except BaseException as raised:
            text, error = "", raised
        kind = type(error).__name__ if isinstance(error, MegadpoError) else MachineError.__name__
        said = text if error is None else str(error) or type(error).__name__
        store.set("outcome", json.dumps({"kind": None if error is None else kind, "text": said}))
        if error is None:
            return text
        end = time.monotonic() + 10  # the store may be this process's: let the others read before it is gone
        while store.add("read", 0) < world_size - 1 and time.monotonic() < end:
            time.sleep(0.05)
        raise error
    signs = 0
    while not store.check(["outcome"]):
        time.sleep(0.2)
        if (now := store.add("signs", 0)) != signs:
            signs = now
            on_sign()
    outcome = json.loads(store.get("outcome"))
    store.add("read", 1)
    if outcome["kind"] is None:
        return str(outcome["text"])
    raise getattr(errors, outcome["kind"])(outcome["text"])


def expert_tensor_size(parallel: ParallelConfig) -> int:
    """Ranks that one expert is split over: whole experts where they are dealt out, else the tensor-parallel ranks.

    Unsplit experts that are not dealt out either would be replicas whose gradients Megatron-Core does not sum
    (layers.py marks expert parameters as such only where expert_model_parallel_size > 1).
    """
    return 1 if parallel.expert_model_parallel_size > 1 else parallel.tensor_model_parallel_size


def build_context(parallel: ParallelConfig, device: torch.device, seed: int) -> ParallelContext:
    """Make the grid's groups. Ranks are laid out tensor first, then data, then pipeline (Megatron's order)."""
    virtual = parallel.virtual_pipeline_model_parallel_size
    parallel_state.initialize_model_parallel(
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=virtual,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=expert_tensor_size(parallel),
        distributed_timeout_minutes=int(COLLECTIVE_TIMEOUT.total_seconds() // 60),
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    return ParallelContext(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        tensor_size=parallel_state.get_tensor_model_parallel_world_size(),
        pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pipeline_size=parallel_state.get_pipeline_model_parallel_world_size(),
        virtual_size=virtual or 1,
        data_rank=parallel_state.get_data_parallel_rank(),
        data_size=parallel_state.get_data_parallel_world_size(),
        sequence_parallel=parallel.sequence_parallel,
        device=device,
        groups=ProcessGroupCollection.use_mpu_process_groups(),
    )


def destroy_context() -> None:
    """Forget the grid, so that another can be built in the same processes."""
    parallel_state.destroy_model_parallel()


@contextmanager
def grid(parallel: ParallelConfig, device: torch.device, seed: int) -> Iterator[ParallelContext]:
    """A grid for the length of a with-block."""
    try:
        yield build_context(parallel, device, seed)
    finally:
        destroy_context()
