"""All grids through legality, memory and time; the best first."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from megadpo.config import Config
from megadpo.convert.shape import ModelShape
from megadpo.model.build import stage_layers
from megadpo.observe.gpus import GIB, Gpu
from megadpo.plan import constants as c
from megadpo.plan.grids import Candidate, Rejected, Space, candidates, check_space, reasons
from megadpo.plan.numbers import Memory, RankNumbers
from megadpo.plan.time import Estimate, Situation, estimate
from megadpo.plan.workload import Lengths, Work, work
from megadpo.train.loop import run_length

Count = Callable[[ModelShape, Config, int, int, int, int, int, bool, ModelShape | None], RankNumbers]
"""(shape, config, world size, rank, tokens, scored tokens, micro-batches, of GPU code, reference's shape) -> what that
rank holds and sends: plan.profile.rank_numbers."""


@dataclass(frozen=True)
class Plan:
    """A grid that a run would start on and that fits."""

    candidate: Candidate
    work: Work
    memory: Memory
    """Of the fullest rank."""
    stage: int
    """Its pipeline stage."""
    parameters: int
    """Of that rank."""
    estimate: Estimate
    steps: int
    gpus: int

    @property
    def hours(self) -> float:
        """Of the whole run, a reference's pass before it included; evaluation, checkpoints and export are not."""
        return self.steps * self.estimate.step / 3600

    @property
    def gpu_hours(self) -> float:
        return self.hours * self.gpus


@dataclass(frozen=True)
class Found:
    plans: tuple[Plan, ...]
    """The fastest first; grids that differ in nothing but how they run stand side by side."""
    rejected: tuple[Rejected, ...]
    """By the run, or for memory."""
    considered: int
    dominated: int
    """Not looked at: the same grid fits with less recompute, or with sequence parallelism, and is faster so."""

    @property
    def best(self) -> tuple[Plan, ...]:
        """The fastest way to run each grid."""
        first: dict[tuple[object, ...], Plan] = {}
        for plan in self.plans:
            first.setdefault(plan.candidate.ways, plan)
        return tuple(first.values())


def usable(gpu: Gpu) -> int:
    """Bytes of the device that a run can fill."""
    return int(gpu.memory * (1 - c.FRAGMENTATION)) - c.RESERVE


@dataclass
class Search:
    """One search; keeps what several grids share."""

    space: Space
    lengths: Lengths
    count: Count
    _works: dict[tuple[int, int, int], Work] = field(default_factory=dict)
    _numbers: dict[tuple[Candidate, int], RankNumbers] = field(default_factory=dict)
    _estimates: dict[Candidate, Estimate] = field(default_factory=dict)

    def run(self, every: bool = False) -> Found:
        """every: dominated grids too. Raises ConfigError for what no grid can mend."""
        check_space(self.space)
        plans: list[Plan] = []
        rejected: list[Rejected] = []
        fitting: set[tuple[object, ...]] = set()
        considered = dominated = 0
        for candidate in candidates(self.space):  # sequence parallelism and less recompute come first
            considered += 1
            kin = (candidate.ways, candidate.tokens, candidate.reference)
            if not every and kin in fitting:
                dominated += 1
                continue
            result = self.look_at(candidate)
            if isinstance(result, Rejected):
                rejected.append(result)
            else:
                fitting.add(kin)
                plans.append(result)
        plans.sort(key=lambda plan: (plan.estimate.step, plan.memory.total))
        return Found(tuple(plans), tuple(rejected), considered, dominated)

    def look_at(self, candidate: Candidate) -> Plan | Rejected:
        found = reasons(self.space, candidate)
        if found:
            return Rejected(candidate, found)
        fullest = self.fullest(candidate)
        room = usable(self.space.gpu)
        if fullest.memory.total > room:
            return Rejected(candidate, (does_not_fit(fullest.memory, room),))
        return Plan(
            candidate,
            self.work(candidate),
            fullest.memory,
            fullest.stage,
            fullest.parameters,
            self.estimate(candidate),
            self.steps,
            self.space.gpus,
        )

    def fullest(self, candidate: Candidate) -> RankNumbers:
        """Of the rank that has most in its memory."""
        found = [self.numbers(candidate, stage) for stage in _stages_to_count(candidate.pipeline)]
        return max(found, key=lambda one: one.memory.total)

    @property
    def steps(self) -> int:
        return run_length(self.space.config, self.lengths.groups).steps

    def work(self, candidate: Candidate) -> Work:
        batch = self.space.config.batch
        key = (candidate.data, candidate.tokens, candidate.pipeline if candidate.virtual else 1)
        if key not in self._works:
            self._works[key] = work(
                self.lengths,
                batch.global_batch_size,
                candidate.data,
                candidate.tokens,
                batch.micro_batch_size,
                key[2],
                self.space.shapes.policy.attended_pair_cost,
            )
        return self._works[key]

    def numbers(self, candidate: Candidate, stage: int) -> RankNumbers:
        """Of the first rank of a pipeline stage."""
        key = (candidate, stage)
        if key not in self._numbers:
            done, shapes = self.work(candidate), self.space.shapes
            self._numbers[key] = self.count(
                shapes.policy,
                candidate.applied(self.space.config),
                self.space.gpus,
                stage * candidate.tensor * candidate.data,  # ranks go tensor, data, pipeline
                candidate.tokens,
                max(round(done.most_scored), 1),
                done.micro_batches,
                True,
                None if shapes.reference is shapes.policy else shapes.reference,
            )
        return self._numbers[key]

    def estimate(self, candidate: Candidate) -> Estimate:
        if candidate not in self._estimates:
            self._estimates[candidate] = estimate(self.situation(candidate), self._of_training(candidate))
        return self._estimates[candidate]

    def _of_training(self, candidate: Candidate) -> Mapping[int, RankNumbers]:
        """What is sent in the policy's own passes: that of a run without a reference in it."""
        alone = replace(candidate, reference="precomputed")
        return {stage: self.numbers(alone, stage) for stage in _stages_to_count(candidate.pipeline)}

    def situation(self, candidate: Candidate) -> Situation:
        config, shapes = self.space.config, self.space.shapes
        length = run_length(config, self.lengths.groups)
        stages = candidate.pipeline * (candidate.virtual or 1)
        return Situation(
            shapes.policy,
            shapes.reference,
            candidate.applied(config),
            self.space.gpu,
            self.space.gpus,
            self.work(candidate),
            tuple(stage_layers(shapes.policy.num_layers, stages)),
            tuple(stage_layers(shapes.reference.num_layers, stages)),
            length.steps,
            min(length.groups, self.lengths.groups) / config.batch.global_batch_size,
        )


def _stages_to_count(pipeline: int) -> list[int]:
    """The first, the last, and one between: the others are like that one or have less."""
    return sorted({0, min(1, pipeline - 1), pipeline - 1})


def does_not_fit(memory: Memory, room: int) -> str:
    """does not fit: needs 93.1 GiB of 75.4 GiB (most of it activations)"""
    largest = max(vars(memory).items(), key=lambda part: part[1])[0]
    return f"does not fit: needs {memory.total / GIB:.1f} GiB of {room / GIB:.1f} GiB, most of it {largest}"
