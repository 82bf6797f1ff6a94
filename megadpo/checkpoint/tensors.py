"""Weights and optimizer state through Megatron-Core's dist_checkpointing, from any grid to any other."""

from __future__ import annotations

import errno
import pickle
import queue
import shutil
import threading
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from torch.distributed.checkpoint import CheckpointException

from megadpo.checkpoint.folder import (
    Entry,
    Saved,
    begin,
    checkpoint_name,
    checkpoints,
    damage,
    finish,
    hashed,
    keep_newest,
    read_state,
    removed_on_failure,
    set_aside,
)
from megadpo.checkpoint.safe import no_raw_pickle
from megadpo.errors import CheckpointError, StorageError
from megadpo.files import CAUSES, storage_errors
from megadpo.model.fp8_emulation import sharded_history
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


# ---- saving


@dataclass
class Written:
    """What one rank's writing came to."""

    files: dict[str, Entry]
    error: int = 0
    """errno, or 0."""
    text: str = ""


def save(state: TrainState, run_dir: Path, total_steps: int, keep: int, context: ParallelContext) -> Path:
    """Write RUN_DIR/checkpoints/step-N and remove all but the `keep` newest; every rank calls it.

    The folder gets its name when everything in it is on the disk. Raises StorageError where the disk does not take
    it; the checkpoints before it stay as they are.
    """
    return Saving(state, run_dir, total_steps, keep, context, background=False).finish()


class Saving:
    """A checkpoint on its way to the disk. Every rank makes one, and every rank calls `finish`.

    Making it plans the save and, with `background`, copies the state; the tensors are then written and hashed by a
    thread while training goes on. `finish` waits for the thread, exchanges what was written, and gives the folder its
    name. A failure of any rank's thread is raised there, on every rank.
    """

    def __init__(
        self,
        state: TrainState,
        run_dir: Path,
        total_steps: int,
        keep: int,
        context: ParallelContext,
        background: bool,
    ) -> None:
        self._folder = run_dir / "checkpoints" / checkpoint_name(state.step)
        self._partial = self._folder.with_name(self._folder.name + ".partial")
        self._saved = Saved(state.step, state.consumed, total_steps, state.skipped)
        self._run_dir, self._keep, self._context = run_dir, keep, context
        self._written = Written({})
        if context.is_first:
            begin(self._folder)
        dist.barrier()
        with self._mine():
            with settled(state.chunks), storage_errors(self._partial):
                try:
                    self._request = dist_checkpointing.save(
                        _sharded(state, is_loading=False),
                        str(self._partial),
                        content_metadata=dict(METADATA),
                        async_sharded_save=True,
                    )
                except RuntimeError as error:  # common.pt, by torch's own writer
                    raise _of_the_disk(error) or error from error
                buckets = self._staged(copy=background)
            self._enough_room(buckets)
        self._thread = threading.Thread(target=self._write, args=(buckets,), name="checkpoint", daemon=True)
        self._thread.start()

    @property
    def done(self) -> bool:
        """Whether this rank has written its part."""
        return not self._thread.is_alive()

    def finish(self) -> Path:
        """The checkpoint's folder, once it has its name."""
        self._thread.join()
        everyone = _gathered(self._written)
        with self._mine():
            for rank, written in enumerate(everyone):
                if written.error:
                    cause = CAUSES.get(written.error, written.text)
                    raise StorageError(
                        f"{self._partial}: cannot be written by rank {rank}; {cause}, or set run_dir to another place; "
                        "the checkpoints before it are whole"
                    )
                if written.text:
                    raise RuntimeError(f"rank {rank} could not write {self._partial}: {written.text}")
            for function in self._request.finalize_fns:  # .metadata and metadata.json, by the first rank
                function()
            if self._context.is_first:
                known = {name: entry for written in everyone for name, entry in written.files.items()}
                finish(self._partial, self._folder, self._saved, known)
                keep_newest(self._run_dir, self._keep)
        dist.barrier()
        return self._folder

    def _mine(self) -> Any:
        """Rank 0 removes what is half written."""
        return removed_on_failure(self._partial) if self._context.is_first else nullcontext()

    def _staged(self, copy: bool) -> list:
        """This rank's files to be: [(path, name, (objects, tensors in host memory))]. copy: apart from the live state
        (what a GPU holds is copied in any case)."""
        if self._request.async_fn is None:
            return []
        buckets = self._request.preload_fn()
        if not copy or self._context.device.type != "cpu":
            return list(buckets)
        return [
            (path, name, (objects, [(item, tensor.clone()) for item, tensor in tensors]))
            for path, name, (objects, tensors) in buckets
        ]

    def _enough_room(self, buckets: list) -> None:
        """Refuse before anything is written, where the disk says that it will not do."""
        mine = sum(tensor.numel() * tensor.element_size() for *_, (_, tensors) in buckets for _, tensor in tensors)
        needed = sum(_gathered(mine))
        free = shutil.disk_usage(self._folder.parent).free
        if free < needed:
            raise StorageError(
                f"{self._folder}: the disk is full: the checkpoint takes {needed / 1e9:.3f} GB and {free / 1e9:.3f} GB "
                "are free; free some space, or set run_dir to another place; the checkpoints before it are whole"
            )

    def _write(self, buckets: list) -> None:
        """Megatron-Core's writer, called here instead of in processes that it forks: what the disk says arrives as it
        was said, and no process with threads is forked."""
        try:
            results: dict[int, Any] = {}
            if buckets:
                transforms, _ = self._request.async_fn.args
                for number, bucket in enumerate(buckets):
                    said: queue.SimpleQueue = queue.SimpleQueue()
                    tickets: queue.Queue = queue.Queue()
                    tickets.put(number)
                    FileSystemWriterAsync.write_preloaded_data(transforms, number, bucket, said, tickets, True)
                    results[number] = said.get()[1]
                    if isinstance(results[number], Exception):
                        raise results[number]
                for name, entry in hashed(self._partial, [name for _, name, _ in buckets]).items():
                    if isinstance(entry, OSError):
                        raise entry
                    self._written.files[name] = entry
                self._request.async_fn_args[2].put(results)
        except Exception as error:
            cause = _of_the_disk(error)
            if cause is not None:
                self._written.error, self._written.text = cause.errno or errno.EIO, cause.strerror or str(cause)
            else:
                self._written.text = f"{type(error).__name__}: {error}"


