"""A store of this start alone, where torchrun keeps one store for all its starts of the ranks.

torchrun's agent has the store, and a start finds in it what the start before left: addresses of ranks that are gone,
answers to questions of that start. torch gives a start no keys of its own (torch/distributed/rendezvous.py,
_create_c10d_store). Its restart count does not tell starts apart either: an agent counts only failures of its own ranks
(elastic/agent/server/api.py, _invoke_run), so on several nodes the ranks of one start have several counts.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from datetime import timedelta
from urllib.parse import urlsplit

import torch.distributed as dist

from megadpo.errors import MachineError


def agent_store(
    environment: Mapping[str, str], rank: int, world_size: int, init_method: str, timeout: timedelta
) -> dist.Store | None:
    """None where torchrun's agent has no store for the ranks: then they make one of their own, new with every start."""
    place = urlsplit(init_method)
    if environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or place.scheme != "tcp":
        return None
    assert place.hostname is not None
    assert place.port is not None
    store = dist.TCPStore(place.hostname, place.port, is_master=False, timeout=timeout)
    return dist.PrefixStore(f"start {agreed(store, rank, world_size, timeout)}", store)


def agreed(store: dist.Store, rank: int, world_size: int, timeout: timedelta) -> str:
    """A name for this start that no other has, the same on every rank: rank 0's, given to each by its own question.

    A rank asks under a name of its own, new with every start, so an answer is never an earlier start's. Rank 0 answers
    whatever question a rank has last asked, an earlier start's too, until all of this start have heard it. torchrun has
    ended every rank of a start before it begins the next. Raises MachineError after `timeout`.
    """
    mine, end = uuid.uuid4().hex, time.monotonic() + timeout.total_seconds()

    def waited(who: str) -> None:
        if time.monotonic() > end:
            raise MachineError(
                f"rank {rank} waited {timeout.total_seconds():.0f} s at torchrun's store for {who}; see the other "
                "ranks' logs, and start again"
            )
        time.sleep(0.05)

    if rank:
        store.set(f"question of rank {rank}", mine)
        while not store.check([f"answer to {mine}"]):
            waited("rank 0")
        start = store.get(f"answer to {mine}").decode()
        store.add(f"heard {start}", 1)
        return start
    answered: dict[int, bytes] = {}
    while store.add(f"heard {mine}", 0) < world_size - 1:
        for other in range(1, world_size):
            key = f"question of rank {other}"
            if store.check([key]) and (question := store.get(key)) != answered.get(other):
                store.set(f"answer to {question.decode()}", mine)
                answered[other] = question
        waited("the other ranks")
    return mine
