"""Checkpoints: resume to the bit on the same grid, element by element on another, complete or not there."""

import resource
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distributed import run_ranks
from families_table import write
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from tiny import random_groups, write_llama
from train.engine import Case, build, pieces

from megadpo import checkpoint
from megadpo.checkpoint.folder import Saved, begin, finish, keep_newest, read_state
from megadpo.data.packing import Budget
from megadpo.errors import CheckpointError, StorageError
from megadpo.parallel.context import grid
from megadpo.train.optimizer import set_learning_rate, settled
from megadpo.train.score import score_groups
from megadpo.train.step import train_step

VOCAB = 67


@pytest.fixture
def case(tmp_path: Path) -> Case:
    folder = write_llama(tmp_path / "llama", layers=5, vocab=VOCAB, tied=True)
    return Case(folder, random_groups(13, vocab=VOCAB), distributed=True, budget=Budget(64), batch=5)


def train(
    device: torch.device, case: Case, run_dir: Path, stop: int, save: bool, overlap_after: bool = False
) -> dict[str, Any]:
    """Steps up to `stop`, from the newest checkpoint where there is one; losses, moments and weights."""
    with grid(case.parallel, device, 0) as context:
        state, stream = build(case, context)
        column = score_groups(state.modules, stream, np.arange(len(case.store)), 5, context, lambda done: None)
        newest = checkpoint.latest(run_dir)
        if newest is not None:
            checkpoint.load(state, newest)
        result: dict[str, Any] = {"from": state.step, "losses": [], "state": optimizer_state(state) if newest else {}}
        while state.step < stop:
            set_learning_rate(state.optimizer, 1e-3)
            groups = stream.next_groups(state.consumed, case.batch)
            sums, norm = train_step(
                state, stream.batches(groups, context.data_rank, column), case.objective, None, context
            )
            result["losses"].append((sums.loss, norm))
        if save:
            checkpoint.save(state, run_dir, 10, 2, context)
            result["state"] = optimizer_state(state)
        with settled(state.chunks):
            result["weights"] = {k: p.data for k, p in pieces(state, lambda p: p.data).items()}
        return result


def optimizer_state(state: Any) -> dict[str, torch.Tensor]:
    """Weights, masters and both moments of every parameter, by global name; here only the parts of this rank, with
    their place. (Masters of float32 weights are the weights where the optimizer is not distributed.)"""
    model = {f"model{i}": m.sharded_state_dict(metadata=dict(checkpoint.METADATA)) for i, m in enumerate(state.modules)}
    sharded = state.optimizer.sharded_state_dict(model, metadata=dict(checkpoint.METADATA))
    found = {}
    for entry in [*nested_values(model), *nested_values(sharded)]:
        for piece in nested_values([entry.build()]) if isinstance(entry, ShardedTensorFactory) else [entry]:
            if isinstance(piece, ShardedTensor):
                found[f"{piece.key}@{piece.global_offset}+{tuple(piece.local_shape)}"] = piece.data.detach().clone()
    return found


def test_resume_is_the_same_to_the_bit(case: Case, tmp_path: Path) -> None:
    """Stopped twice, once across the end of an epoch (13 groups, 5 a step)."""
    tensor, pipeline = replace(case, tensor=2, sequence=True), replace(case, pipeline=2)
    for ranks, layout in ((1, case), (2, case), (2, tensor), (2, pipeline)):
        run_dir = tmp_path / f"{ranks}-{layout.tensor}-{layout.pipeline}"
        whole = run_ranks(ranks, train, layout, run_dir / "never", 6, False)[0]
        parts = [run_ranks(ranks, train, layout, run_dir, stop, True)[0] for stop in (2, 4, 6)]
        assert [part["from"] for part in parts] == [0, 2, 4]
        assert [loss for part in parts for loss in part["losses"]] == whole["losses"]
        assert all(torch.equal(parts[-1]["weights"][name], whole["weights"][name]) for name in whole["weights"])