def _of_the_disk(error: BaseException) -> OSError | None:
    """The OSError at the bottom; torch's zip writer covers it with a RuntimeError as it closes the file.
    None: something else is wrong."""
    covered: BaseException | None = error
    while covered is not None:
        if isinstance(covered, OSError):
            return covered
        covered = covered.__cause__ or covered.__context__
    if "inline_container" in str(error):
        return OSError(errno.EIO, "the file could not be written whole, the disk may be full")
    return None


def _gathered(mine: Any) -> list:
    """Every rank's object, on every rank."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return everyone


# ---- loading


def resume(state: TrainState, run_dir: Path, tell: Callable[[str], None]) -> Path | None:
    """Go on from the newest whole checkpoint; None where the run has none. Every rank calls it.

    Damaged ones that are newer are told of and set aside. Raises CheckpointError where all are damaged.
    """
    first = dist.get_rank() == 0
    candidates: list[Path] = _gathered(checkpoints(run_dir)[::-1] if first else None)[0]
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
    sharded = _model(modules)
    loaded = _read(sharded, folder, "give another checkpoint, or the model that it was trained from")
    for i, module in enumerate(modules):
        module.load_state_dict(loaded[f"model{i}"], strict=False)
    return saved


def _fill(state: TrainState, folder: Path) -> Saved:
    saved = read_state(folder)
    loaded = _read(_sharded(state, is_loading=True), folder, "remove it to go on from the checkpoint before it")
    for i, module in enumerate(state.modules):
        module.load_state_dict(loaded[f"model{i}"], strict=False)  # _extra_state entries are not parameters
    state.optimizer.load_state_dict(loaded["optimizer"])
    state.step, state.consumed, state.skipped = saved.step, saved.consumed, saved.skipped
    return saved


def _damage(folder: Path) -> list[str]:
    """What is wrong with it, the same on every rank; the ranks share the reading."""
    mine = damage(folder, dist.get_rank(), dist.get_world_size())
    return list(dict.fromkeys(line for lines in _gathered(mine) for line in lines))


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


def _model(modules: list[Any]) -> dict[str, Any]:
    """Weights and buffers. Not what Transformer Engine calls extra state, the scales of delayed FP8: it is a pickle,
    which loading would run (pytorch/module/base.py: set_extra_state)."""
    every = {f"model{i}": module.sharded_state_dict(metadata=dict(METADATA)) for i, module in enumerate(modules)}
    return {
        chunk: {key: entry for key, entry in entries.items() if "._extra_state" not in key}
        for chunk, entries in every.items()
    }


def _sharded(state: TrainState, is_loading: bool) -> dict[str, Any]:
    """Megatron-Core's description of every tensor: global name and shape, this rank's part of it."""
    modules, history = _model(state.modules), sharded_history(state.modules)
    return {
        **modules,
        **({"fp8": history} if history else {}),
        "optimizer": state.optimizer.sharded_state_dict(modules, is_loading, metadata=dict(METADATA)),
    }
