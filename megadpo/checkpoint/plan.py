"""What this rank writes of the run's state, and where each part stands in the whole. Made once, used at every save.

Megadpo does not save by Megatron-Core's own path: for its `fully_reshardable` format every data-parallel rank gathers
the float32 state of all of them, in several copies, at every save. Here each rank writes what it has. The keys and
shapes are Megatron-Core's, so its reader, on any grid, finds what it would have written itself; only the cuts differ.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from types import MappingProxyType
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedTensor,
    ShardedTensorFactory,
    is_main_replica,
)
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from megadpo.model.fp8_emulation import sharded_history
from megadpo.train.state import TrainState

METADATA = MappingProxyType(
    {
        # the one format that loads on every other grid; Megatron-Core's default cannot be saved at all
        "distrib_optim_sharding_type": "fully_reshardable",
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
    }
)
"""Give Megatron-Core a copy: it writes the process group of the moment into the dictionary."""
ALIGN = 64
"""Bytes that a piece's place in the host buffer is a multiple of."""

Place = tuple[tuple[int, ...], tuple[int, ...]]
"""Where a box begins, and its size."""


@dataclass(frozen=True)
class Piece:
    """A box of one of the checkpoint's tensors, and where its values are."""

    key: str
    whole: tuple[int, ...]
    """Shape of the checkpoint's tensor."""
    start: tuple[int, ...]
    live: Tensor
    """[size of the box], contiguous, a view of what training works on."""
    changing: bool = False
    """Whether forward and backward passes change it, too: it is copied before they go on."""

    @property
    def size(self) -> tuple[int, ...]:
        return tuple(self.live.shape)