def boxes(states: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """All ranks' pieces laid into whole tensors."""
    import re

    ends: dict[str, list[int]] = {}
    parsed = []
    for state in states:
        for name, data in state.items():
            key, offset, _ = re.fullmatch(r"(.*)@\((.*)\)\+\((.*)\)", name).groups()
            start = [int(x) for x in offset.split(",") if x.strip()]
            data = data.reshape([1] * (len(start) - data.dim()) + list(data.shape))
            end = [s + n for s, n in zip(start, data.shape, strict=True)]
            ends[key] = [max(a, b) for a, b in zip(ends.get(key, end), end, strict=True)]
            parsed.append((key, start, end, data))
    whole = {key: torch.full(size, torch.nan) for key, size in ends.items()}
    for key, start, end, data in parsed:
        whole[key][tuple(slice(a, b) for a, b in zip(start, end, strict=True))] = data
    return whole


def on_another_grid(want: dict[str, torch.Tensor], ranks: int, layout: Case, run_dir: Path) -> Any:
    """Load on a grid and train to step 4; weights, masters and moments are equal element by element. Its losses."""
    loaded = run_ranks(ranks, train, layout, run_dir, 4, False)
    assert loaded[0]["from"] == 2
    got = boxes([r["state"] for r in loaded])
    assert got.keys() == want.keys()
    for name, value in want.items():
        padded = "embedding" in name or "output_layer" in name  # to the tensor-parallel size
        rows = min(len(value), len(got[name])) if padded else None
        assert torch.equal(got[name][:rows], value[:rows]), f"{name} on {layout}"
    return loaded[0]["losses"]


def test_another_grid_gets_the_same_masters_and_moments(case: Case, tmp_path: Path) -> None:
    """Saved on tensor 2 x data 2 with many padded gradient buckets, loaded on five other grids."""
    source = replace(case, tensor=2, sequence=True, overlap=True, bucket_size=600)
    want = boxes([r["state"] for r in run_ranks(4, train, source, tmp_path / "run", 2, True)])
    after = run_ranks(4, train, source, tmp_path / "run", 4, False)[0]["losses"]
    assert len(want) == 4 * 8, "weights, masters, two moments of embedding, final norm, six stacked layer weights"
    assert all(not torch.isnan(value).any() for value in want.values())
    for ranks, layout in (
        (1, case),
        (2, case),
        (2, replace(case, tensor=2)),
        (2, replace(case, pipeline=2)),
        (4, replace(case, tensor=2, pipeline=2, virtual=2)),
    ):
        assert np.allclose(on_another_grid(want, ranks, layout, tmp_path / "run"), after, rtol=1e-5)


def kinds_of_run(case: Case, folder: Path) -> dict[str, tuple[float, list[tuple[int, Case]]]]:
    """By name: how far losses may differ between grids, and the grids with their ranks."""
    half, plain = replace(case, dtype="bfloat16"), replace(case, distributed=False)
    experts = replace(case, folder=write("mixtral", folder / "mixtral"), learning_rate=1e-4)

    def three(one: Case, split: dict[str, Any], other: dict[str, Any]) -> list[tuple[int, Case]]:
        return [(1, one), (2, replace(one, **split)), (2, replace(one, **other))]

    tensor = {"tensor": 2, "sequence": True}
    return {
        "tied float32": (
            1e-5,
            [
                (1, case),
                (2, replace(case, tensor=2, sequence=True)),
                (2, replace(case, pipeline=2, bucket_size=600)),
                (4, replace(case, tensor=2, pipeline=2, virtual=2)),
                (4, replace(case, tensor=2, overlap=True, bucket_size=600)),
            ],
        ),
        "experts": (1e-4, three(experts, {"expert": 2}, tensor)),
        "bfloat16 with float32 masters": (2e-2, three(half, tensor, {"pipeline": 2})),
        "optimizer not distributed": (1e-5, three(plain, tensor, {"pipeline": 2})),
    }


@pytest.mark.slow
def test_every_pair_of_grids(case: Case, tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    """From each grid of a kind of run to each of the others: data, tensor, expert and pipeline parallelism and virtual
    stages among them."""
    for kind, (noise, grids) in kinds_of_run(case, tmp_path).items():
        pairs = 0
        for number, (ranks, source) in enumerate(grids):
            run_dir = tmp_path / f"{kind}-{number}"
            want = boxes([r["state"] for r in run_ranks(ranks, train, source, run_dir, 2, True)])
            losses = [on_another_grid(want, *other, run_dir) for other in grids if other[1] is not source]
            assert all(np.allclose(one, losses[0], rtol=noise) for one in losses), kind
            pairs += len(losses)
        record_property("pairs", f"{pairs} {kind}")


def test_bfloat16_keeps_its_float32_masters(case: Case, tmp_path: Path) -> None:
    half = replace(case, dtype="bfloat16")
    whole = run_ranks(1, train, half, tmp_path / "never", 4, False)[0]
    parts = [run_ranks(1, train, half, tmp_path / "run", stop, True)[0] for stop in (2, 4)]
    assert parts[0]["losses"] + parts[1]["losses"] == whole["losses"]


def test_only_complete_folders_count(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path) is None
    folder = tmp_path / "checkpoints" / "step-00000003"
    partial = begin(folder)
    (partial / "tensor").write_bytes(b"1")
    assert checkpoint.latest(tmp_path) is None
    finish(partial, folder, Saved(3, 24, 10))
    assert checkpoint.latest(tmp_path) == folder
    assert read_state(folder) == Saved(3, 24, 10)
    begin(tmp_path / "checkpoints" / "step-00000006")
    assert checkpoint.latest(tmp_path) == folder


def test_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 10, 3):
        folder = tmp_path / "checkpoints" / f"step-{step:08d}"
        finish(begin(folder), folder, Saved(step, step, 10))
    keep_newest(tmp_path, 2)
    assert [p.name for p in checkpoint.checkpoints(tmp_path)] == ["step-00000003", "step-00000010"]
    kept = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert kept == ["latest", "step-00000003", "step-00000010"]


def test_a_damaged_checkpoint_is_named(case: Case, tmp_path: Path) -> None:
    run_ranks(1, train, case, tmp_path, 1, True)
    folder = checkpoint.latest(tmp_path)
    shard = next(folder.glob("*.distcp"))
    shard.unlink()

    def load(device: torch.device) -> str:
        with grid(case.parallel, device, 0) as context:
            try:
                checkpoint.load(build(case, context)[0], folder)
            except CheckpointError as error:
                return str(error)
            return "loaded"

    [message] = run_ranks(1, load)
    assert str(shard) in message
    assert "the checkpoint is damaged: give another one, or remove it" in message
    assert "\n" not in message


def test_unreadable_state(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints" / "step-00000001"
    finish(begin(folder), folder, Saved(1, 8, 10))
    for text in ("", "[]", '{"step": 1}', '{"step": 1, "consumed": 2, "total_steps": 3, "extra": 4}'):
        (folder / "state.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"state\.json"):
            read_state(folder)


def test_a_place_that_takes_no_folder(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("in the way")
    with pytest.raises(StorageError, match="set run_dir to another place"):
        begin(tmp_path / "checkpoints" / "step-00000001")


def test_a_disk_that_fills_up_while_it_is_written(case: Case, tmp_path: Path) -> None:
    """A limit on file sizes stands in for the full disk: one line, and the checkpoint before it stays."""
    run_ranks(1, train, case, tmp_path, 1, True)
    before = checkpoint.latest(tmp_path)

    def save(device: torch.device) -> str:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        with grid(case.parallel, device, 0) as context:
            state, _ = build(case, context)
            checkpoint.load(state, before)
            state.step = 2
            try:
                checkpoint.save(state, tmp_path, 10, 2, context)
            except StorageError as error:
                return str(error)
            return "saved"

    [message] = run_ranks(1, save)
    assert "cannot be written" in message
    assert "\n" not in message
    assert checkpoint.checkpoints(tmp_path) == [before]
