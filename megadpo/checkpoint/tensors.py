"""Weights and optimizer state through Megatron-Core's dist_checkpointing, from any grid to any other."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from torch.distributed.checkpoint import CheckpointException

from megadpo.checkpoint.folder import (
    Saved,
    begin,
    checkpoint_name,
    finish,
    keep_newest,
    read_state,
    removed_on_failure,
)
from megadpo.errors import CheckpointError
from megadpo.files import storage_errors
from megadpo.parallel.context import ParallelContext
from megadpo.train.optimizer import settled
from megadpo.train.state import TrainState

METADATA = {
    # the one format that loads on every other grid; Megatron-Core's default cannot be saved at all
    "distrib_optim_sharding_type": "fully_reshardable",
    "singleton_local_shards": False,
    "chained_optim_avoid_prefix": True,
}
"""Give Megatron-Core a copy: it writes the process group of the moment into the dictionary."""


def save(state: TrainState, run_dir: Path, total_steps: int, keep: int, context: ParallelContext) -> Path:
    """Write RUN_DIR/checkpoints/step-N and remove all but the `keep` newest; every rank calls it.

    The folder gets its name when everything in it is on the disk. Raises StorageError where the disk does not take
    it; the checkpoints before it stay as they are.
    """
    folder = run_dir / "checkpoints" / checkpoint_name(state.step)
    partial = folder.with_name(folder.name + ".partial")
    if context.is_first:
        partial = begin(folder)
    dist.barrier()
    with settled(state.chunks), storage_errors(partial), removed_on_failure(partial):
        try:
            dist_checkpointing.save(_sharded(state, is_loading=False), str(partial), content_metadata=dict(METADATA))
        except (CheckpointException, CheckpointingException, RuntimeError) as error:
            # The writers are processes of Megatron-Core's; a full disk reaches us as text in their exception.
            for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                if f"[Errno {number}]" in str(error):
                    raise OSError(number, os.strerror(number)) from error
            raise
    if context.is_first:
        finish(partial, folder, Saved(state.step, state.consumed, total_steps))
        keep_newest(run_dir, keep)
    dist.barrier()
    return folder


def load(state: TrainState, folder: Path) -> Saved:
    """Fill weights, master weights, moments and the place in the stream; every rank calls it."""
    saved = read_state(folder)
    loaded = _read(_sharded(state, is_loading=True), folder, "remove it to go on from the checkpoint before it")
    for i, module in enumerate(state.modules):
        module.load_state_dict(loaded[f"model{i}"], strict=False)  # _extra_state entries are not parameters
    state.optimizer.load_state_dict(loaded["optimizer"])
    state.step, state.consumed = saved.step, saved.consumed
    return saved


def load_weights(modules: list[Any], folder: Path) -> Saved:
    """Fill only the model chunks, as evaluation needs it; every rank calls it."""
    saved = read_state(folder)
    sharded = {f"model{i}": module.sharded_state_dict(metadata=dict(METADATA)) for i, module in enumerate(modules)}
    loaded = _read(sharded, folder, "give another checkpoint, or the model that it was trained from")
    for i, module in enumerate(modules):
        module.load_state_dict(loaded[f"model{i}"], strict=False)
    return saved


def _read(sharded: dict[str, Any], folder: Path, advice: str) -> dict[str, Any]:
    """dist_checkpointing.load with its many exceptions as one line."""
    try:
        return dist_checkpointing.load(sharded, str(folder))
    except (CheckpointException, CheckpointingException, OSError, KeyError, ValueError) as error:
        cause: BaseException = error
        if isinstance(error, CheckpointException) and error.failures:
            cause = next(iter(error.failures.values()))[0]
        text = (str(cause).splitlines() or [""])[0]
        raise CheckpointError(
            f"{folder}: cannot be read into this model ({type(cause).__name__}: {text}); {advice}"
        ) from error


def _sharded(state: TrainState, is_loading: bool) -> dict[str, Any]:
    """Megatron-Core's description of every tensor: global name and shape, this rank's part of it."""
    modules = {
        f"model{i}": module.sharded_state_dict(metadata=dict(METADATA)) for i, module in enumerate(state.modules)
    }
    return {**modules, "optimizer": state.optimizer.sharded_state_dict(modules, is_loading, metadata=dict(METADATA))}