@dataclass
class Plan:
    """Of one rank."""

    pieces: list[Piece]
    objects: dict[str, Any]
    """What is saved beside tensors (Transformer Engine's extra state), by key."""
    common: dict[str, Any]
    """What all ranks have alike, without tensors; the first rank writes it."""
    reusable: bool
    """Whether only `common`'s part of the optimizer differs at the next save."""
    addresses: tuple[int, ...]
    """Of all tensors that it was made from."""
    offsets: list[int] = field(init=False)
    """Of each piece in the host buffer, and the buffer's length at the end; bytes."""

    def __post_init__(self) -> None:
        self.offsets = [0]
        for piece in self.pieces:
            self.offsets.append(self.offsets[-1] + -(-piece.live.nbytes // ALIGN) * ALIGN)

    @property
    def nbytes(self) -> int:
        return sum(piece.live.nbytes for piece in self.pieces)


def fits(plan: Plan, state: TrainState) -> bool:
    """Whether the plan is still right: nothing was put in the place of a tensor that it was made from."""
    return plan.reusable and plan.addresses == _addresses(state)


def make_plan(state: TrainState) -> Plan:
    """No collective. Inside `settled`, so that the parameters are whole."""
    model = described_model(state.modules)
    weights = {name: entries for name, entries in model.items() if name != "fp8"}
    entries = {id(entry.data): entry for entry in nested_values(weights) if not isinstance(entry, ShardedObject)}
    distributed = _distributed(state)
    pieces = [piece for part in distributed for piece in _shards(part, entries)]
    optimizer = (
        _described(state) if distributed else state.optimizer.sharded_state_dict(weights, metadata=dict(METADATA))
    )
    sharded, common = save_preprocess(
        {**model, "optimizer": optimizer, "content_metadata": dict(METADATA)}, validate_access_integrity=False
    )
    buffers = {_storage(buffer) for module in state.modules for buffer in module.buffers()}
    objects = {}
    reusable = bool(distributed)
    for entry in nested_values(sharded):
        if not is_main_replica(entry.replica_id):
            continue
        if isinstance(entry, ShardedObject):
            objects[entry.unique_key] = entry.data
            reusable = False  # it may be another one at the next save
            continue
        data = entry.data.detach()
        if type(data) is not Tensor:  # FP8 weights of Transformer Engine's: saved in the dtype that they stand for
            data, reusable = data.dequantize(), False
        box = data.view((1,) * entry.prepend_axis_num + tuple(entry.local_shape))
        pieces.append(
            Piece(entry.key, tuple(entry.global_shape), tuple(entry.global_offset), box, _storage(data) in buffers)
        )
    return Plan(pieces, objects, copy.deepcopy(common), reusable, _addresses(state))


def described_weights(modules: Sequence[Any]) -> dict[str, Any]:
    """Megatron-Core's description of weights and buffers. Not what Transformer Engine calls extra state, the scales of
    delayed FP8: it is a pickle, which loading would run (pytorch/module/base.py: set_extra_state)."""
    every = {f"model{i}": module.sharded_state_dict(metadata=dict(METADATA)) for i, module in enumerate(modules)}
    return {
        chunk: {key: entry for key, entry in entries.items() if "._extra_state" not in key}
        for chunk, entries in every.items()
    }


def described_model(modules: Sequence[Any]) -> dict[str, Any]:
    """The same, and under "fp8", where there is any, what delayed scaling remembers."""
    history = sharded_history(modules)
    return {**described_weights(modules), **({"fp8": history} if history else {})}


def common_now(plan: Plan, state: TrainState) -> dict[str, Any]:
    """The plan's `common` with what the optimizer has now: rates, step."""
    return {**plan.common, "optimizer": copy.deepcopy(_described(state))} if plan.reusable else plan.common


def boxes(first: int, last: int, shape: Sequence[int]) -> list[Place]:
    """The elements [first, last) of a row-major array as boxes, in order; at most 2 * axes - 1."""
    if first >= last:
        return []
    if len(shape) < 2:
        return [((first,) * len(shape), (last - first,) * len(shape))]
    row, others = prod(shape[1:]), tuple(shape[1:])
    head, tail = -(-first // row), last // row  # whole rows
    if head > tail:
        return _within(tail, first - tail * row, last - tail * row, others)
    found = _within(head - 1, first - (head - 1) * row, row, others) if first < head * row else []
    if head < tail:
        found.append(((head, *(0 for _ in others)), (tail - head, *others)))
    return found + _within(tail, 0, last - tail * row, others)


def _within(row: int, first: int, last: int, shape: tuple[int, ...]) -> list[Place]:
    return [((row, *start), (1, *size)) for start, size in boxes(first, last, shape)]


def _distributed(state: TrainState) -> list[DistributedOptimizer]:
    """Its optimizers where the state is spread over the data-parallel ranks; else nothing."""
    parts = state.optimizer.chained_optimizers
    return list(parts) if all(isinstance(part, DistributedOptimizer) for part in parts) else []


def _described(state: TrainState) -> Any:
    """Of distributed optimizers, what Megatron-Core's sharded_state_dict has beside their tensors."""
    parts = _distributed(state)
    if len(parts) > 1:
        state.optimizer._synchronize_steps()
    kind = METADATA["distrib_optim_sharding_type"]
    every = [{**part.state_dict(), "param_state": {}, "param_state_sharding_type": kind} for part in parts]
    return every[0] if len(every) == 1 else dict(enumerate(every))


def _shards(optimizer: DistributedOptimizer, entries: dict[int, Any]) -> Iterator[Piece]:
    """This rank's part of masters and moments: of each parameter a range of its elements, cut into boxes.

    entries: Megatron-Core's description of each parameter, by the parameter's id.
    """
    for ranges in optimizer.gbuf_ranges:
        for buckets in ranges.values():
            for bucket in buckets:
                for parameter, places in bucket["param_map"].items():
                    mine = places["param"]
                    tensors = optimizer._get_main_param_and_optimizer_states(parameter)
                    for part, begin in _parts(entries[id(parameter)], parameter.shape):
                        for name, tensor in tensors.items():
                            if name != "step":
                                yield from _cut(part, begin, mine.start, tensor.detach().view(-1), name)


def _parts(entry: Any, shape: torch.Size) -> list[tuple[ShardedTensor, int]]:
    """The checkpoint's tensors that a parameter is part of (gate and up are two), each with the element at which its
    part begins. Of the replicas of a parameter one writes; which data-parallel rank does is another matter."""
    blank = torch.empty(shape, device="meta")
    replica = (*entry.replica_id[:2], 0)  # (pipeline, tensor, data)
    if isinstance(entry, ShardedTensorFactory):
        built = list(nested_values(replace(entry, data=blank, replica_id=replica).build()))
    else:
        built = [replace(entry, data=blank, dtype=blank.dtype, replica_id=replica)]
    if not all(part.data.is_contiguous() for part in built):
        raise RuntimeError(f"{entry.key}: Megatron-Core cuts this parameter across its rows, which is not provided for")
    return [(part, part.data.storage_offset()) for part in built if is_main_replica(part.replica_id)]


def _cut(part: ShardedTensor, begin: int, at: int, shard: Tensor, name: str) -> Iterator[Piece]:
    """The boxes of one tensor. part: begins at element `begin` of the parameter. shard: the parameter's elements from
    `at` on. name: which state it is."""
    first, last = max(begin, at), min(begin + prod(part.local_shape), at + len(shard))
    local = (1,) * part.prepend_axis_num + tuple(part.local_shape)
    done = first - at
    for start, size in boxes(first - begin, last - begin, local):
        offset = tuple(a + b for a, b in zip(part.global_offset, start, strict=True))
        count = prod(size)
        values = shard[done : done + count].view(size)
        yield Piece(f"optimizer.state.{name}.{part.key}", tuple(part.global_shape), offset, values)
        done += count


def _addresses(state: TrainState) -> tuple[int, ...]:
    found = [t.data_ptr() for m in state.modules for ts in (m.parameters(), m.buffers()) for t in ts]
    for optimizer in _distributed(state):
        inner = optimizer.optimizer
        for group in inner.param_groups:
            for parameter in group["params"]:
                found.append(parameter.data_ptr())
                found += [v.data_ptr() for k, v in inner.state.get(parameter, {}).items() if k != "step"]
    return tuple(found)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
