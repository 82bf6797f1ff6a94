"""A swapped reference gives a resident one's run, to the last bit, on every grid and from any place of the run."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import run_ranks
from tiny import random_groups, write_llama

from megadpo.cli import main
from megadpo.data.stream import Scored
from megadpo.objectives.unpaired import KTO
from megadpo.parallel.context import grid
from megadpo.train.swapped import SwappedPortions
from train.engine import Case, build, reference_of, run
from train.test_kinds_grid import unpaired
from train.test_run import numbers, run_file

VOCAB = 67


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = write_llama(tmp_path_factory.mktemp("swapped") / "llama", layers=4, vocab=VOCAB)
    return Case(folder, random_groups(20, vocab=VOCAB), steps=5, batch=4, evaluated=True, resident=True)


def same(resident: dict[str, Any], swapped: dict[str, Any]) -> None:
    assert swapped["sums"] == resident["sums"]
    assert swapped["grad_norms"] == resident["grad_norms"]
    assert swapped["held_out"] == resident["held_out"]
    assert swapped["weights"].keys() == resident["weights"].keys()
    assert all(torch.equal(swapped["weights"][key].data, x.data) for key, x in resident["weights"].items())


@pytest.mark.parametrize(
    ("ranks", "grid_of"),
    [
        (1, {"grain": 1}),
        (2, {"distributed": True, "overlap": True, "bucket_size": 500}),
        (4, {"tensor": 2, "pipeline": 2, "virtual": 2, "sequence": True}),
    ],
)
def test_the_same_run_to_the_bit(base: Case, ranks: int, grid_of: dict[str, Any]) -> None:
    """K = 2 over 5 steps: the last visit is for one."""
    resident = replace(base, **grid_of)
    cases = [resident, replace(resident, resident=False, swap_steps=2), replace(resident, swap_steps=9)]
    for got, *others in run_ranks(ranks, run, cases):
        assert any(abs(sums.metrics["rewards/margins"]) > 0 for sums in got["sums"])
        for other in others:
            same(got, other)


def test_mismatched_responses_too(base: Case) -> None:
    """KTO's z is a mean over responses to other prompts, which the reference scores as well."""
    kto = replace(base, store=unpaired(20), objective=KTO(), tensor=2, batch=8, steps=2)
    for resident, swapped in run_ranks(2, run, [kto, replace(kto, swap_steps=2)]):
        same(resident, swapped)
        assert resident["sums"][1].loss != resident["sums"][0].loss


def visits(device: torch.device, case: Case) -> dict[str, Any]:
    """When weights come and go."""
    found: dict[str, Any] = {"visits": []}
    with grid(case.parallel, device, 1) as context:
        _, stream = build(case, context)
        chunks = reference_of(case, context)
        before = [p.detach().clone() for chunk in chunks for p in chunk.parameters()]
        place = 0
        portions = SwappedPortions(
            Scored(stream, None), 4, 20, context, chunks, steps=2, on_visit=lambda: found["visits"].append(place)
        )

        def held() -> int:
            return sum(p.numel() for chunk in chunks for p in chunk.parameters())

        found["at_home"] = held()
        for place in (0, 4, 8, 12, 16):
            part = portions.at(place)
            assert all(batch.reference_S is not None for batch in part.batches) or not context.holds_loss
            found.setdefault("between", []).append(held())
        with portions.reference() as here:
            after = [p.detach().clone() for chunk in here for p in chunk.parameters()]
        found["unchanged"] = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        place = 4  # as after going back to a checkpoint
        portions.at(place)
        portions.prepare(8)  # scored already
        found["not_come"] = portions._here is None
        portions.prepare(20)  # the run's end
        found["nor_then"] = portions._here is None
        portions.prepare(12)
        found["come"] = portions._here is not None
        place = 12
        one, [two] = portions.at(place).batches, [portions.plain(place)]
        found["same_groups"] = two is not None and [b.groups for b in one] == [b.groups for b in two.batches]
    return found


def test_weights_come_once_for_some_steps_and_leave(base: Case) -> None:
    for found in run_ranks(2, visits, replace(base, pipeline=2)):
        assert found["visits"] == [0, 8, 16, 4, 12]
        assert found["at_home"] == 0
        assert set(found["between"]) == {0}
        assert found["unchanged"]
        assert found["not_come"]
        assert found["nor_then"]
        assert found["come"]
        assert found["same_groups"]


def test_a_run_goes_on_in_the_middle_of_a_visits_steps(tmp_path: Path, shared: Path) -> None:
    """Stopped after 3 of 7 steps with visits for 4; a resident reference beside it."""
    path = run_file(
        tmp_path,
        shared,
        train={"max_steps": 7},
        optimizer={"lr_scheduler_type": "constant"},
        parallel={"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 2},
    )
    swapped = ["reference.mode=swapped", "reference.swap_steps=4"]
    assert main(["train", str(path), "reference.mode=resident", f"run_dir={tmp_path / 'resident'}"]) == 0
    assert main(["train", str(path), *swapped, "train.max_steps=3"]) == 0
    assert main(["train", str(path), *swapped]) == 0
    got = numbers(tmp_path / "run")
    assert len(got) == 7
    assert got == numbers(tmp_path / "resident")
