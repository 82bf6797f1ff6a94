"""All grids through legality, memory and time; the best first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from megadpo.config import Config
from megadpo.convert.shape import ModelShape
from megadpo.model.build import stage_layers
from megadpo.observe.gpus import GIB, Gpu
from megadpo.plan import constants as c
from megadpo.plan.grids import Candidate, Rejected, Space, candidates, check_space, reasons, token_budgets
from megadpo.plan.numbers import Memory, RankNumbers
from megadpo.plan.profile import layers_of, memory_layers
from megadpo.plan.time import Estimate, Situation, estimate
from megadpo.plan.workload import Lengths, Work, work
from megadpo.train.loop import run_length

Count = Callable[[ModelShape, Config, int, int, int, int, int, tuple[int, int] | None, ModelShape | None], RankNumbers]
"""(shape, config, world size, rank, tokens, scored tokens, micro-batches, the GPU's compute capability, reference's
shape) -> what that rank holds and sends: plan.profile.rank_numbers."""


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
    exact: bool = False
    """Whether memory was counted at this micro-batch length, not scaled from the shortest one."""

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
    """Not looked at, as another way to run the same grid can only be faster: one that fits with less recompute, with
    sequence parallelism, or with shorter micro-batches of which each rank has no more."""

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
    _numbers: dict[tuple[Candidate, int, int, bool], RankNumbers] = field(default_factory=dict)
    _kinds: dict[tuple[int, int], list[int]] = field(default_factory=dict)
    _estimates: dict[Candidate, Estimate] = field(default_factory=dict)

    def run(self, every: bool = False, confirmed: int = 15) -> Found:
        """every: dominated grids too. confirmed: so many of the best grids are counted at their own length. Raises
        ConfigError for what no grid can mend."""
        check_space(self.space)
        plans: list[Plan] = []
        rejected: list[Rejected] = []
        seen = _Seen()
        considered = dominated = 0
        # Sequence parallelism, shorter micro-batches and less recompute come first.
        for candidate in candidates(self.space):
            considered += 1
            if not every and seen.dominates(candidate):
                dominated += 1
                continue
            result = self.look_at(candidate)
            seen.add(result)
            if isinstance(result, Rejected):
                rejected.append(result)
            else:
                plans.append(result)
        plans.sort(key=lambda plan: (plan.estimate.step, plan.memory.total))
        plans, too_large = self._confirmed(plans, confirmed)
        return Found(tuple(plans), tuple(rejected + too_large), considered, dominated)

    def look_at(self, candidate: Candidate) -> Plan | Rejected:
        found = reasons(self.space, candidate)
        if found:
            return Rejected(candidate, found)
        room = usable(self.space.gpu)
        least = self.fullest(candidate, in_flight=1)
        if least.memory.total > room:
            return Rejected(candidate, (does_not_fit(least.memory, room),))
        fullest = self.fullest(candidate)
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
            exact=candidate.tokens == self._shortest(candidate),
        )

    def _confirmed(self, plans: list[Plan], grids: int) -> tuple[list[Plan], list[Rejected]]:
        """The plans in their order, the fastest of the first `grids` grids counted at their own length, and those that
        do not fit then."""
        kept: list[Plan] = []
        too_large: list[Rejected] = []
        done: set[tuple[object, ...]] = set()
        room = usable(self.space.gpu)
        for plan in plans:
            ways = plan.candidate.ways
            if plan.exact or ways in done or len(done) >= grids:
                kept.append(plan)
                done.add(ways)
                continue
            stages = self._stages_to_count(plan.candidate)
            counted = [self._counted(plan.candidate, plan.candidate.tokens, stage) for stage in stages]
            memory = max((one.memory for one in counted), key=lambda one: one.total)
            if memory.total > room:
                too_large.append(Rejected(plan.candidate, (does_not_fit(memory, room),)))
            else:
                done.add(ways)
                kept.append(replace(plan, memory=memory, exact=True))
        return kept, too_large

    def fullest(self, candidate: Candidate, in_flight: int | None = None) -> RankNumbers:
        """Of the rank that has most in its memory. in_flight: micro-batches of a step, where not the real number."""
        found = [self.numbers(candidate, stage, in_flight) for stage in self._stages_to_count(candidate)]
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
            )
        return self._works[key]

    def numbers(
        self, candidate: Candidate, stage: int, in_flight: int | None = None, of_reference: bool = False
    ) -> RankNumbers:
        """Of the first rank of a pipeline stage: counted at the shortest micro-batch that is looked at, and scaled, as
        everything that depends on its length is proportional to it (but the logits, which are no more than that).
        of_reference: as if the reference's shape were trained."""
        shortest = self._shortest(candidate)
        counted = self._counted(
            replace(candidate, tokens=shortest), shortest, stage, in_flight or self._count(candidate), of_reference
        )
        return _scaled(counted, candidate.tokens / shortest)

    def _shortest(self, candidate: Candidate) -> int:
        return min(token_budgets(self.space, candidate.tensor))

    def _count(self, candidate: Candidate) -> int:
        return self.work(candidate).micro_batches

    def _kind(self, candidate: Candidate) -> list[int]:
        """Of every pipeline stage, the first that has its layers, experts and ends."""
        stages, chunks, shapes = candidate.pipeline, candidate.virtual or 1, self.space.shapes
        if (stages, chunks) not in self._kinds:
            model, capability = self.space.config.model, self.space.gpu.capability
            kinds = [memory_layers(shape, model, capability) for shape in (shapes.policy, shapes.reference)]
            first: dict[tuple[object, ...], int] = {}
            found = []
            for stage in range(stages):
                layers = [
                    tuple(layers_of(every, stage, stages, chunk, chunks)) for every in kinds for chunk in range(chunks)
                ]
                found.append(first.setdefault((stage == 0, stage == stages - 1, *layers), stage))
            self._kinds[stages, chunks] = found
        return self._kinds[stages, chunks]

    def _stages_to_count(self, candidate: Candidate) -> list[int]:
        """The first of each kind: later ones have no more micro-batches in flight."""
        return sorted(set(self._kind(candidate)))

    def _counted(
        self,
        candidate: Candidate,
        tokens: int,
        stage: int,
        micro_batches: int | None = None,
        of_reference: bool = False,
    ) -> RankNumbers:
        """At a micro-batch length that is full: the fullest one decides the memory."""
        count = micro_batches or self._count(candidate)
        key = (candidate, stage, count, of_reference)
        if key not in self._numbers:
            shapes = self.space.shapes
            scored = tokens * self.lengths.scored_G.sum() / self.lengths.rows_G.sum()
            given = candidate.applied(self.space.config)
            self._numbers[key] = self.count(
                shapes.reference if of_reference else shapes.policy,
                given,
                self.space.gpus,
                stage * candidate.tensor * candidate.data,  # ranks go tensor, data, pipeline
                tokens,
                max(int(scored), 1),
                count,
                self.space.gpu.capability,
                None if shapes.reference is shapes.policy else shapes.reference,
            )
        return self._numbers[key]

    def estimate(self, candidate: Candidate) -> Estimate:
        # A reference in memory or in a column: the passes of the policy are the same.
        if candidate not in self._estimates:
            policy = self._of_training(candidate)
            alike = self.space.shapes.reference is self.space.shapes.policy
            reference = policy if alike else self._of_training(candidate, of_reference=True)
            self._estimates[candidate] = estimate(self.situation(candidate), policy, reference)
        return self._estimates[candidate]

    def _of_training(self, candidate: Candidate, of_reference: bool = False) -> list[RankNumbers]:
        """What every stage sends in the policy's own passes: that of a run without a reference in it."""
        alone = replace(candidate, reference="precomputed")
        return [self.numbers(alone, stage, of_reference=of_reference) for stage in self._kind(candidate)]

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


