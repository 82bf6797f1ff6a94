"""Reading a checkpoint, of any grid, through Megatron-Core's dist_checkpointing."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from torch.distributed.checkpoint import CheckpointException

from megadpo.checkpoint.folder import Saved, checkpoints, damage, read_state, set_aside
from megadpo.checkpoint.plan import METADATA, described_model, described_weights
from megadpo.checkpoint.safe import no_raw_pickle
from megadpo.errors import CheckpointError
from megadpo.train.state import TrainState


def gathered(mine: Any) -> list:
    """Every rank's object, on every rank."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return everyone


def resume(state: TrainState, run_dir: Path, tell: Callable[[str], None]) -> Path | None:
    """Go on from the newest whole checkpoint; None where the run has none. Every rank calls it.

    Damaged ones that are newer are told of and set aside. Raises CheckpointError where all are damaged.
    """
    first = dist.get_rank() == 0
    candidates: list[Path] = gathered(checkpoints(run_dir)[::-1] if first else None)[0]
    bad: list[tuple[Path, list[str]]] = []
    for folder in candidates:
        found = _damage(folder)
        if found:
            bad.append((folder, found))
            continue
        for damaged, lines in bad:
            others = f" ({len(lines) - 1} more files)" if len(lines) > 1 else ""
            aside = set_aside(damaged) if first else damaged
            tell(f"WARNING    {lines[0]}{others}; the checkpoint is set aside as {aside.name}")
        _fill(state, folder)
        return folder
    if bad:
        raise CheckpointError(
            f"{bad[0][1][0]}; so are all {len(bad)} checkpoints of {run_dir}: bring one back from a copy, or start "
            "again with another run_dir"
        )
    return None


def load(state: TrainState, folder: Path) -> Saved:
    """Fill weights, master weights, moments and the place in the stream; every rank calls it. CheckpointError where a
    file of it is not as it was written."""
    _refuse_damaged(folder)
    return _fill(state, folder)


def load_weights(modules: list[Any], folder: Path) -> Saved:
    """Fill only the model chunks, as evaluation needs it; every rank calls it."""
    _refuse_damaged(folder)
    saved = read_state(folder)
    sharded = described_weights(modules)
    loaded = _read(sharded, folder, "give another checkpoint, or the model that it was trained from")
    for i, module in enumerate(modules):
        module.load_state_dict(loaded[f"model{i}"], strict=False)
    return saved


def _fill(state: TrainState, folder: Path) -> Saved:
    saved = read_state(folder)
    advice = "it is whole: go on with the settings and the versions that wrote it, or give another run_dir"
    loaded = _read(_sharded(state), folder, advice)
    for i, module in enumerate(state.modules):
        module.load_state_dict(loaded[f"model{i}"], strict=False)  # _extra_state entries are not parameters
    state.optimizer.load_state_dict(loaded["optimizer"])
    state.step, state.consumed, state.skipped = saved.step, saved.consumed, saved.skipped
    return saved


def _damage(folder: Path) -> list[str]:
    """What is wrong with it, the same on every rank; the ranks share the reading."""
    mine = damage(folder, dist.get_rank(), dist.get_world_size())
    return list(dict.fromkeys(line for lines in gathered(mine) for line in lines))


def _refuse_damaged(folder: Path) -> None:
    lines = _damage(folder)
    if lines:
        raise CheckpointError(f"{lines[0]}; the checkpoint is damaged: give another one, or remove it")


def _read(sharded: dict[str, Any], folder: Path, advice: str) -> dict[str, Any]:
    """dist_checkpointing.load with its many exceptions as one line."""
    try:
        with no_raw_pickle(folder):
            return dist_checkpointing.load(sharded, str(folder))
    except (
        CheckpointException,
        CheckpointingException,
        OSError,
        EOFError,
        KeyError,
        TypeError,
        ValueError,
        pickle.UnpicklingError,
    ) as error:
        cause: BaseException = error
        if isinstance(error, CheckpointException) and error.failures:
            cause = next(iter(error.failures.values()))[0]
        text = (str(cause).splitlines() or [""])[0]
        raise CheckpointError(
            f"{folder}: cannot be read into this model ({type(cause).__name__}: {text}); {advice}"
        ) from error


def _sharded(state: TrainState) -> dict[str, Any]:
    """Megatron-Core's description of every tensor to be filled: global name and shape, this rank's part of it."""
    model = described_model(state.modules)
    weights = {name: entries for name, entries in model.items() if name != "fp8"}
    return {**model, "optimizer": state.optimizer.sharded_state_dict(weights, True, metadata=dict(METADATA))}
