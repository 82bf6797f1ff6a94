"""A swapped reference on a GPU: a resident one's numbers, pinned memory, and a copy that hides behind other work."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models import small
from processes import on_gpus
from train.engine import Case, build, reference_of, run

from megadpo.data.stream import Scored
from megadpo.parallel.context import grid
from megadpo.train.swapped import SwappedPortions


def test_the_same_numbers(tmp_path: Path) -> None:
    case = small(tmp_path, resident=True)
    [[resident, swapped]] = on_gpus(1, run, [case, replace(case, resident=False, swap_steps=2)])
    assert swapped["sums"] == resident["sums"]
    assert swapped["grad_norms"] == resident["grad_norms"]


def milliseconds(device: torch.device, case: Case) -> dict[str, float]:
    """Of a copy alone, of as many products alone as take about as long, of both at once."""
    with grid(case.parallel, device, 1) as context:
        _, stream = build(case, context)
        chunks = reference_of(case, context)
        big = torch.nn.Parameter(torch.zeros(2**29, dtype=torch.uint8, device=device), requires_grad=False)
        chunks[0].register_parameter("big", big)
        portions = SwappedPortions(Scored(stream, None), case.batch, 10 * case.batch, context, chunks, 2)
        assert all(home.is_pinned() for home in portions._home)
        a = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)

        count = 20

        def products() -> None:
            for _ in range(count):
                a @ a

        def copy() -> None:
            portions.prepare(0)

        def both() -> None:
            copy()
            products()

        def timed(work: Callable[[], None]) -> float:
            torch.cuda.synchronize()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            work()
            torch.cuda.current_stream().wait_stream(portions._stream)
            end.record()
            torch.cuda.synchronize()
            portions._leave()
            return start.elapsed_time(end)

        timed(both)  # warm
        found = {"copy": timed(copy)}
        count = max(1, round(count * found["copy"] / timed(products)))
        return found | {"products": timed(products), "both": timed(both)}


def test_the_copy_runs_beside_other_work(tmp_path: Path) -> None:
    """One after the other they would take twice as long as at once."""
    [took] = on_gpus(1, milliseconds, small(tmp_path))
    assert took["products"] == pytest.approx(took["copy"], rel=0.3), took
    assert took["both"] < 0.8 * (took["copy"] + took["products"]), took
    assert took["both"] == pytest.approx(max(took["copy"], took["products"]), rel=0.5), took
