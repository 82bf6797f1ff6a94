"""Tokenising in several processes, in order."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cache
from itertools import chain, islice

from megadpo.data.records import Dropped, Group
from megadpo.data.tokenize import Limit, Marking, Tokenized, tokenize_group
from megadpo.data.tokenizer import Tokenizer, load_tokenizer
from megadpo.errors import MachineError, TokenizerError

CHUNK = 256
"""Groups that a process tokenises at a time; one record batch of the store."""
SMALL = 2048
"""A data set of at most so many groups is done sooner than other processes are started."""

Item = Group | Dropped
Outcome = Tokenized | Dropped


@dataclass(frozen=True)
class Job:
    """All that a tokenising process is told."""

    tokenizer: str
    chat_template: str | None
    digest: str
    limit: Limit
    marking: Marking


def tokenize_all(items: Iterator[Item], tokenizer: Tokenizer, job: Job, processes: int) -> Iterator[list[Outcome]]:
    """What becomes of the items, in their order, in lists of up to CHUNK."""
    first = list(islice(items, SMALL + 1))
    chunks = _chunks(chain(first, items))
    if processes == 1 or len(first) <= SMALL:
        for chunk in chunks:
            yield _tokenize_chunk(chunk, tokenizer, job)
        return
    # Spawned, not forked: this process may have threads, and a fork keeps their locks but not the threads.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, initializer=_start_process) as pool:
        waiting: deque[Future[list[Outcome]]] = deque()
        try:
            for chunk in chunks:
                waiting.append(pool.submit(_work, chunk, job))
                if len(waiting) > 4 * processes:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise MachineError(
                "a tokenising process was killed, most likely for want of memory; lower data.num_proc"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _chunks(items: Iterable[Item]) -> Iterator[list[Item]]:
    iterator = iter(items)
    while chunk := list(islice(iterator, CHUNK)):
        yield chunk


def _tokenize_chunk(items: list[Item], tokenizer: Tokenizer, job: Job) -> list[Outcome]:
    return [
        item if isinstance(item, Dropped) else tokenize_group(item, tokenizer, job.limit, job.marking) for item in items
    ]


def _start_process() -> None:
    """The environment is changed here, in the child, and nowhere else."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    faulthandler.register(signal.SIGUSR2, all_threads=True)  # as in the ranks (parallel/watchdog.py)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A parent that is killed cannot end its children."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(items: list[Item], job: Job) -> list[Outcome]:
    return _tokenize_chunk(items, _load_once(job), job)


@cache
def _load_once(job: Job) -> Tokenizer:
    tokenizer = load_tokenizer(job.tokenizer, job.chat_template)
    if tokenizer.digest != job.digest:
        raise TokenizerError(f"{job.tokenizer}: the tokenizer changed while it was in use; prepare the data again")
    return tokenizer
