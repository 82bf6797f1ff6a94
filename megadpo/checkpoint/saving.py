"""Writing a checkpoint while training goes on.

Training's thread plans (once in a run), starts another, and trains on; before the next update of the weights it waits
for the copy, which had the whole forward and backward pass for itself. Each rank's other thread copies the state into
host memory, then, with low priority, writes and hashes it. At last one of the first rank's writes the manifest, brings
everything to the disk, and gives the folder its name.
"""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from hashlib import sha256
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megadpo.checkpoint.folder import (
    Entry,
    Saved,
    begin,
    checkpoint_name,
    finish,
    keep_newest,
    removed_on_failure,
)
from megadpo.checkpoint.loading import gathered
from megadpo.checkpoint.plan import Plan, common_now, fits, make_plan
from megadpo.checkpoint.safe import FORMAT
from megadpo.errors import StorageError
from megadpo.files import CAUSES, storage_errors
from megadpo.parallel.context import ParallelContext
from megadpo.train.optimizer import settled
from megadpo.train.state import TrainState

LOWEST = 19
"""Priority of what writes in the background (nice)."""


@dataclass(frozen=True)
class Stored:
    """Where one piece lies in the checkpoint."""

    key: str
    whole: tuple[int, ...] | None
    """None: no tensor."""
    start: tuple[int, ...]
    size: tuple[int, ...]
    dtype: torch.dtype | None
    file: str
    offset: int
    length: int


@dataclass
class Written:
    """What one rank's thread came to."""

    files: dict[str, Entry] = field(default_factory=dict)
    stored: list[Stored] | None = None
    """None: as at the save before."""
    error: int = 0
    """errno, or 0."""
    text: str = ""
    """What went wrong."""
    refused: bool = False
    """Whether the text is all that a user needs."""


@dataclass
class Kept:
    """What one save leaves to the next: the plan, memory for the copy, and what was exchanged about it."""

    plan: Plan
    nbytes: int
    """Of the checkpoint, all ranks together."""
    host: Tensor | None = None
    """uint8, pinned where there is a GPU."""
    stored: list[list[Stored]] = field(default_factory=list)
    """By rank."""


def save(state: TrainState, run_dir: Path, total_steps: int, keep: int, context: ParallelContext) -> Path:
    """Write RUN_DIR/checkpoints/step-N and remove all but the `keep` newest; every rank calls it.

    The folder gets its name when everything in it is on the disk. Raises StorageError where the disk does not take
    it; the checkpoints before it stay as they are.
    """
    return Saving(state, run_dir, total_steps, keep, context, background=False).finish()


