"""Start the ranks of a job on this machine, or be one rank of the job that torchrun or SLURM started."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch

from megadpo.config import Config
from megadpo.launch.failure import RankFailedError
from megadpo.launch.join import join
from megadpo.launch.local import local_processes, run_local
from megadpo.launch.restart import restarted
from megadpo.launch.worker import Job
from megadpo.parallel.ranks import joined

__all__ = ["Job", "RankFailedError", "local_processes", "restarted", "start"]


def start(config: Config, job: Job, preload: Callable[[], object] | None = None) -> int:
    """Run `job(config, rank)` in every rank of the grid; returns the exit code, the largest of the ranks'.

    Under torchrun or SLURM this process is one rank. Otherwise it starts them all: forked where there is no
    GPU, after `preload`, which imports once what they need; spawned where there is one, and then `job` must
    be picklable.

    Ctrl-C, SIGTERM, SIGHUP and SIGUSR1 are passed on to the ranks once, and the end of all is awaited; a
    second Ctrl-C kills them. The MegadpoError of the rank that failed first is raised here; whatever else
    ends a rank raises RankFailedError.
    """
    rank = joined(os.environ)
    if rank is not None:
        return join(config, rank, job)
    gpus = torch.cuda.device_count()
    count = local_processes(config.parallel, gpus)
    if not gpus and preload is not None:
        preload()
    return run_local(config, job, count, "spawn" if gpus else "fork")
