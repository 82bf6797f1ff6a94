"""One store for several starts of the ranks, as torchrun's agent has it: each start agrees on a name of its own."""

import threading
from datetime import timedelta

import pytest
import torch.distributed as dist

from megadpo.errors import MachineError
from megadpo.parallel.meeting import agent_store, agreed

SOON = timedelta(seconds=20)


def start(store: dist.Store, ranks: int) -> set[str]:
    """The names that the ranks of one start got."""
    names: list[str] = []
    threads = [
        threading.Thread(target=lambda rank=rank: names.append(agreed(store, rank, ranks, SOON)))
        for rank in reversed(range(ranks))  # rank 0 last
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(names) == ranks
    return set(names)


def test_every_start_has_a_name_of_its_own() -> None:
    """Also after one whose rank 1 had only asked when it died, and after one with more ranks."""
    store = dist.HashStore()
    first = start(store, 4)
    store.set("question of rank 1", "of one that died")
    second, third = start(store, 3), start(store, 1)
    assert [len(names) for names in (first, second, third)] == [1, 1, 1]
    assert len(first | second | third) == 3


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_never_comes_is_waited_for_no_longer_than_that(rank: int) -> None:
    with pytest.raises(MachineError, match=rf"rank {rank} waited 0 s at torchrun's store for"):
        agreed(dist.HashStore(), rank, 2, timedelta(seconds=0.2))


def test_only_torchruns_own_store_needs_a_name() -> None:
    agent = {"TORCHELASTIC_USE_AGENT_STORE": "True"}
    assert agent_store({}, 0, 1, "tcp://localhost:1", SOON) is None
    assert agent_store({"TORCHELASTIC_USE_AGENT_STORE": "False"}, 0, 1, "tcp://localhost:1", SOON) is None
    assert agent_store(agent, 0, 1, "file:///tmp/rendezvous", SOON) is None
