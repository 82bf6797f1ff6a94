"""Every grid that so many GPUs allow, and why the others are none: in the words that a run would say."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, get_args, get_type_hints

import torch

from megadpo.config import Config, ModelConfig, ParallelConfig, ReferenceConfig
from megadpo.config.check import problems
from megadpo.convert.shape import ModelShape
from megadpo.errors import ConfigError, MachineError
from megadpo.model.build import transformer_config
from megadpo.model.fp8 import recipe_problem
from megadpo.observe.gpus import Gpu
from megadpo.parallel.mcore_fixes import have_te
from megadpo.plan import constants as c
from megadpo.train.inputs import Shapes, grid_problems

TOKENS = (2048, 4096, 8192, 16384, 32768)
"""Lengths of micro-batches that are tried where the run file gives none; those under the longest group are left out."""
BLOCK = 128
"""Rows of a rank that every length is a multiple of: what any FP8 recipe wants, and tiles of products like."""
MOST_CHUNKS = 10
"""Model chunks per pipeline rank that are tried."""
RECOMPUTES = get_args(get_type_hints(ModelConfig)["recompute"])
MODES = get_args(get_type_hints(ReferenceConfig)["mode"])


@dataclass(frozen=True)
class Candidate:
    """What is searched over."""

    tensor: int
    pipeline: int
    virtual: int | None
    data: int
    expert: int
    sequence: bool
    tokens: int
    """Rows of a micro-batch."""
    recompute: str
    reference: str
    """Its mode."""

    def applied(self, config: Config) -> Config:
        """The run file with this grid."""
        parallel = replace(
            config.parallel,
            tensor_model_parallel_size=self.tensor,
            pipeline_model_parallel_size=self.pipeline,
            virtual_pipeline_model_parallel_size=self.virtual,
            data_parallel_size=self.data,
            expert_model_parallel_size=self.expert,
            sequence_parallel=self.sequence,
        )
        return replace(
            config,
            parallel=parallel,
            batch=replace(config.batch, micro_batch_tokens=self.tokens),
            model=replace(config.model, recompute=self.recompute),  # type: ignore[arg-type]
            reference=replace(config.reference, mode=self.reference),  # type: ignore[arg-type]
        )

    @property
    def ways(self) -> tuple[Any, ...]:
        """What tells grids apart; the other fields are ways to run them."""
        return self.tensor, self.pipeline, self.virtual, self.data, self.expert

    def text(self) -> str:
        """tensor 8 x pipeline 4 (5 chunks) x data 16, sequence parallel, 8192 tokens, recompute full, resident"""
        chunks = f" ({self.virtual} chunks)" if self.virtual else ""
        experts = f", experts on {self.expert}" if self.expert > 1 else ""
        sequence = ", sequence parallel" if self.sequence else ""
        return (
            f"tensor {self.tensor} x pipeline {self.pipeline}{chunks} x data {self.data}{experts}{sequence}, "
            f"{self.tokens} tokens, recompute {self.recompute}, reference {self.reference}"
        )


@dataclass(frozen=True)
class Space:
    """What the search depends on beside the run file."""

    config: Config
    shapes: Shapes
    gpu: Gpu
    gpus: int
    longest: int
    """Rows of the longest group."""


@dataclass(frozen=True)
class Rejected:
    candidate: Candidate
    reasons: tuple[str, ...]

    @property
    def for_memory(self) -> bool:
        """A run would start, and end for want of memory."""
        return self.reasons[0].startswith("does not fit")


def check_space(space: Space) -> None:
    """Raise ConfigError for what no grid can mend."""
    check_gpus(space.gpus)
    per_node = space.gpu.per_node
    if space.gpus > per_node and space.gpus % per_node:
        near = space.gpus // per_node * per_node
        raise ConfigError(
            f"--gpus {space.gpus}: must be a multiple of the {per_node} of a node where it is over that, such as "
            f"{near} or {near + per_node}; say --gpu ...,per_node=N for other nodes"
        )
    model = space.config.model
    if model.dtype != "bfloat16":
        raise ConfigError(
            f"model.dtype = {model.dtype}: the planner knows the speed of bfloat16 and FP8 only; set bfloat16, or ask "
            "for one rank's memory with --dry-run"
        )
    if model.real_fp8 and space.gpu.fp8_flops is None:
        raise ConfigError(f"model.fp8_format = {model.fp8_format}: {space.gpu.name} has no FP8; leave it out")
    problem = recipe_problem(model.fp8_recipe, space.gpu.capability, c.CUDA) if model.real_fp8 else None
    if problem:
        raise ConfigError(f"--gpu {space.gpu.name}: {problem}")


def check_gpus(gpus: int) -> None:
    if gpus < 1:
        raise ConfigError(f"--gpus {gpus}: must be at least 1")


def candidates(space: Space) -> Iterator[Candidate]:
    """All of them, sensible or not, tensor sizes over a node and stages without layers included."""
    for tensor in _divisors(space.gpus):
        if tensor > 2 * space.gpu.per_node:
            break  # one size over the node shows the reason
        for pipeline in _divisors(space.gpus // tensor):
            if pipeline > 2 * space.shapes.policy.num_layers:
                break
            yield from _on(space, tensor, pipeline, space.gpus // tensor // pipeline)


def _on(space: Space, tensor: int, pipeline: int, data: int) -> Iterator[Candidate]:
    experts = space.shapes.policy.experts
    dealt = [size for size in _divisors(tensor * data) if size <= experts.count] if experts else [1]
    for expert in dealt:
        for virtual in _chunks(pipeline, space.shapes.policy.num_layers):
            for sequence in (True, False) if tensor > 1 else (False,):
                for tokens in token_budgets(space, tensor):
                    for recompute in RECOMPUTES:
                        for mode in modes(space.config):
                            yield Candidate(tensor, pipeline, virtual, data, expert, sequence, tokens, recompute, mode)


def _chunks(pipeline: int, layers: int) -> list[int | None]:
    """Numbers of chunks per rank: none, those that divide the layers evenly, and two that need not."""
    if pipeline == 1:
        return [None]
    even = [v for v in range(2, MOST_CHUNKS + 1) if pipeline * v <= layers and layers % (pipeline * v) == 0]
    rough = [v for v in (2, 4) if pipeline * v <= layers and v not in even]
    return [None, *sorted(even + rough)]


def token_budgets(space: Space, tensor: int) -> list[int]:
    """The run file's, or some that the longest group fits, which is itself the first; ascending."""
    if space.config.batch.micro_batch_tokens is not None:
        return [space.config.batch.micro_batch_tokens]
    least = -(-space.longest // (BLOCK * tensor)) * BLOCK * tensor
    return [least, *(tokens for tokens in TOKENS if tokens > least)]


def modes(config: Config) -> Sequence[str]:
    """Of the reference, with the run file's first; the run file's alone where the objective has none."""
    given = config.reference.mode
    if not config.objective.needs_reference:
        return [given]
    return [given, *(mode for mode in MODES if mode != given)]


def reasons(space: Space, candidate: Candidate) -> tuple[str, ...]:
    """Why a run would refuse the grid, in its own words; none where it would start."""
    config = candidate.applied(space.config)
    found = [*_of_settings(config), *_of_grid(space, config.parallel)]
    if not found:
        found += _of_megatron(space.shapes.policy, config.parallel, without_fp8(config.model))
    if not found and candidate.tokens < space.longest:
        found.append(f"batch.micro_batch_tokens = {candidate.tokens}: the longest group takes {space.longest} tokens")
    if not found and candidate.tensor > space.gpu.per_node:
        found.append(
            f"parallel.tensor_model_parallel_size = {candidate.tensor}: over the {space.gpu.per_node} GPUs of a node; "
            "it would run, with every layer's collectives over the network, and is not looked at"
        )
    return tuple(dict.fromkeys(found))


@cache
def _of_settings(config: Config) -> tuple[str, ...]:
    return tuple(problems(config))


@cache
def _of_grid(space: Space, parallel: ParallelConfig) -> tuple[str, ...]:
    return tuple(grid_problems(replace(space.config, parallel=parallel), space.shapes, space.gpus))


def without_fp8(model: ModelConfig) -> ModelConfig:
    """Where Transformer Engine is not installed, Megatron-Core's FP8 can neither be configured nor counted; the planned
    machine has it. What FP8 needs of a grid is in config/check.py and convert/fit.py."""
    if have_te() or not model.real_fp8:
        return model
    return ModelConfig(model.path, model.dtype, model.recompute, model.logprob_backend)


@cache
def _of_megatron(shape: ModelShape, parallel: ParallelConfig, model: ModelConfig) -> tuple[str, ...]:
    """What Megatron-Core's configuration refuses, and what mcore_fixes does."""
    try:
        transformer_config(shape, parallel, model, torch.device("cpu"))
    except (ConfigError, MachineError) as error:
        return (str(error),)
    except (ValueError, AssertionError) as error:
        return (f"Megatron-Core: {' '.join(str(error).split())}",)
    return ()


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]
