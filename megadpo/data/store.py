"""The tokenised data set: a folder that every rank maps into memory, and the reference columns beside it.

groups.arrow              one row per group: origin, prompt ids, response ids (Arrow IPC, int32 ids); label and score
                          of each response, marks of its tokens (see `SCHEMA`)
store.json                digest, counts and the report of the preparation; written last
reference-<digest>.arrow  log-probabilities of every response under one reference model
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from megadpo.data.report import PrepareReport
from megadpo.data.tokenize import BODY, SCORED, TokenizedGroup
from megadpo.errors import StorageError
from megadpo.files import storage_errors

LAYOUT = 2
GROUPS_FILE = "groups.arrow"
HEADER_FILE = "store.json"
SCHEMA = pa.schema(
    [
        ("origin", pa.string()),
        ("prompt", pa.list_(pa.int32())),
        ("responses", pa.list_(pa.list_(pa.int32()))),
        ("labels", pa.list_(pa.int8())),
        ("scores", pa.list_(pa.float32())),
        ("marks", pa.list_(pa.uint8())),
    ]
)
"""labels: 1 desirable, 0 not, -1 none. scores: NaN where there is none. marks: of all response tokens of the group, one
response after the other (tokenize.SCORED, BODY); empty in every group where the data need none."""

Ids = npt.NDArray[np.int32]


@dataclass(frozen=True)
class _Chunk:
    """One record batch as arrays that point into the file."""

    origins: pa.Array
    prompt_offsets: Ids
    prompt_ids: Ids
    group_offsets: Ids
    response_offsets: Ids
    response_ids: Ids
    labels: npt.NDArray[np.int8]
    scores: npt.NDArray[np.float32]
    marks: npt.NDArray[np.uint8]


class ReferenceColumns:
    """The reference columns of a store with S responses, kept in its folder."""

    folder: Path
    digest: str
    response_lengths: Ids

    def write_reference(self, digest: str, logps_S: npt.NDArray[np.float64]) -> None:
        """Keep the responses' log-probabilities under the reference `digest`: nats, float64 [S], NaN where unknown."""
        if logps_S.shape != (len(self.response_lengths),) or logps_S.dtype != np.float64:
            raise ValueError(f"reference column: float64 [{len(self.response_lengths)}] wanted, got {logps_S!r}")
        values = np.ascontiguousarray(logps_S)
        metadata = {"store": self.digest, "reference": digest, "sha256": _sha256(values)}
        schema = pa.schema([("logp", pa.float64())], metadata=metadata)
        target = self._reference_file(digest)
        temporary = target.with_name(f".{target.name}.{os.getpid()}")
        with storage_errors(target, "data.cache_dir"):
            try:
                with temporary.open("wb") as file:
                    with pa.ipc.new_file(file, schema) as writer:
                        writer.write(pa.record_batch([pa.array(values)], schema=schema))
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, target)
            finally:
                temporary.unlink(missing_ok=True)

    def reference(self, digest: str) -> npt.NDArray[np.float64] | None:
        """float64 [S] (NaN: not known), or None where no column was written for `digest`. Raises StorageError where the
        column is damaged or was made for other tokens."""
        path = self._reference_file(digest)
        if not path.is_file():
            return None
        again = "delete it to compute it again"
        try:
            table = pa.ipc.open_file(path.read_bytes()).read_all()
            values = np.array(table.column("logp").to_numpy(), dtype=np.float64)
            known = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
        except (OSError, KeyError, ValueError, pa.ArrowException) as error:
            raise StorageError(f"{path}: not a readable reference column ({error}); {again}") from error
        if known.get("store") != self.digest or known.get("reference") != digest:
            raise StorageError(f"{path}: the reference column of other data or of another model; {again}")
        if known.get("sha256") != _sha256(values) or len(values) != len(self.response_lengths):
            raise StorageError(f"{path}: the reference column is damaged (its checksum does not fit); {again}")
        return values

    def _reference_file(self, digest: str) -> Path:
        if not re.fullmatch(r"[\w-]{1,128}", digest):
            raise ValueError(f"a digest may have letters, digits, - and _ only: {digest!r}")
        return self.folder / f"reference-{digest}.arrow"


