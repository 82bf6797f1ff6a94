"""What rank 0 does for all: its text reaches every rank, and so does its mistake."""

import time
from collections.abc import Callable

import pytest
import torch
from distributed import run_ranks

from megadpo.errors import DataError, MachineError, MegadpoError
from megadpo.parallel.context import from_first_rank


def ask(device: torch.device, mistake: type[Exception] | None) -> str:
    def work(sign: Callable[[], None]) -> str:
        sign()
        time.sleep(0.5)
        if mistake is not None:
            raise mistake("pairs.jsonl:3: not valid JSON")
        return "made by rank 0"

    heard: list[int] = []
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    try:
        text = from_first_rank(rank, size, work, lambda: heard.append(1))
        return text if rank == 0 or heard else "no sign of progress was heard"
    except (MegadpoError, KeyError) as error:
        return f"{type(error).__name__}: {error}"


def test_every_rank_gets_the_text() -> None:
    assert run_ranks(3, ask, None) == ["made by rank 0"] * 3


@pytest.mark.parametrize(("mistake", "others"), [(DataError, DataError), (KeyError, MachineError)])
def test_every_rank_gets_the_mistake(mistake: type[Exception], others: type[Exception]) -> None:
    first, *rest = run_ranks(3, ask, mistake)
    assert first.startswith(f"{mistake.__name__}: ")
    assert len(rest) == 2
    assert all(said.startswith(f"{others.__name__}: ") and "pairs.jsonl:3" in said for said in rest)
