"""Numbers of a rank without walking its whole step: short stages are measured, the rest is multiplication.

For searching over grids. `dry_run.walk` is the long way; tests compare the two.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import TypeVar

from megadpo.config import Config, ModelConfig
from megadpo.convert.shape import ModelShape
from megadpo.model.build import DTYPES, stage_layers
from megadpo.objectives import Objective
from megadpo.parallel.context import expert_tensor_size
from megadpo.plan import buckets
from megadpo.plan.buckets import Sharding, Weight, bytes_of
from megadpo.plan.dry_run import has_second
from megadpo.plan.fp8_memory import HOPPER, Kept, layers_in_fp8
from megadpo.plan.graph_memory import graphed, of_chunk, turns_of
from megadpo.plan.numbers import Collective, Group, Memory, RankNumbers
from megadpo.plan.stage import Frozen, Layer, Stage, StageKind, Working, frozen, kind_of, measured

T = TypeVar("T")


def rank_numbers(
    shape: ModelShape,
    config: Config,
    world_size: int,
    rank: int,
    tokens: int,
    scored: int,
    micro_batches: int,
    capability: tuple[int, int] | None = HOPPER,
    reference: ModelShape | None = None,
) -> RankNumbers:
    """What rank `rank` of `world_size` holds and sends in one step of config.parallel's grid.

    config: grid, dtype, FP8, recompute, optimizer sharding and the reference's mode are read from it; nothing on the
    disk is. The grid fits the model and the world (config.check.check_grid, convert.fit.misfits): not looked at here.
    tokens: rows of one micro-batch's stream. scored: scored tokens of it; the other rows are taken for prompts.
    micro_batches: of one data-parallel rank per step. reference: shape of a reference.path; the policy's where None.
    capability: of the GPU, for the code that runs there (flash attention, fused norms); None: what runs on a CPU.

    A short stage is measured once per process for each (shape, tensor size, sequence parallel, recompute, tokens ...),
    which takes about a second; afterwards a call takes milliseconds, so that hundreds of grids can be asked for.
    Parameters, weights, gradients and optimizer state are exact. Activations and logits are within a few percent of
    `dry_run.walk`. Of collectives, those of a few bytes (counts, norms, totals) are left out, and those of forward
    passes that the objective asks for beside its own (whole batches, KTO's mismatched responses).
    """
    place = Place.of(config, world_size, rank)

    @cache
    def kind(model: ModelShape, frozen: bool, layer: Layer, layers: int, first: bool, last: bool) -> StageKind:
        found = kind_of(model, config, layer, layers, first, last, tokens, scored, capability is not None)
        return replace(found, frozen=frozen and asks_for_more(config.objective))

    @cache
    def own_layers(model: ModelShape, virtual: int, frozen: bool = False) -> list[Layer]:
        return place.part(memory_layers(model, config.model, capability, frozen), virtual)

    def chunks_of(model: ModelShape, frozen: bool = False) -> list[Chunk]:
        return [
            _chunk(own_layers(model, virtual), place, virtual, lambda *what: measured(kind(model, frozen, *what)))
            for virtual in range(place.virtual)
        ]

    chunks = chunks_of(shape)
    other = reference or shape
    others = chunks_of(other, frozen=True) if has_second(config) else []
    frozen_bytes = sum(
        _frozen_bytes(
            own_layers(other, virtual, frozen=True),
            place,
            virtual,
            lambda *what: frozen(kind(other, True, *what), config.reference.fp8_weights),
        )
        for virtual in range(len(others))
    )
    shares = [_shares(chunk.weights, config, place) for chunk in chunks]
    width = DTYPES[config.model.dtype].itemsize
    tally = Tally()
    for chunk in chunks:
        tally.add_chunk(chunk, micro_batches, backward=True)
    for chunk in others:
        tally.add_chunk(chunk, micro_batches, backward=False)
    rows = tokens // (place.tensor if config.parallel.sequence_parallel else 1)
    message = rows * width
    under_way = 0 if place.stages == 1 else UNDER_WAY if place.virtual == 1 else UNDER_WAY_INTERLEAVED
    graphs = [
        of_chunk(
            own_layers(shape, virtual),
            config.model.cuda_graphs,
            turns,
            lambda layer: graphed(kind(shape, False, layer, 1, False, False)),
        )
        for virtual, turns in enumerate(turns_of(place.stage, place.stages, place.virtual))
    ]
    captured = [one.saved for one in graphs]
    peak = max(_instants(chunks, place, micro_batches, captured), key=lambda instant: instant.total)
    _tally_pipeline(tally, place, micro_batches, message * shape.hidden_size, 2)
    if others:
        _tally_pipeline(tally, place, micro_batches, message * other.hidden_size, 1)
    _tally_data(tally, shares, config, place)
    _tally_gradients(tally, [weight for chunk in chunks for weight in chunk.weights], place)
    parts = [part for share in shares for _, part in share]
    peak = peak + Working(activations=under_way * message * shape.hidden_size)
    if config.reference.mode == "swapped":  # it is not there while the policy has activations
        visit = max((chunk.scoring for chunk in others), key=lambda scoring: scoring.total, default=Working())
        if frozen_bytes + visit.total > peak.total:
            peak = visit
        else:
            frozen_bytes = 0
    return RankNumbers(
        rank=rank,
        stage=place.stage,
        parameters=sum(weight.size for chunk in chunks for weight in chunk.weights),
        memory=Memory(
            weights=sum(part.weights for part in parts)
            + sum(chunk.buffer_bytes for chunk in chunks)
            - sum(one.casts for one in graphs),
            gradients=sum(part.gradients for part in parts),
            optimizer=sum(part.optimizer for part in parts),
            reference=frozen_bytes,
            activations=peak.activations + sum(one.held for one in graphs),
            logits=peak.logits,
            buffers=max(chunk.buffers for chunk in [*chunks, *others]),
        ),
        collectives=tally.collectives(),
        flops=tally.flops,
    )


def asks_for_more(objective: Objective) -> bool:
    """Whether the policy's head is asked for more than a reference's: whole distributions, drawn tokens."""
    return bool({"kl_N", "collision_N"} & objective.needs) or objective.top_k is not None


@dataclass(frozen=True)
class Place:
    """Of a rank in its grid. Ranks are laid out tensor first, then data, then pipeline, as in build_context."""

    stage: int
    stages: int
    virtual: int
    tensor: int
    data: int
    data_rank: int
    expert_data: int
    expert_data_rank: int

    @staticmethod
    def of(config: Config, world_size: int, rank: int) -> Place:
        grid = config.parallel
        tensor, stages = grid.tensor_model_parallel_size, grid.pipeline_model_parallel_size
        data = world_size // (tensor * stages)
        within = rank % (tensor * data)
        expert_ranks = grid.expert_model_parallel_size * expert_tensor_size(grid)
        return Place(
            stage=rank // (tensor * data),
            stages=stages,
            virtual=grid.virtual_pipeline_model_parallel_size or 1,
            tensor=tensor,
            data=data,
            data_rank=within // tensor,
            expert_data=tensor * data // expert_ranks,
            expert_data_rank=within // expert_ranks,
        )

    def part(self, layers: Sequence[T], virtual: int) -> list[T]:
        """Of all layers, those of one of its chunks."""
        return layers_of(layers, self.stage, self.stages, virtual, self.virtual)

    def is_first(self, virtual: int) -> bool:
        """Whether the chunk has the embedding."""
        return self.stage == 0 and virtual == 0

    def is_last(self, virtual: int) -> bool:
        """Whether the chunk has the head."""
        return self.stage == self.stages - 1 and virtual == self.virtual - 1


# ---- a model chunk


@dataclass(frozen=True)
class Chunk:
    """A model chunk of this rank, as a sum of short ones: one layer with the ends, and more layers by difference."""

    parts: tuple[tuple[Stage, int], ...]
    """How often each counts; a stage of one layer is taken away from one of two, to have a layer alone."""
    weights: tuple[Weight, ...]
    buffer_bytes: int

    def sum(self, value: Callable[[Stage], Working]) -> Working:
        total = Working()
        for stage, times in self.parts:
            total = total + value(stage) * times
        return total

    @property
    def scoring(self) -> Working:
        """Without gradient the second layer adds its input, and further ones nothing."""
        total = self.parts[0][0].scoring
        if len(self.parts) > 1:
            total = total + self.parts[1][0].scoring - self.parts[2][0].scoring
        return total

    @property
    def buffers(self) -> int:
        return max(stage.buffers for stage, _ in self.parts)


def _chunk(
    layers: Sequence[Layer], place: Place, virtual: int, short: Callable[[Layer, int, bool, bool], Stage]
) -> Chunk:
    """short: measures a stage, given what its layers are, how many, with the embedding, with the head."""
    # the last layer is the one whose backward pass runs while all others' activations are there
    ends = short(layers[-1], 1, place.is_first(virtual), place.is_last(virtual))
    more = Counter(layers[:-1])
    parts = [(ends, 1)]
    for layer, count in more.items():
        parts += [(short(layer, 2, False, False), count), (short(layer, 1, False, False), -count)]
    one = {layer: short(layer, 1, False, False) for layer in set(layers)}
    inside = ends.in_layer.index(True)
    after = inside + ends.in_layer.count(True)
    return Chunk(
        parts=tuple(parts),
        weights=(*ends.weights[:inside], *_each(layers, one), *ends.weights[after:]),
        buffer_bytes=sum(one[layer].buffer_bytes for layer in layers),
    )


def layers_of(layers: Sequence[T], stage: int, stages: int, chunk: int, chunks: int) -> list[T]:
    """Of all layers of a model, those of one of a pipeline rank's chunks."""
    sizes = stage_layers(len(layers), stages * chunks)
    at = chunk * stages + stage
    first = sum(sizes[:at])
    return list(layers[first : first + sizes[at]])


@lru_cache(maxsize=256)
def memory_layers(
    shape: ModelShape, model: ModelConfig, capability: tuple[int, int] | None, frozen: bool = False
) -> tuple[Layer, ...]:
    """Of every layer, what decides its memory. frozen: of a reference, whose weights are as model/reference.py says."""
    kept = None if capability is None else Kept.of(model, capability)
    if frozen and kept is not None:
        kept = kept.frozen
    in_fp8 = layers_in_fp8(model, shape.num_layers)
    experts = shape.experts.layers if shape.experts else (False,) * shape.num_layers
    return tuple(Layer(has, kept if fp8 else None) for has, fp8 in zip(experts, in_fp8, strict=True))


def _frozen_bytes(layers: Sequence[Layer], place: Place, virtual: int, short: Callable[..., Frozen]) -> int:
    """Of a chunk of a model that is not trained. short: as for `_chunk`."""
    ends = short(layers[-1], 1, place.is_first(virtual), place.is_last(virtual)).ends
    return ends + sum(short(layer, 1, False, False).layer for layer in layers)


def _each(layers: Iterable[Layer], one: dict[Layer, Stage]) -> Iterator[Weight]:
    for layer in layers:
        stage = one[layer]
        yield from (weight for weight, inside in zip(stage.weights, stage.in_layer, strict=True) if inside)


# ---- memory


def _shares(weights: Sequence[Weight], config: Config, place: Place) -> list[tuple[Group, buckets.Bytes]]:
    """Of every buffer, and whose replicas share it: weights outside experts, and experts'; FP8 ones in their own."""
    grid = config.parallel
    # Megatron-Core cuts buckets on the first stage only, and only where reduction overlaps with the backward pass
    cut = max(40_000_000, 1_000_000 * place.data) if grid.overlap_grad_reduce and place.stage == 0 else None
    width = DTYPES[config.model.dtype].itemsize
    distributed = grid.use_distributed_optimizer
    # MXFP8 weights lie in no buffer: they travel in the gradients' as bfloat16 (and the others, which are not let into
    # their buffer then, are there twice)
    mx = config.model.real_fp8 and config.model.fp8_param_gather and config.model.fp8_recipe == "mxfp8"
    found: list[tuple[Group, buckets.Bytes]] = []
    groups: tuple[tuple[Group, int, int, bool], ...] = (
        ("data", place.data, place.data_rank, False),
        ("expert data", place.expert_data, place.expert_data_rank, True),
    )
    for group, replicas, number, expert in groups:
        for fp8 in (False, True):
            own = [weight for weight in weights if weight.expert == expert and weight.fp8 == fp8]
            if fp8 and not own:
                continue
            part = bytes_of(own, Sharding(replicas, number, distributed, cut, 1 if fp8 and not mx else width))
            if mx:
                part = replace(part, weights=0 if fp8 else part.weights + sum(weight.size for weight in own) * width)
            found.append((group, part))
    return found


def _instants(chunks: Sequence[Chunk], place: Place, micro_batches: int, captured: Sequence[int]) -> Iterator[Working]:
    """How full the working memory is during every pass of the schedule. captured: bytes of every chunk that each of
    its micro-batches leaves in a CUDA graph's memory, and not here."""
    live = Working()
    for virtual, forward in _order(place, micro_batches):
        chunk, elsewhere = chunks[virtual], Working(activations=captured[virtual])
        if forward:
            yield live + chunk.sum(lambda stage: stage.forward.fullest) - elsewhere
            live = live + chunk.sum(lambda stage: stage.saved) - elsewhere
        else:
            live = live - chunk.sum(lambda stage: stage.saved) + elsewhere
            yield live + chunk.sum(lambda stage: stage.backward.fullest) - elsewhere


UNDER_WAY, UNDER_WAY_INTERLEAVED = 1, 4
"""Messages between stages that are there beside those that a micro-batch keeps: received ahead, or not yet sent. As
many as walks show."""


def _order(place: Place, micro_batches: int) -> list[tuple[int, bool]]:
    """(model chunk, whether forward) of every pass, in Megatron-Core's order (schedules.py): forwards alone until the
    pipeline is full, then one forward and one backward in turn, then backwards alone."""
    behind = place.stages - place.stage - 1
    warm = behind if place.virtual == 1 else 2 * behind + (place.virtual - 1) * place.stages
    forwards = [
        virtual
        for group in range(0, micro_batches, place.stages)
        for virtual in range(place.virtual)
        for _ in range(group, min(group + place.stages, micro_batches))
    ]
    backwards = [place.virtual - 1 - virtual for virtual in forwards]
    warm = min(warm, len(forwards))
    order = [(virtual, True) for virtual in forwards[:warm]]
    for done, virtual in enumerate(forwards[warm:]):
        order += [(virtual, True), (backwards[done], False)]
    return order + [(virtual, False) for virtual in backwards[len(forwards) - warm :]]


# ---- collectives


class Tally:
    """Collectives and operations, added up."""

    def __init__(self) -> None:
        self._calls: Counter[tuple[str, Group, int]] = Counter()
        self._bytes: Counter[tuple[str, Group, int]] = Counter()
        self.flops = 0.0

    def add(self, kind: str, group: Group, ranks: int, calls: int, size: int) -> None:
        """Nothing for a group of one rank."""
        if ranks > 1 and calls:
            self._calls[kind, group, ranks] += calls
            self._bytes[kind, group, ranks] += size

    def add_chunk(self, chunk: Chunk, micro_batches: int, backward: bool) -> None:
        """What its layers do in every micro-batch."""
        for stage, count in chunk.parts:
            for one_pass in (stage.forward, stage.backward) if backward else (stage.forward,):
                times = count * micro_batches
                self.flops += one_pass.flops * times
                for call in one_pass.calls:
                    self.add(call.kind, call.group, call.ranks, call.calls * times, call.bytes * times)

    def collectives(self) -> tuple[Collective, ...]:
        return tuple(Collective(*key, calls, self._bytes[key]) for key, calls in sorted(self._calls.items()) if calls)


def _tally_pipeline(tally: Tally, place: Place, micro_batches: int, size: int, directions: int) -> None:
    """Messages between stages. size: bytes of one. directions: 2 with a backward pass."""
    if place.stages == 1:
        return
    inputs = sum(not place.is_first(virtual) for virtual in range(place.virtual)) * micro_batches
    outputs = sum(not place.is_last(virtual) for virtual in range(place.virtual)) * micro_batches
    received, sent = (inputs + outputs, inputs + outputs) if directions == 2 else (inputs, outputs)
    tally.add("recv", "pipeline", place.stages, received, received * size)
    tally.add("send", "pipeline", place.stages, sent, sent * size)


def _tally_data(
    tally: Tally, shares: Sequence[Sequence[tuple[Group, buckets.Bytes]]], config: Config, place: Place
) -> None:
    """Gradients are reduced and weights gathered over the replicas, once per step. With experts Megatron-Core has two
    optimizers, and each gathers the weights of both where the gather is not left to the next forward pass."""
    ranks = {"data": place.data, "expert data": place.expert_data}
    experts = any(group == "expert data" and part.gradients for share in shares for group, part in share)
    gathers = 2 if experts and not config.parallel.overlap_param_gather else 1
    for share in shares:
        for group, part in share:
            if config.parallel.use_distributed_optimizer:
                tally.add("reduce_scatter", group, ranks[group], part.buckets, part.gradients)
                tally.add("all_gather", group, ranks[group], part.buckets * gathers, part.gathered * gathers)
            else:
                tally.add("all_reduce", group, ranks[group], part.buckets, part.gradients)


def _tally_gradients(tally: Tally, weights: Sequence[Weight], place: Place) -> None:
    """Of norms over the tensor-parallel ranks, of tied embeddings over the two stages that have them."""
    summed = sum(weight.size for weight in weights if weight.summed) * buckets.GRADIENT
    tally.add("all_reduce", "tensor", place.tensor, int(summed > 0), summed)
    shared = sum(weight.size for weight in weights if weight.shared) * buckets.GRADIENT
    tally.add("all_reduce", "embedding", min(place.stages, 2), int(shared > 0), shared)