class GroupStore(ReferenceColumns):
    """G groups with S responses in a folder.

    digest: sha256 over the ids of all groups in their order; equal exactly for equal tokens.
    prompt_lengths: int32 [G]. response_lengths: int32 [S]. scored_lengths: int32 [S], tokens of each response that
    count (all where nothing is marked).
    offsets: int64 [G + 1]; the responses of group g are offsets[g] to offsets[g + 1].
    labels_S: bool [S], whether each response is a desirable one; None where the data have no labels.
    scores_S: float32 [S], NaN where a response has none; None where none has one.
    bodies: whether formatting tokens are told from others.
    """

    def __init__(self, folder: Path, header: dict[str, Any], chunks: Sequence[_Chunk]) -> None:
        self.folder = folder
        self.digest: str = header["digest"]
        self.vocab_size: int = header["vocab_size"]
        self.report = PrepareReport(**header["report"])
        self._chunks = chunks
        self._sha256: str | None = header.get("sha256")
        self._stat = os.stat(folder / GROUPS_FILE)
        self._starts = np.cumsum([0] + [len(chunk.origins) for chunk in chunks])
        self.prompt_lengths = _joined([np.diff(chunk.prompt_offsets) for chunk in chunks], np.int32)
        self.response_lengths = _joined([np.diff(chunk.response_offsets) for chunk in chunks], np.int32)
        self.scored_lengths = _joined([_scored(chunk) for chunk in chunks], np.int32)
        labels = _joined([chunk.labels for chunk in chunks], np.int8)
        self.labels_S: npt.NDArray[np.bool_] | None = labels == 1 if (labels >= 0).any() else None
        scores = _joined([chunk.scores for chunk in chunks], np.float32)
        self.scores_S: npt.NDArray[np.float32] | None = None if np.isnan(scores).all() else scores
        self.bodies: bool = any((chunk.marks & BODY).any() for chunk in chunks)
        counts = _joined([np.diff(chunk.group_offsets) for chunk in chunks], np.int64)
        self.offsets: npt.NDArray[np.int64] = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])

    @classmethod
    def open(cls, folder: str | Path) -> GroupStore:
        """Maps the folder. Raises StorageError where it is not a whole store."""
        folder = Path(folder)
        again = "delete the folder and prepare the data again"
        try:
            header = json.loads((folder / HEADER_FILE).read_text())
            size = (folder / GROUPS_FILE).stat().st_size
            if header["layout"] != LAYOUT:
                raise StorageError(f"{folder}: a store of layout {header['layout']}, not {LAYOUT}; {again}")
            if size != header["bytes"]:
                raise StorageError(f"{folder / GROUPS_FILE}: {size} bytes, but {header['bytes']} were written; {again}")
            reader = pa.ipc.open_file(pa.memory_map(str(folder / GROUPS_FILE)))
            chunks = [_chunk(reader.get_batch(number)) for number in range(reader.num_record_batches)]
            return cls(folder, header, chunks)
        except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
            raise StorageError(f"{folder}: not a prepared data set ({error}); {again}") from error

    def __len__(self) -> int:
        return len(self.prompt_lengths)

    def check_bytes(self) -> None:
        """Read the whole file (about 1 GB/s) and raise StorageError where a byte is not as it was written. Stores that
        were made before this was kept are not checked."""
        with (self.folder / GROUPS_FILE).open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if self._sha256 is not None and found != self._sha256:
            raise StorageError(
                f"{self.folder / GROUPS_FILE}: damaged: its SHA-256 is not the one that was written; delete the folder "
                "and prepare the data again"
            )

    @property
    def changed(self) -> bool:
        """Whether the mapped file was written to since it was opened. A file that was replaced or deleted stays mapped
        as it was."""
        try:
            now = os.stat(self.folder / GROUPS_FILE)
        except OSError:
            return False
        before = self._stat
        return now.st_ino == before.st_ino and (now.st_size, now.st_mtime_ns) != (before.st_size, before.st_mtime_ns)

    def group(self, number: int) -> TokenizedGroup:
        """Group `number`, 0 to G - 1; its ids point into the file and are read-only."""
        if not 0 <= number < len(self):
            raise IndexError(f"group {number} of {len(self)}")
        which = int(np.searchsorted(self._starts, number, side="right")) - 1
        chunk = self._chunks[which]
        row = int(number - self._starts[which])
        first, last = chunk.group_offsets[row], chunk.group_offsets[row + 1]
        spans = [slice(chunk.response_offsets[r], chunk.response_offsets[r + 1]) for r in range(first, last)]
        labels, scores = chunk.labels[first:last], chunk.scores[first:last]
        return TokenizedGroup(
            origin=chunk.origins[row].as_py(),
            prompt_ids=chunk.prompt_ids[chunk.prompt_offsets[row] : chunk.prompt_offsets[row + 1]],
            response_ids=tuple(chunk.response_ids[span] for span in spans),
            labels=tuple((labels == 1).tolist()) if (labels >= 0).all() else None,
            scores=None if np.isnan(scores).any() else tuple(scores.tolist()),
            marks=tuple(chunk.marks[span] for span in spans) if len(chunk.marks) else None,
        )

    def key(self, number: int) -> str:
        """Hash of the ids of group `number`: what it is, wherever it stands."""
        return group_key(self.group(number))