class Saving:
    """A checkpoint on its way to the disk. Every rank makes one, and every rank calls `advance` until it has its name.

    background: the state is copied, and training may go on as far as the next update, where it has to call
    `state.until_free`. Without, nothing may change before `finish` returns. before: the save before this one in the
    same run, whose plan and memory are used again where they still fit; it must have been finished. A failure of any
    rank's thread is raised by `advance`, on every rank.
    """

    def __init__(
        self,
        state: TrainState,
        run_dir: Path,
        total_steps: int,
        keep: int,
        context: ParallelContext,
        background: bool,
        before: Saving | None = None,
    ) -> None:
        self._folder = run_dir / "checkpoints" / checkpoint_name(state.step)
        self._partial = self._folder.with_name(self._folder.name + ".partial")
        self._saved = Saved(state.step, state.consumed, total_steps, state.skipped)
        self._run_dir, self._keep, self._context = run_dir, keep, context
        self._written, self._named = Written(), False
        self._on_device: Any = None
        with settled(state.chunks):
            self._kept = _planned(state, context, before)
        self._common = common_now(self._kept.plan, state)
        self._begin()
        # what the next step changes before it calls `until_free`; little
        self._early = {i: x.live.clone() for i, x in enumerate(self._kept.plan.pieces) if background and x.changing}
        copied = threading.Event()
        ready = None
        if context.device.type == "cuda":
            ready = torch.cuda.Event()
            ready.record()
        if background:
            self._copied = copied
            state.until_free = self._until_copied
        self._start(lambda: self._write(background, copied, ready))

    @property
    def done(self) -> bool:
        """Whether this rank has done its part of the stage."""
        return not self._thread.is_alive()

    def advance(self) -> Path | None:
        """Go on to the next stage, best when every rank is `done`; every rank calls it. The folder, once it has its
        name."""
        self._thread.join()
        everyone: list[Written] = gathered(self._written)
        with self._mine():
            for rank, written in enumerate(everyone):
                _raise_failure(written, rank, self._partial)
        if self._named:
            return self._folder
        for rank, written in enumerate(everyone):
            if written.stored is not None:
                self._kept.stored[rank] = written.stored
        self._named = True
        if self._context.is_first:
            known = {name: entry for written in everyone for name, entry in written.files.items()}
            self._start(lambda: self._name(known))
        return None

    def finish(self) -> Path:
        """Wait for the end; the checkpoint's folder."""
        while (folder := self.advance()) is None:
            pass
        return folder

    def _start(self, work: Callable[[], None]) -> None:
        def run() -> None:
            try:
                work()
            except Exception as error:
                self._written = _failed(error)

        self._thread = threading.Thread(target=run, name="checkpoint", daemon=True)
        self._thread.start()

    def _mine(self) -> Any:
        """Rank 0 removes what is half written."""
        return removed_on_failure(self._partial) if self._context.is_first else nullcontext()

    def _begin(self) -> None:
        """The folder to write into, where there is room; the first rank looks, and tells the others."""
        refusal = ""
        if self._context.is_first:
            try:
                begin(self._folder)
                self._enough_room()
            except StorageError as error:
                refusal = str(error)
                shutil.rmtree(self._partial, ignore_errors=True)
        refusal = gathered(refusal)[0]
        if refusal:
            raise StorageError(refusal)

    def _enough_room(self) -> None:
        """Refuse before anything is written, where the disk says that it will not do."""
        needed, free = self._kept.nbytes, shutil.disk_usage(self._folder.parent).free
        if free < needed:
            raise StorageError(
                f"{self._folder}: the disk is full: the checkpoint takes {needed / 1e9:.3f} GB and {free / 1e9:.3f} GB "
                "are free; free some space, or set run_dir to another place; the checkpoints before it are whole"
            )

    # ---- in threads

    def _write(self, background: bool, copied: threading.Event, ready: Any) -> None:
        plan = self._kept.plan
        try:
            tensors = self._copy(ready) if background else _one_by_one(plan)
        finally:
            copied.set()
        if background:
            _low_priority()
        stored: list[Stored] = []
        name = f"__{self._context.rank}_0.distcp"
        if plan.pieces or plan.objects:
            with _HashedFile(self._partial / name) as file:
                for piece, tensor in zip(plan.pieces, tensors, strict=True):
                    offset = file.size
                    torch.save(tensor, file)  # type: ignore[arg-type]
                    place = (name, offset, file.size - offset)
                    stored.append(Stored(piece.key, piece.whole, piece.start, piece.size, tensor.dtype, *place))
                for key, value in plan.objects.items():
                    offset = file.size
                    torch.save([value], file)  # type: ignore[arg-type]
                    stored.append(Stored(key, None, (), (), None, name, offset, file.size - offset))
            self._written.files[name] = file.entry
        if stored != self._kept.stored[self._context.rank]:
            self._written.stored = stored

    def _copy(self, ready: Any) -> Iterator[Tensor]:
        """Start to copy everything into host memory; what it gives may be used once it is there."""
        kept, plan = self._kept, self._kept.plan
        cuda = self._context.device.type == "cuda"
        if kept.host is None:
            kept.host = torch.empty(plan.offsets[-1], dtype=torch.uint8, pin_memory=cuda)
        memory: Any = kept.host.numpy().data
        tensors = [
            torch.frombuffer(memory[at : at + piece.live.nbytes], dtype=piece.live.dtype).view(piece.size)
            for piece, at in zip(plan.pieces, plan.offsets, strict=False)
        ]
        sources = [self._early.get(number, piece.live) for number, piece in enumerate(plan.pieces)]
        if not cuda:
            for source, tensor in zip(sources, tensors, strict=True):
                tensor.copy_(source)
            return iter(tensors)
        aside = torch.cuda.Stream(self._context.device)
        with torch.cuda.stream(aside):
            aside.wait_event(ready)
            for source, tensor in zip(sources, tensors, strict=True):
                tensor.copy_(source, non_blocking=True)
            self._on_device = torch.cuda.Event()
            self._on_device.record()
        return self._arrived(tensors)

    def _arrived(self, tensors: list[Tensor]) -> Iterator[Tensor]:
        self._on_device.synchronize()
        yield from tensors

    def _until_copied(self) -> None:
        self._copied.wait()
        if self._on_device is not None:
            torch.cuda.current_stream().wait_event(self._on_device)

    def _name(self, known: dict[str, Entry]) -> None:
        """Everything beside the ranks' files, then the name. On the first rank."""
        _low_priority()
        with storage_errors(self._partial), removed_on_failure(self._partial):
            torch.save(self._common, self._partial / "common.pt")
            (self._partial / "metadata.json").write_text(json.dumps({**FORMAT, "common_backend_version": 1}))
            (self._partial / ".metadata").write_bytes(pickle.dumps(_metadata(self._kept.stored)))
        finish(self._partial, self._folder, self._saved, known)
        keep_newest(self._run_dir, self._keep)


