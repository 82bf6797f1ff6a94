"""`megadpo plan --dry-run`: one rank of the run file's own grid, walked and described."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from megadpo.config import Config
from megadpo.convert.shape import ModelShape
from megadpo.data.stream import budget_for
from megadpo.errors import ConfigError
from megadpo.observe.gpus import GIB
from megadpo.plan.command import Request, data_of
from megadpo.plan.counts import without_te
from megadpo.plan.dry_run import Walk, walk
from megadpo.plan.even import Load
from megadpo.plan.grids import check_gpus
from megadpo.plan.numbers import RankNumbers
from megadpo.plan.profile import Place, rank_numbers
from megadpo.plan.workload import Lengths, work
from megadpo.train.inputs import read_shapes


@dataclass(frozen=True)
class DryRun:
    """What was walked, and what came of it."""

    place: Place
    world: int
    load: Load
    assumptions: tuple[str, ...]
    walk: Walk

    def as_json(self) -> dict[str, Any]:
        numbers = asdict(self.walk.numbers)
        numbers["memory"]["total"] = self.walk.numbers.memory.total
        return {
            "world_size": self.world,
            "place": asdict(self.place),
            "load": asdict(self.load),
            "assumptions": list(self.assumptions),
            **numbers,
            "seconds": self.walk.seconds,
        }

    def lines(self) -> list[str]:
        numbers, place, load = self.walk.numbers, self.place, self.load
        parts = [(name, size) for name, size in vars(numbers.memory).items() if size]
        return [
            f"rank {numbers.rank} of {self.world}: pipeline stage {place.stage} of {place.stages}, "
            f"tensor rank {numbers.rank % place.tensor} of {place.tensor}, data rank {place.data_rank} of {place.data}",
            *self.assumptions,
            f"a step: {load.micro_batches} micro-batches of {load.tokens} rows, {load.scored} of them scored, "
            f"{load.groups} groups in each",
            f"parameters {numbers.parameters:,}",
            "",
            "GiB at the fullest instant",
            *(f"  {name:<12} {size / GIB:10.3f}" for name, size in parts),
            f"  {'total':<12} {numbers.memory.total / GIB:10.3f}",
            "",
            f"{'collective':<16} {'group':<12} {'ranks':>6} {'calls':>7} {'GiB':>10}",
            *(
                f"{one.kind:<16} {one.group:<12} {one.ranks:>6} {one.calls:>7} {one.bytes / GIB:>10.3f}"
                for one in numbers.collectives
            ),
            "",
            f"{numbers.flops:.3g} floating-point operations in linear layers and head; "
            f"walked in {self.walk.seconds:.0f} s on fake tensors",
        ]


def dry_run(config: Config, request: Request, rank: int) -> DryRun:
    """Raises ConfigError and ModelError."""
    world = request.gpus
    check_gpus(world)
    shapes = read_shapes(config, world)
    if not 0 <= rank < world:
        raise ConfigError(f"--rank {rank}: {world} GPUs have the ranks 0 to {world - 1}")
    place = Place.of(config, world, rank)
    lengths, assumptions = data_of(config, request, shapes.policy)
    if without_te(config) != config:
        fp8 = "; FP8's casts as on a Hopper" if config.model.real_fp8 else ""
        kept = ", beside weights in bfloat16" if config.model.fp8_param_gather else ""
        kernels = "Transformer Engine's and Triton's kernels"
        assumptions = [*assumptions, f"counted without {kernels}{fp8}{kept}"]
    load = load_of(config, lengths, place)
    reference = None if shapes.reference is shapes.policy else shapes.reference
    found = walk(shapes.policy, config, world, rank, load, reference=reference)
    if config.model.cuda_graphs:
        assumptions = [*assumptions, "what CUDA graphs hold is added as the search over grids counts it"]
        found = replace(found, numbers=_with_graphs(found.numbers, shapes.policy, config, world, load, reference))
    return DryRun(place, world, load, tuple(assumptions), found)


def _with_graphs(
    walked: RankNumbers, shape: ModelShape, config: Config, world: int, load: Load, reference: ModelShape | None
) -> RankNumbers:
    """A walk captures nothing: what graphs add, by the short way, which has both."""
    plain = replace(config, model=replace(config.model, cuda_graphs=()))
    without, graphed = (
        rank_numbers(
            shape, one, world, walked.rank, load.tokens, load.scored, load.micro_batches, reference=reference
        ).memory
        for one in (plain, config)
    )
    more = {name: getattr(graphed, name) - getattr(without, name) for name in vars(without)}
    memory = replace(walked.memory, **{name: size + more[name] for name, size in vars(walked.memory).items()})
    return replace(walked, memory=memory)


def load_of(config: Config, lengths: Lengths, place: Place) -> Load:
    """What the rank that has most to score works on: streams and their number are chosen and dealt as in a run."""
    batch, grid = config.batch, config.parallel
    multiple_of = grid.tensor_model_parallel_size if grid.sequence_parallel else 1
    budget = budget_for([lengths.rows_G], place.data, place.stages, multiple_of, batch)
    whole = place.stages if place.virtual > 1 else 1
    done = work(lengths, batch.global_batch_size, place.data, budget.tokens, batch.micro_batch_size, whole)
    responses = config.objective.responses or 4
    groups = max(round(batch.global_batch_size / place.data / done.micro_batches), 1)
    scored = min(max(round(done.most_scored), responses), budget.tokens)
    return Load(budget.tokens, scored, done.micro_batches, min(groups, scored // responses))
