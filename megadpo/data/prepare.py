"""From data files to a store of token ids, once: cached, in parallel, and before any process group exists."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from megadpo.data.kinds import Wanted, converted
from megadpo.data.processes import Job, tokenize_all
from megadpo.data.records import Dropped, Group, read_groups
from megadpo.data.report import Tally
from megadpo.data.sources import source_digest
from megadpo.data.store import HEADER_FILE, GroupStore, StoreWriter
from megadpo.data.tokenize import OVER_BUDGET, RULES, Limit, Marking, Tokenized
from megadpo.data.tokenizer import Tokenizer, load_tokenizer
from megadpo.errors import ConfigError, DataError
from megadpo.files import storage_errors

if TYPE_CHECKING:  # the run file's types bring torch with them, which tokenising processes do not need
    from megadpo.config import BatchConfig, DataConfig


def prepare(
    sources: tuple[str, ...],
    data: DataConfig,
    model_path: str,
    wanted: Wanted,
    batch: BatchConfig | None = None,
    on_progress: Callable[[int], None] | None = None,
    on_end: Callable[[], None] = lambda: None,
) -> GroupStore:
    """The store of `sources` under data.cache_dir; made now where it is not there yet.

    wanted: the kind of data and what of it, see `kinds.wanted`. batch: where it sets micro_batch_tokens, no group takes
    more rows of a stream than that. on_progress is told the rows done so far; on_end is called before
    the store is brought to the disk. Several processes may prepare the same data at once. Raises DataError,
    TokenizerError, ConfigError, StorageError.
    """
    tokenizer = load_tokenizer(data.tokenizer or model_path, data.chat_template)
    limit = _limit(data, batch, wanted)
    folder = store_folder(sources, data, limit, tokenizer, wanted)
    if (folder / HEADER_FILE).is_file():
        return GroupStore.open(folder)
    if data.max_length < 2:
        raise ConfigError(f"data.max_length = {data.max_length}: must be at least 2, a prompt token and one more")
    _make(folder, sources, data, limit, model_path, tokenizer, wanted, on_progress, on_end)
    return GroupStore.open(folder)


def prepared(
    sources: tuple[str, ...], data: DataConfig, model_path: str, wanted: Wanted, batch: BatchConfig | None = None
) -> GroupStore | None:
    """What `prepare` would give where it has nothing to do; None where it would have to make it. Raises as it does."""
    tokenizer = load_tokenizer(data.tokenizer or model_path, data.chat_template)
    folder = store_folder(sources, data, _limit(data, batch, wanted), tokenizer, wanted)
    return GroupStore.open(folder) if (folder / HEADER_FILE).is_file() else None


def _limit(data: DataConfig, batch: BatchConfig | None, wanted: Wanted) -> Limit:
    limit = Limit(data.max_length, data.truncation_mode)
    if batch is None or batch.micro_batch_tokens is None:
        return limit
    return replace(limit, rows=batch.micro_batch_tokens, share=batch.share_prompt, scalar=wanted.scalar)


def store_folder(
    sources: tuple[str, ...], data: DataConfig, limit: Limit, tokenizer: Tokenizer, wanted: Wanted
) -> Path:
    """cache_dir/<digest of all that decides which ids come out, and of nothing else>."""
    decides = {
        "rules": RULES,
        "sources": [source_digest(source, data.split) for source in sources],
        "format": data.format,
        "tokenizer": tokenizer.digest,
        "limit": asdict(limit),
        "wanted": wanted.decides(),
    }
    digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:32]
    return Path(data.cache_dir).expanduser() / digest


def _make(
    folder: Path,
    sources: tuple[str, ...],
    data: DataConfig,
    limit: Limit,
    model_path: str,
    tokenizer: Tokenizer,
    wanted: Wanted,
    on_progress: Callable[[int], None] | None,
    on_end: Callable[[], None],
) -> None:
    """Writes beside `folder` and renames at the end, so that `folder` is a whole store or is not there."""
    start = time.monotonic()
    job = Job(
        data.tokenizer or model_path, data.chat_template, tokenizer.digest, limit, Marking(wanted.loss_on, wanted.body)
    )
    who = f"{socket.gethostname()}-{os.getpid()}-{threading.get_ident()}"
    temporary = folder.with_name(f"{folder.name}.tmp-{who}")
    with storage_errors(temporary, "data.cache_dir"):
        temporary.mkdir(parents=True)
    try:
        tally = Tally()
        with StoreWriter(temporary, tokenizer.vocab_size) as writer:
            for outcomes in tokenize_all(_items(sources, data, wanted, tally), tokenizer, job, _processes(data)):
                writer.add([outcome.group for outcome in outcomes if isinstance(outcome, Tokenized)])
                for outcome in outcomes:
                    tally.add(outcome)
                if on_progress is not None:
                    on_progress(tally.done)
            on_end()
            report = tally.report(tokenizer.template_source, time.monotonic() - start)
            if not report.groups:
                raise DataError(f"{', '.join(sources)}: nothing to train on; {'; '.join(report.lines())}")
            over = report.over_budget + report.dropped.get(OVER_BUDGET, 0)
            if over > (report.groups + report.dropped.get(OVER_BUDGET, 0)) / 2:
                raise ConfigError(
                    f"batch.micro_batch_tokens = {limit.rows}: {over} of {report.rows_read} groups take more "
                    "rows; raise it, leave it out (then the longest group fits), or lower data.max_length"
                )
            writer.finish(report)
        _publish(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _publish(temporary: Path, folder: Path) -> None:
    """Where another process was first, its store stands: it has the same name, so the same ids."""
    with storage_errors(folder, "data.cache_dir"):
        try:
            temporary.rename(folder)
        except OSError:
            if not (folder / HEADER_FILE).is_file():
                raise


def _items(sources: tuple[str, ...], data: DataConfig, wanted: Wanted, tally: Tally) -> Iterator[Group | Dropped]:
    """Every row as groups of the wanted kind, or as what was dropped."""
    for source in sources:
        for item in read_groups(source, data.split, data.format, tally.note_format):
            items = converted(item, wanted) if isinstance(item, Group) else [item]
            tally.note_row(item, items)
            yield from items


def _processes(data: DataConfig) -> int:
    return data.num_proc or min(8, len(os.sched_getaffinity(0)))