def group_key(group: TokenizedGroup) -> str:
    """sha256 over (prompt ids, response ids, and labels, scores and marks where it has them), lengths included, so that
    no two groups share a spelling."""
    digest = hashlib.sha256()
    for ids in (group.prompt_ids, *group.response_ids):
        digest.update(len(ids).to_bytes(8, "little"))
        digest.update(np.ascontiguousarray(ids, dtype="<i4").tobytes())
    for name, values in (("labels", group.labels), ("scores", group.scores), ("marks", group.marks)):
        if values is not None:
            digest.update(name.encode())
            digest.update(np.concatenate([np.atleast_1d(value) for value in values]).astype("<f4").tobytes())
    return digest.hexdigest()


@dataclass
class StoreWriter:
    """Writes a store into an existing folder, batch by batch."""

    folder: Path
    vocab_size: int
    groups: int = 0
    _digest: Any = field(default_factory=hashlib.sha256)

    def __enter__(self) -> StoreWriter:
        with storage_errors(self.folder, "data.cache_dir"):
            self._file = (self.folder / GROUPS_FILE).open("wb")
        self._writer = pa.ipc.new_file(self._file, SCHEMA)
        return self

    def add(self, groups: Sequence[TokenizedGroup]) -> None:
        """Appends one record batch."""
        if not groups:
            return
        for group in groups:
            self._digest.update(group_key(group).encode())
        self.groups += len(groups)
        with storage_errors(self.folder, "data.cache_dir"):
            self._writer.write(_record_batch(groups))

    def finish(self, report: PrepareReport) -> None:
        """Writes what makes the folder a store."""
        with storage_errors(self.folder, "data.cache_dir"):
            self._writer.close()
            self._file.flush()
            os.fsync(self._file.fileno())
            with (self.folder / GROUPS_FILE).open("rb") as written:
                sha256 = hashlib.file_digest(written, "sha256").hexdigest()
            header = {
                "layout": LAYOUT,
                "sha256": sha256,
                "digest": self._digest.hexdigest(),
                "bytes": self._file.tell(),
                "groups": self.groups,
                "vocab_size": self.vocab_size,
                "report": asdict(report),
            }
            with (self.folder / HEADER_FILE).open("w") as file:
                json.dump(header, file, indent=1)
                file.flush()
                os.fsync(file.fileno())

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _record_batch(groups: Sequence[TokenizedGroup]) -> pa.RecordBatch:
    responses = [ids for group in groups for ids in group.response_ids]
    prompts = _list_array([group.prompt_ids for group in groups])
    counts = np.cumsum([0] + [len(group.response_ids) for group in groups]).astype(np.int32)
    per_group = pa.ListArray.from_arrays(pa.array(counts), _list_array(responses))
    origins = pa.array([group.origin for group in groups], pa.string())
    labels = pa.ListArray.from_arrays(
        pa.array(counts),
        pa.array([int(label) for g in groups for label in g.labels or [-1] * len(g.response_ids)], pa.int8()),
    )
    scores = pa.ListArray.from_arrays(
        pa.array(counts),
        pa.array([score for g in groups for score in g.scores or [np.nan] * len(g.response_ids)], pa.float32()),
    )
    marks = _list_array([np.concatenate(g.marks) if g.marks else np.zeros(0, np.uint8) for g in groups])
    return pa.record_batch([origins, prompts, per_group, labels, scores, marks], schema=SCHEMA)


def _list_array(parts: Sequence[npt.NDArray[Any]]) -> pa.ListArray:
    offsets = np.cumsum([0] + [len(part) for part in parts]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(parts)))


def _chunk(batch: pa.RecordBatch) -> _Chunk:
    origins, prompts, per_group, labels, scores, marks = (batch.column(name) for name in SCHEMA.names)
    return _Chunk(
        origins=origins,
        prompt_offsets=prompts.offsets.to_numpy(),
        prompt_ids=prompts.values.to_numpy(),
        group_offsets=per_group.offsets.to_numpy(),
        response_offsets=per_group.values.offsets.to_numpy(),
        response_ids=per_group.values.values.to_numpy(),
        labels=labels.values.to_numpy(),
        scores=scores.values.to_numpy(),
        marks=marks.values.to_numpy(),
    )


def _scored(chunk: _Chunk) -> npt.NDArray[np.int64]:
    """Scored tokens of each response [S]."""
    if not len(chunk.marks):
        return np.diff(chunk.response_offsets)
    before = np.concatenate([np.zeros(1, np.int64), np.cumsum((chunk.marks & SCORED) > 0)])
    return np.diff(before[chunk.response_offsets])


def _joined(parts: list[Any], dtype: Any) -> Any:
    return np.concatenate(parts).astype(dtype) if parts else np.zeros(0, dtype)


def _sha256(values: npt.NDArray[np.float64]) -> str:
    return hashlib.sha256(values.astype("<f8").tobytes()).hexdigest()
