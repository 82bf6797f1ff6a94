"""Collectives and messages, timed where they happen, and how much of that time was waiting for other ranks.

Every call of torch.distributed comes down to a method of ProcessGroup, and every wait for one to `Work.wait`, whoever
calls them and under whatever name it was imported; for the length of a with-block these are wrapped. What is seen is
what a rank's main stream (on a CPU: the process) spends in a call or in waiting for one: communication that overlaps
with computing costs nothing and counts nothing.

Nobody gets through a collective before the last rank has come, and no clocks of two machines are compared: of one
collective, the rank that spent the least in it came last, and its time is what moving the bytes costs. What the other
ranks spent beyond that is waiting. The same holds for a message and its two ends.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.distributed as dist

from megadpo.observe.parts import Parts

COLLECTIVES = (
    "_allgather_base",
    "_reduce_scatter_base",
    "all_gather_single",
    "all_gather_single_coalesced",
    "all_to_all_single",
    "allgather",
    "allgather_coalesced",
    "allgather_into_tensor_coalesced",
    "allreduce",
    "allreduce_coalesced",
    "alltoall",
    "alltoall_base",
    "barrier",
    "broadcast",
    "gather",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_single",
    "reduce_scatter_single_coalesced",
    "reduce_scatter_tensor_coalesced",
    "scatter",
)
"""Of ProcessGroup, in the versions of torch from 2.10 on; those that one lacks are left out."""
MESSAGES = ("send", "recv")
TOGETHER = ("_start_coalescing", "_end_coalescing")

Message = tuple[str, int, int]
"""Group, from, to; ranks in the group."""


@dataclass
class Calls:
    """The calls of this rank, by number. Messages that go together (NCCL's batched ones) are one call."""

    count: int = 0
    collectives: dict[str, list[int]] = field(default_factory=dict)
    """By group, the numbers of its collectives in order: the same collectives on all its ranks."""
    messages: dict[Message, list[int]] = field(default_factory=dict)
    """The numbers of the calls that the messages of one rank to another went with, in order."""
    groups: dict[str, Any] = field(default_factory=dict)
    together: dict[str, int] = field(default_factory=dict)
    """By group, the call that its messages go with just now."""
    handles: weakref.WeakKeyDictionary[Any, int] = field(default_factory=weakref.WeakKeyDictionary)
    """The call that each handle is of."""

    def new(self) -> int:
        self.count += 1
        return self.count

    def collective(self, group: Any) -> int:
        """The number of a collective that begins."""
        number, name = self.new(), group.group_name
        self.groups[name] = group
        self.collectives.setdefault(name, []).append(number)
        return number

    def message(self, group: Any, source: int, target: int) -> int:
        """The number of the call that a message goes with."""
        name = group.group_name
        number = self.together[name] if name in self.together else self.new()
        self.messages.setdefault((name, source, target), []).append(number)
        return number


@contextmanager
def watched(parts: Parts) -> Iterator[Calls]:
    """Time what this process's ranks say to each other, as the part `communication`."""
    calls, kind, work = Calls(), cast(Any, dist.ProcessGroup), cast(Any, dist.Work)
    # as they stand in the class: what getattr gives of a method of pybind11 does not bind when it is put back
    before = {name: vars(kind)[name] for name in (*COLLECTIVES, *MESSAGES, *TOGETHER) if name in vars(kind)}
    wait_before = vars(work)["wait"]
    wait = work.wait

    def timed(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(group: Any, *args: Any, **kwargs: Any) -> Any:
            if name == "send":
                number = calls.message(group, group.rank(), args[1])
            elif name == "recv":
                number = calls.message(group, args[1], group.rank())
            elif name == "_start_coalescing":
                number = calls.together[group.group_name] = calls.new()
            elif name == "_end_coalescing":
                number = calls.together.pop(group.group_name)
            else:
                number = calls.collective(group)
            with parts.part("communication", number):
                handle = original(group, *args, **kwargs)
            if handle is not None:
                calls.handles[handle] = number
            return handle

        return call

    def timed_wait(handle: Any, *args: Any, **kwargs: Any) -> Any:
        with parts.part("communication", calls.handles.get(handle)):
            return wait(handle, *args, **kwargs)

    try:
        for name in before:
            setattr(kind, name, timed(name, getattr(kind, name)))
        work.wait = timed_wait
        yield calls
    finally:
        for name, original in before.items():
            setattr(kind, name, original)
        work.wait = wait_before


def waited(calls: Calls, seconds: dict[int, float], pipeline: Any) -> float:
    """Of the seconds of this rank's calls, those spent on waiting for others. Every rank calls it at the same place.

    seconds: by number. pipeline: the group whose ranks send each other messages; other groups' are not looked at.
    """
    total = 0.0
    # One order for all ranks, or groups that share ranks would wait for each other.
    for name in sorted(calls.collectives):
        mine = [seconds.get(number, 0.0) for number in calls.collectives[name]]
        total += sum(mine) - sum(_least(mine, calls.groups[name]))
    if pipeline.size() > 1:
        own = {
            key: [seconds.get(number, 0.0) for number in numbers]
            for key, numbers in calls.messages.items()
            if key[0] == pipeline.group_name
        }
        every: list[Any] = [None] * pipeline.size()
        dist.all_gather_object(every, own, group=pipeline)
        moving: dict[int, float] = {}
        for key, mine in own.items():
            _, source, target = key
            other = every[target if source == pipeline.rank() else source].get(key, [])
            for number, here, there in zip(calls.messages[key], mine, other, strict=False):
                moving[number] = max(moving.get(number, 0.0), min(here, there))
        total += sum(seconds.get(number, 0.0) - least for number, least in moving.items())
    return total


def _least(mine: list[float], group: Any) -> list[float]:
    """Of each collective, what the fastest rank spent."""
    on_gpu = dist.get_backend(group) == "nccl"
    least = torch.tensor(mine, dtype=torch.float64, device=torch.cuda.current_device() if on_gpu else "cpu")
    dist.all_reduce(least, op=dist.ReduceOp.MIN, group=group)
    return [float(value) for value in least.tolist()]