class _HashedFile:
    """A new file, hashed as it is written, and brought to the disk at the end."""

    def __init__(self, path: Path) -> None:
        self._file: BinaryIO = path.open("wb", buffering=0)
        self._hash = sha256()
        self.size = 0

    def write(self, data: Any) -> int:
        """All of it; Python's lock is free meanwhile."""
        view = memoryview(data).cast("B")
        done = 0
        while done < len(view):
            done += self._file.write(view[done:])
        self._hash.update(view)
        self.size += len(view)
        return len(view)

    def flush(self) -> None:
        """torch.save wants one."""

    @property
    def entry(self) -> Entry:
        return Entry(self.size, self._hash.hexdigest())

    def __enter__(self) -> _HashedFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if kind is None:
            os.fsync(self._file.fileno())
        self._file.close()


def _planned(state: TrainState, context: ParallelContext, before: Saving | None) -> Kept:
    """The save before's, where that fits on every rank."""
    kept = before._kept if before is not None else None
    [stale] = context.any_of(kept is None or not fits(kept.plan, state))
    if kept is not None and not stale:
        return kept
    plan = make_plan(state)
    host = kept.host if kept is not None and kept.plan.offsets[-1] == plan.offsets[-1] else None
    return Kept(plan, sum(gathered(plan.nbytes)), host, [[] for _ in range(context.world_size)])


def _one_by_one(plan: Plan) -> Iterator[Tensor]:
    """Each piece in host memory, for as long as it is being written."""
    for piece in plan.pieces:
        yield piece.live.to("cpu", copy=True)


def _low_priority() -> None:
    """Of this thread only, as Linux has it; elsewhere nothing."""
    if sys.platform == "linux":
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOWEST)


def _metadata(everyone: list[list[Stored]]) -> Metadata:
    """torch.distributed.checkpoint's index of all ranks' pieces. RuntimeError where they do not make up the whole: a
    checkpoint that nobody could load must not get its name."""
    found: dict[str, Any] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    for stored in (stored for rank in everyone for stored in rank):
        if stored.whole is None or stored.dtype is None:
            index = MetadataIndex(stored.key)
            found[stored.key] = BytesStorageMetadata()
        else:
            index = MetadataIndex(stored.key, stored.start)
            properties = TensorProperties(dtype=stored.dtype)
            tensor = found.setdefault(stored.key, TensorStorageMetadata(properties, torch.Size(stored.whole), []))
            tensor.chunks.append(ChunkStorageMetadata(torch.Size(stored.start), torch.Size(stored.size)))
        if index in places:
            raise RuntimeError(f"{stored.key} {list(stored.start)} was written twice")
        places[index] = _StorageInfo(stored.file, stored.offset, stored.length)
    for key, tensor in found.items():
        if isinstance(tensor, TensorStorageMetadata):
            count = sum(prod(chunk.sizes) for chunk in tensor.chunks)
            if count != prod(tensor.size):
                raise RuntimeError(f"{key}: {count} of its {prod(tensor.size)} values were written")
    return Metadata(found, storage_data=places, version=CURRENT_DCP_VERSION)


def _failed(error: Exception) -> Written:
    if isinstance(error, StorageError):
        return Written(text=str(error), refused=True)
    cause = _of_the_disk(error)
    if cause is not None:
        return Written(error=cause.errno or errno.EIO, text=cause.strerror or str(cause))
    return Written(text=f"{type(error).__name__}: {error}")


def _raise_failure(written: Written, rank: int, partial: Path) -> None:
    if written.refused:
        raise StorageError(written.text)
    if written.error:
        cause = CAUSES.get(written.error, written.text)
        raise StorageError(
            f"{partial}: cannot be written by rank {rank}; {cause}, or set run_dir to another place; the checkpoints "
            "before it are whole"
        )
    if written.text:
        raise RuntimeError(f"rank {rank} could not write {partial}: {written.text}")


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
