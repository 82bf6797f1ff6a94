"""What a save writes: Megadpo's own writer against Megatron-Core's, and a copy that later steps do not reach."""

import itertools
import time
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distributed import run_ranks
from megatron.core import dist_checkpointing
from tiny import random_groups, write_llama
from train.engine import Case, build

from megadpo import checkpoint
from megadpo.checkpoint import saving as writer
from megadpo.checkpoint.plan import boxes, fits
from megadpo.checkpoint.saving import Saving, Stored, _metadata
from megadpo.convert.torch_dist import TorchDist
from megadpo.data.packing import Budget
from megadpo.parallel.context import grid
from megadpo.train.optimizer import set_learning_rate, settled
from megadpo.train.step import train_step

VOCAB = 67


@pytest.fixture
def case(tmp_path: Path) -> Case:
    folder = write_llama(tmp_path / "llama", layers=3, vocab=VOCAB, tied=True)
    return Case(folder, random_groups(13, vocab=VOCAB), distributed=True, budget=Budget(64), batch=5)


class Run:
    """A case in this rank, a step at a time."""

    def __init__(self, case: Case, context: Any) -> None:
        self.case, self.context = case, context
        self.state, self.stream = build(case, context)
        self.column = np.zeros(len(case.store.response_lengths), dtype=np.float32)

    def step(self) -> None:
        set_learning_rate(self.state.optimizer, 1e-2)
        groups = self.stream.next_groups(self.state.consumed, self.case.batch)
        batches = self.stream.batches(groups, self.context.data_rank, self.column)
        train_step(self.state, batches, self.case.objective, None, self.context)

    def save(self, folder: Path, background: bool, before: Saving | None = None) -> Saving:
        return Saving(self.state, folder, 10, 9, self.context, background, before)


def both_ways(device: torch.device, cases: list[Case], folder: Path) -> None:
    """Megatron-Core's save and ours, of the same state."""
    for number, case in enumerate(cases):
        with grid(case.parallel, device, 0) as context:
            run = Run(case, context)
            run.step()
            checkpoint.save(run.state, folder / f"{number}", 10, 2, context)
            theirs = folder / f"{number}-theirs"
            if context.is_first:
                theirs.mkdir(parents=True)
            torch.distributed.barrier()
            modules = {
                f"model{i}": module.sharded_state_dict(metadata=dict(checkpoint.METADATA))
                for i, module in enumerate(run.state.modules)
            }
            with settled(run.state.chunks):
                optimizer = run.state.optimizer.sharded_state_dict(modules, metadata=dict(checkpoint.METADATA))
                content = dict(checkpoint.METADATA)
                dist_checkpointing.save({**modules, "optimizer": optimizer}, str(theirs), content_metadata=content)


def test_the_same_tensors_as_megatron_core_writes(case: Case, tmp_path: Path) -> None:
    """Key by key, value by value, and what stands beside the tensors; with parts that end in the middle of a row, with
    gate and up apart, in bfloat16, with an optimizer that is not spread out."""
    cases = [
        replace(case, tensor=2, sequence=True, overlap=True, bucket_size=600),
        replace(case, pipeline=2, virtual=None, dtype="bfloat16"),
        replace(case, bucket_size=1000),
        replace(case, distributed=False),
    ]
    run_ranks(4, both_ways, cases, tmp_path)
    for number in range(len(cases)):
        ours = checkpoint.latest(tmp_path / f"{number}")
        theirs = tmp_path / f"{number}-theirs"
        assert ours is not None
        mine, other = TorchDist(ours), TorchDist(theirs)
        assert mine.tensors.keys() == other.tensors.keys()
        for key in other.tensors:
            shape = other.shape(key)
            assert (mine.shape(key), mine.dtype(key)) == (shape, other.dtype(key))
            zeros = [0] * len(shape)
            assert torch.equal(mine.read(key, zeros, shape), other.read(key, zeros, shape)), key
        common = [torch.load(folder / "common.pt", weights_only=True) for folder in (ours, theirs)]
        for one in common:
            one["optimizer"].pop("param_state", None)  # an empty place for the tensors
        assert common[0] == common[1]
    cut = TorchDist(checkpoint.latest(tmp_path / "2") or Path()).tensors
    assert any(len(stored.chunks) > 3 for stored in cut.values()), "no part ended in the middle of a row"


