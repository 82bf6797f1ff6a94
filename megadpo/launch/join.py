"""Being one rank of a job that torchrun or SLURM started."""

from __future__ import annotations

import os
import socket
import time
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

from megadpo.config import Config
from megadpo.config.check import check_world
from megadpo.errors import ConfigError, MachineError, StorageError
from megadpo.files import write_text
from megadpo.launch.failure import RankFailedError, failure, rank_log, tidy
from megadpo.launch.worker import Job, run_rank
from megadpo.parallel.ranks import Rank

END_FILE = "MEGADPO_END_FILE"
"""Variable with the path of a file for the job's exit code: srun's own depends on which rank ends first."""
RECENT = 60.0
"""Seconds within which ranks that fail count as failing together."""


def join(config: Config, rank: Rank, job: Job) -> int:
    """Run the job as this rank in this process; returns its exit code, or leaves that in the file END_FILE names.

    Of ranks that fail together only the first raises the mistake or the fault. The others raise a
    RankFailedError without words, and what they met stands in their logs.
    """

    def checked(config: Config, rank: Rank) -> int:
        problems = check_world(config.parallel, rank.world_size)
        if problems:
            raise ConfigError(problems[0])
        check_host(rank)
        return job(config, rank)

    log, end = rank_log(config, rank.rank), os.environ.get(END_FILE)
    spoken = log.with_name(".first-failure")
    if rank.rank == 0:
        spoken.unlink(missing_ok=True)
    started = time.time()
    outcome = run_rank(config, rank, checked, log)
    failed = outcome.kind in ("refused", "crashed")
    first = failed and _speaks_first(spoken, started)
    if end and (first or outcome.kind == "interrupted" or (rank.rank == 0 and not failed)):
        with suppress(StorageError):  # on a full disk what the run met there is the news
            write_text(Path(end), f"{outcome.code}\n")
    if rank.rank == 0:
        tidy(log.parent)
    if first:
        raise failure(outcome, log)
    if failed:
        raise RankFailedError("", outcome.code)
    # Another code than 0 has srun kill the ranks that still close their files after a stop.
    return 0 if end and outcome.kind == "returned" else outcome.code


def check_host(rank: Rank) -> None:
    """torch tries an unknown host again for many minutes; find out at once. Raises MachineError."""
    host = urlsplit(rank.init_method).hostname
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        raise MachineError(
            f"{host}, where the ranks are to meet, is not known to this machine; set MASTER_ADDR to a name "
            "or address of rank 0's machine that every machine can reach, and MASTER_PORT to a free port"
        ) from None


def _speaks_first(spoken: Path, started: float) -> bool:
    """Whether no other rank of this start has spoken; the first leaves a file.

    Where that cannot be written, every rank speaks.
    """
    try:
        if spoken.exists() and spoken.stat().st_mtime < started - RECENT:
            spoken.unlink(missing_ok=True)
        os.close(os.open(spoken, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        return False
    except OSError:
        return True
    return True