@dataclass
class _Seen:
    """Which ways of running a grid were looked at, to know those that can only be slower."""

    legal: set[tuple[object, ...]] = field(default_factory=set)
    fitting: set[tuple[object, ...]] = field(default_factory=set)
    single: set[tuple[object, ...]] = field(default_factory=set)

    def add(self, result: Plan | Rejected) -> None:
        one = result.candidate
        if isinstance(result, Plan):
            self.fitting.add((one.ways, one.sequence, one.tokens, one.reference))
            if result.work.micro_batches == (one.pipeline if one.virtual else 1):
                self.single.add((one.ways, one.sequence, one.reference))
        if isinstance(result, Plan) or result.for_memory:
            self.legal.add(one.ways)

    def dominates(self, one: Candidate) -> bool:
        """Less recompute fits; a shorter micro-batch has everything already; sequence parallelism is possible, which
        takes less memory and no more time."""
        recompute = (one.ways, one.sequence, one.tokens, one.reference) in self.fitting
        longer = (one.ways, one.sequence, one.reference) in self.single
        return recompute or longer or (one.tensor > 1 and not one.sequence and one.ways in self.legal)


def _scaled(numbers: RankNumbers, factor: float) -> RankNumbers:
    """With micro-batches `factor` times as long."""
    if factor == 1:
        return numbers
    memory = numbers.memory
    return replace(
        numbers,
        memory=replace(memory, activations=int(memory.activations * factor), logits=int(memory.logits * factor)),
        collectives=tuple(
            replace(one, bytes=int(one.bytes * factor)) if one.group in ("tensor", "expert", "pipeline") else one
            for one in numbers.collectives
        ),
    )


def does_not_fit(memory: Memory, room: int) -> str:
    """does not fit: needs 93.1 GiB of 75.4 GiB (most of it activations)"""
    largest = max(vars(memory).items(), key=lambda part: part[1])[0]
    return f"does not fit: needs {memory.total / GIB:.1f} GiB of {room / GIB:.1f} GiB, most of it {largest}"