def overtaken(device: torch.device, case: Case, folder: Path) -> dict[str, Any]:
    """Two saves in the background, training going on at once, and the same at once beside them."""
    with grid(case.parallel, device, 0) as context:
        run = Run(case, context)
        run.step()
        copy = Saving._copy

        def slowly(self: Saving, ready: Any) -> Any:
            time.sleep(0.5)
            return copy(self, ready)

        Saving._copy = slowly  # type: ignore[method-assign]
        before, plans = None, []
        for _ in range(3):
            run.save(folder / "at once", background=False).finish()
            saving = run.save(folder / "background", True, before)
            run.step()
            run.step()
            saving.finish()
            before = saving
            plans.append(id(saving._kept.plan))
        return {"plans": len(set(plans)), "right": fits(saving._kept.plan, run.state)}


DELAYED = {"fp8_format": "hybrid", "fp8_recipe": "delayed", "fp8_emulation": True}


@pytest.mark.parametrize("options", [{}, DELAYED], ids=["plain", "delayed FP8 scaling"])
def test_a_save_in_the_background_has_the_state_of_its_step(
    case: Case, tmp_path: Path, options: dict[str, Any]
) -> None:
    """However slow the copy: the next update waits for it, and what forward passes change (the numbers that delayed
    scaling remembers) was copied before. One plan serves all saves."""
    split = replace(case, tensor=2, sequence=True, model_options=options, dtype="bfloat16" if options else "float32")
    for result in run_ranks(2, overtaken, split, tmp_path):
        assert result["plans"] == 1
        assert result["right"]
    for name in ("step-00000001", "step-00000003", "step-00000005"):
        one, other = (tmp_path / way / "checkpoints" / name for way in ("at once", "background"))
        assert not checkpoint.damage(other)
        files = sorted(path.name for path in one.iterdir())
        assert files == sorted(path.name for path in other.iterdir())
        for file in files:
            if file != "manifest.json":
                assert (one / file).read_bytes() == (other / file).read_bytes(), file
        assert any("fp8_history" in key for key in TorchDist(other).tensors) == bool(options)


def replaced(device: torch.device, case: Case) -> list[bool]:
    with grid(case.parallel, device, 0) as context:
        run = Run(case, context)
        run.step()
        plan = writer.make_plan(run.state)
        found = [fits(plan, run.state)]
        run.step()
        found.append(fits(plan, run.state))
        [part] = run.state.optimizer.chained_optimizers
        inner = part.optimizer.state
        first = next(iter(inner))
        inner[first]["exp_avg"] = inner[first]["exp_avg"].clone()
        found.append(fits(plan, run.state))
        return found


def test_a_plan_is_made_again_where_a_tensor_was_replaced(case: Case) -> None:
    assert run_ranks(1, replaced, case) == [[True, True, False]]


def test_boxes_are_the_range() -> None:
    """Every range of several small arrays: in order, disjoint, and together what was asked for."""
    for shape in [(), (7,), (3, 4), (1, 5), (2, 3, 4), (1, 2, 1, 3)]:
        numbers = np.arange(prod(shape)).reshape(shape)
        for first, last in itertools.combinations(range(prod(shape) + 1), 2):
            found = boxes(first, last, shape)
            parts = [numbers[tuple(slice(a, a + n) for a, n in zip(*box, strict=True))].ravel() for box in found]
            assert np.concatenate(parts).tolist() == list(range(first, last))
            assert len(found) <= max(1, 2 * len(shape) - 1)
        assert boxes(2, 2, shape) == []


def test_pieces_that_do_not_make_up_the_whole() -> None:
    """Such a checkpoint must not get its name."""

    def piece(start: int, rows: int) -> Stored:
        return Stored("weight", (4, 2), (start, 0), (rows, 2), torch.float32, "__0_0.distcp", 0, 1)

    assert len(_metadata([[piece(0, 1)], [piece(1, 3)]]).storage_data) == 2
    with pytest.raises(RuntimeError, match="weight: 6 of its 8 values"):
        _metadata([[piece(0, 1)], [piece(1, 2)]])
    with pytest.raises(RuntimeError, match="written twice"):
        _metadata([[piece(0, 2)], [piece(0, 2)]])
