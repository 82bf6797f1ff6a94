"""What a step does, seen from the dispatcher: collectives, floating-point operations, live bytes. It sees real and fake
tensors alike, so what the planner says of a rank and what a rank really did are counted by the same code.

Live bytes are those of the storages that operations returned and that something still refers to. What an operation
takes for itself and gives back before it returns is not seen; nor are the allocator's rounding and fragmentation.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megadpo.parallel.context import ParallelContext
from megadpo.plan.numbers import Collective, Group, Memory

KINDS = {
    "allgather": "all_gather",
    "_allgather_base": "all_gather",
    "allgather_into_tensor_coalesced": "all_gather",
    "_reduce_scatter_base": "reduce_scatter",
    "reduce_scatter": "reduce_scatter",
    "reduce_scatter_tensor_coalesced": "reduce_scatter",
    "allreduce": "all_reduce",
    "allreduce_coalesced": "all_reduce",
    "alltoall_base": "all_to_all",
    "alltoall": "all_to_all",
    "broadcast": "broadcast",
    "send": "send",
    "recv": "recv",
}
"""Operations of torch's c10d namespace (without the underscore at the end), and what they are."""

WORKING = "activations"
PARTS = tuple(field.name for field in fields(Memory))


class Recorder(TorchDispatchMode):
    """Enter it last, around a step. `claim` says what storages that are there before belong to."""

    def __init__(self, context: ParallelContext) -> None:
        super().__init__()
        self._groups = group_names(context)
        self._stages = context.pipeline_size
        self._calls: Counter[tuple[str, Group, int]] = Counter()
        self._bytes: Counter[tuple[str, Group, int]] = Counter()
        self._part: dict[int, str] = {}
        """By storage: what its bytes count as."""
        self._references: dict[int, weakref.ref] = {}
        self._live = dict.fromkeys(PARTS, 0)
        self._now = self._most = 0
        self._at_peak = dict(self._live)
        self._doing = WORKING
        self.flops = 0.0

    def claim(self, tensors: Iterable[Tensor], part: str) -> None:
        """From now on these tensors' storages count as `part`, unless they are claimed already."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            known = self._part.get(_key(storage))
            if known is None:
                self._add(storage, part)
            elif known in (WORKING, "logits"):
                size = storage.nbytes()
                self._live[known] -= size
                self._live[part] += size
                self._part[_key(storage)] = part

    @contextmanager
    def counting_as(self, part: str) -> Iterator[None]:
        """What is new inside counts as `part`."""
        before, self._doing = self._doing, part
        try:
            yield
        finally:
            self._doing = before

    def start(self) -> None:
        """Forget calls, operations and the peak; what is live stays."""
        self._calls.clear()
        self._bytes.clear()
        self.flops = 0.0
        self._most, self._at_peak = self._now, dict(self._live)

    @property
    def live(self) -> Mapping[str, int]:
        """Bytes by part, now."""
        return dict(self._live)

    @property
    def peak(self) -> Memory:
        """At the fullest instant since `start`."""
        return Memory(**self._at_peak)

    @property
    def collectives(self) -> tuple[Collective, ...]:
        return tuple(
            Collective(kind, group, ranks, self._calls[kind, group, ranks], self._bytes[kind, group, ranks])
            for kind, group, ranks in sorted(self._calls)
        )

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "c10d":
            self._count_call(func, args)
        result = func(*args, **kwargs)
        self.flops += _product(func, args)
        for leaf in (result,) if isinstance(result, Tensor) else tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.layout is torch.strided:
                storage = leaf.untyped_storage()
                if _key(storage) not in self._part:
                    self._add(storage, self._doing)
        return result

    def _add(self, storage: torch.UntypedStorage, part: str) -> None:
        key, size = _key(storage), storage.nbytes()
        self._part[key] = part

        self._references[key] = weakref.ref(storage, lambda _, key=key, size=size: self._free(key, size))  # type: ignore[misc]
        self._live[part] += size
        self._now += size
        if self._now > self._most:
            self._most, self._at_peak = self._now, dict(self._live)

    def _free(self, key: int, size: int) -> None:
        self._live[self._part.pop(key)] -= size
        self._now -= size
        del self._references[key]

    def _count_call(self, func: Any, args: tuple) -> None:
        kind = KINDS.get(func._schema.name.removeprefix("c10d::").rstrip("_"))
        group = next((found for found in map(_process_group, args) if found is not None), None)
        if kind is None or group is None or group.size() == 1:  # a barrier; nobody to talk to
            return
        name, ranks = self._groups.get(group.group_name), group.size()
        assert name is not None, f"a {kind} in a group that is none of the grid's: {group.group_desc}"
        if kind in ("send", "recv"):  # of two stages, Megatron-Core lets one direction go through the world's group
            name, ranks = "pipeline", self._stages
        sizes = [sum(t.nbytes for t in tree_leaves(arg) if isinstance(t, Tensor)) for arg in args[:2]]
        self._calls[kind, name, ranks] += 1
        self._bytes[kind, name, ranks] += max(sizes)


def _product(func: Any, args: tuple) -> float:
    """Operations of a matrix product, a multiply-add being two; 0 for anything else.

    torch makes a linear layer a product of matrices, or a batch of them in which all have the same weight, by strides
    that real and fake tensors need not share. Other batches are attention's heads."""
    aten, packet = torch.ops.aten, func._overloadpacket
    if packet is aten.mm or (packet is aten.bmm and args[1].stride(0) == 0):
        left, right = args[:2]
    elif packet is aten.addmm or packet is aten.addmm_:
        left, right = args[1:3]
    else:
        return 0.0
    return 2.0 * left.numel() * right.shape[-1]


def _key(storage: torch.UntypedStorage) -> int:
    return storage._cdata


def _process_group(value: Any) -> dist.ProcessGroup | None:
    if isinstance(value, dist.ProcessGroup):
        return value
    if isinstance(value, torch.ScriptObject):
        try:
            return dist.ProcessGroup.unbox(value)
        except (RuntimeError, TypeError):  # the reduction, or a communicator's options
            return None
    return None


def group_names(context: ParallelContext) -> dict[str, Group]:
    """torch's name of every process group of the grid -> which of the grid's groups it is."""
    groups = context.groups
    assert dist.group.WORLD is not None
    named: list[tuple[Any, Group]] = [
        (groups.tp, "tensor"),
        (groups.pp, "pipeline"),
        (groups.dp, "data"),
        (groups.dp_cp, "data"),
        (groups.intra_dp_cp, "data"),
        (groups.expt_dp, "expert data"),
        (groups.intra_expt_dp, "expert data"),
        (groups.ep, "expert"),
        (groups.tp_ep, "expert"),
        (groups.expt_tp, "tensor"),
        (groups.embd, "embedding"),
        (groups.pos_embd, "embedding"),
        (groups.mp, "model"),
        (groups.tp_ep_pp, "model"),
        (groups.intra_dist_opt, "world"),
        (dist.group.WORLD, "world"),
    ]
    names: dict[str, Group] = {}
    for group, name in named:
        if isinstance(group, dist.ProcessGroup):
            names.setdefault(group.group_name, name)
    return names
