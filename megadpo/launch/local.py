"""The ranks of a job as processes of this machine: started, told to stop, ended, and their end understood."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from megadpo.config import Config, ParallelConfig
from megadpo.errors import MachineError
from megadpo.files import storage_errors
from megadpo.launch.failure import HUNG, RankFailedError, failure, hung, killed, rank_log, tidy
from megadpo.launch.worker import Job, Outcome, rank_main, read_outcome
from megadpo.observe.progress import restore_cursor
from megadpo.parallel.ranks import Rank
from megadpo.parallel.stop import ASKING
from megadpo.parallel.watchdog import STACKS

SETTLE = 1.0
"""Seconds that the other ranks get to end by themselves, once one has failed."""
GRACE = 5.0
"""Seconds between SIGTERM and SIGKILL."""
LOOK = 1.0
"""Seconds between two looks for ranks that someone stopped."""


def local_processes(parallel: ParallelConfig, gpus: int) -> int:
    """Processes to start on a machine with so many GPUs (0: one without). MachineError: they are too few."""
    tensor, pipeline = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    replicas = parallel.data_parallel_size or max(1, gpus // (tensor * pipeline))
    count = tensor * pipeline * replicas
    if gpus and count > gpus:
        raise MachineError(
            f"the grid is tensor {tensor} x pipeline {pipeline} x data {replicas} = {count} processes, one "
            f"for each GPU, and this machine has {gpus}; make the sizes under parallel smaller, or start on "
            "several machines with torchrun or SLURM"
        )
    return count


def run_local(config: Config, job: Job, count: int, method: Literal["fork", "spawn"]) -> int:
    """Run the job in `count` processes; returns the largest exit code. Raises as `launch.start` says."""
    logs = rank_log(config, 0).parent
    with storage_errors(logs):
        logs.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix="megadpo-") as folder:
            return _run(config, job, count, method, Path(folder))
    finally:
        restore_cursor()
        tidy(logs)


def _run(config: Config, job: Job, count: int, method: Literal["fork", "spawn"], folder: Path) -> int:
    added = {"GLOO_SOCKET_IFNAME": _loopback()}
    if "CUDA_DEVICE_MAX_CONNECTIONS" not in os.environ:
        added["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"  # Megatron-Core's tensor parallelism counts on this order
    threads = None
    if count > 1 and "OMP_NUM_THREADS" not in os.environ:
        threads = max(1, len(os.sched_getaffinity(0)) // count)
        added["OMP_NUM_THREADS"] = str(threads)
    context: Any = multiprocessing.get_context(method)
    processes: list[BaseProcess] = []
    for number in range(count):
        rank = Rank(number, count, number, count, f"file://{folder}/rendezvous")
        log = rank_log(config, number)
        arguments = (config, rank, job, log, folder, os.getpid(), threads)
        processes.append(context.Process(target=rank_main, args=arguments, name=f"rank {number}"))
    team = Team(processes, folder, config.train.hang_timeout)
    with team.listening():
        with _environment(added):
            team.start()
        team.wait()
    return _understood(team, config)


class Team:
    """The ranks' processes. Once one has failed, or the user insists, the others are ended."""

    def __init__(self, processes: list[BaseProcess], folder: Path, hang_timeout: float = 0.0) -> None:
        """hang_timeout: seconds that a rank may be stopped for; 0: for ever."""
        self.processes = processes
        self.hung: set[int] = set()
        """Ranks that ended themselves as hung, or were stopped for too long."""
        self._hang_timeout = hang_timeout
        self._stopped_since: dict[int, float] = {}
        self.outcomes: dict[int, Outcome] = {}
        """What the ranks said of their end, of those that said something."""
        self.gone: dict[int, float] = {}
        """When a rank was seen to be gone (monotonic seconds)."""
        self.signum: int | None = None
        """The signal by which the user asked for a stop."""
        self.ended: set[int] = set()
        """Ranks that were running when the others were ended."""
        self._folder = folder
        self._asked_at = 0.0
        self._plan: list[tuple[float, signal.Signals]] = []
        """What is left to do to end the others: (when, signal)."""

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Pass on the signals that ask for a stop."""
        before = {signum: signal.getsignal(signum) for signum in ASKING}
        try:
            for signum, handler in before.items():
                if handler != signal.SIG_IGN:
                    signal.signal(signum, self._asked)
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)

    def start(self) -> None:
        """Start every process, with the signals blocked until it is ready for them."""
        before = signal.pthread_sigmask(signal.SIG_BLOCK, ASKING)
        try:
            for process in self.processes:
                process.start()
        except OSError as error:
            self._send(signal.SIGKILL)
            raise MachineError(
                f"the processes of the grid could not all be started ({error.strerror}); end other programs, "
                "raise the limit on processes (ulimit -u), or use a smaller grid"
            ) from error
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def wait(self) -> None:
        """Return when every process has ended."""
        running = dict(enumerate(self.processes))
        while running:
            pause = max(0.0, self._plan[0][0] - time.monotonic()) if self._plan else LOOK
            connection.wait([process.sentinel for process in running.values()], pause)
            self._look_for_stopped(running)
            for rank, process in list(running.items()):
                if process.exitcode is None:
                    continue
                del running[rank]
                self.gone[rank] = time.monotonic()
                outcome = read_outcome(self._folder, rank)
                if outcome is not None:
                    self.outcomes[rank] = outcome
                if outcome is None and process.exitcode == HUNG:
                    self.hung.add(rank)
                    self._ask_for_stacks()
                if (outcome is None or outcome.kind != "returned") and not self._plan and not self.ended:
                    now = time.monotonic()
                    self._plan = [(now + SETTLE, signal.SIGTERM), (now + SETTLE + GRACE, signal.SIGKILL)]
            while self._plan and time.monotonic() >= self._plan[0][0]:
                self._send(self._plan.pop(0)[1])

    def _look_for_stopped(self, running: dict[int, BaseProcess]) -> None:
        """A process that someone stopped (SIGSTOP) can tell nobody; after the time that a hung rank has, it is one."""
        now = time.monotonic()
        for rank, process in running.items():
            if not self._hang_timeout or self._plan or self.ended or not stopped(process.pid or 0):
                self._stopped_since.pop(rank, None)
            elif now - self._stopped_since.setdefault(rank, now) > self._hang_timeout:
                self.hung.add(rank)
        if self.hung and not self._plan and not self.ended:
            self._ask_for_stacks()
            self._plan = [(now + SETTLE, signal.SIGTERM), (now + SETTLE + GRACE, signal.SIGKILL)]

    def _ask_for_stacks(self) -> None:
        """Of every rank that still runs; one that was stopped has to go on for it."""
        for process in self._alive():
            with suppress(ProcessLookupError):
                os.kill(process.pid or 0, STACKS)
                os.kill(process.pid or 0, signal.SIGCONT)

    def _asked(self, signum: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.signum is None:
            self.signum, self._asked_at = signum, now
            for process in self._alive():
                with suppress(ProcessLookupError):
                    os.kill(process.pid or 0, signum)
        elif signum == signal.SIGINT and now - self._asked_at > 1:
            self._send(signal.SIGKILL)

    def _send(self, signum: signal.Signals) -> None:
        """Signal every rank that still runs; SIGKILL goes to its helpers too."""
        for rank, process in enumerate(self.processes):
            if process not in self._alive():
                continue
            self.ended.add(rank)
            with suppress(ProcessLookupError):
                os.kill(process.pid or 0, signum)
                if signum == signal.SIGKILL:
                    os.killpg(process.pid or 0, signum)

    def _alive(self) -> list[BaseProcess]:
        return [process for process in self.processes if process.pid is not None and process.exitcode is None]


def _understood(team: Team, config: Config) -> int:
    """The exit code, or the exception that explains why there is none."""
    outcomes = team.outcomes
    if team.hung:
        raise hung(sorted(team.hung), rank_log(config, 0).parent)
    causes: list[tuple[float, Exception]] = []
    for rank, process in enumerate(team.processes):
        log, outcome = rank_log(config, rank), outcomes.get(rank)
        if outcome is not None and outcome.kind in ("refused", "crashed"):
            causes.append((outcome.at, failure(outcome, log)))
        if outcome is None and rank not in team.ended:
            # Nothing but the kernel or a person sends SIGKILL, so it is never a consequence.
            first = process.exitcode == -signal.SIGKILL
            causes.append((0.0 if first else team.gone[rank], killed(rank, process.exitcode or 0, log)))
    if causes:
        raise min(causes, key=lambda cause: cause[0])[1]
    interrupted = [rank for rank, outcome in outcomes.items() if outcome.kind == "interrupted"]
    if team.signum is not None and (interrupted or len(outcomes) < len(team.processes)):
        return 128 + team.signum
    for rank in interrupted:
        name = signal.Signals(outcomes[rank].code - 128).name
        raise RankFailedError(f"rank {rank} was stopped by {name}, the others with it", outcomes[rank].code)
    return max(outcome.code for outcome in outcomes.values())


def stopped(pid: int) -> bool:
    """Whether Linux says that the process is stopped (state T); never elsewhere."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except (OSError, IndexError):
        return False


def _loopback() -> str:
    """The interface that only this machine can reach: lo on Linux, lo0 elsewhere."""
    return next((name for _, name in socket.if_nameindex() if name.startswith("lo")), "lo")


@contextmanager
def _environment(added: dict[str, str]) -> Iterator[None]:
    """Variables for the processes that start inside; this process has its own again afterwards."""
    before = {name: os.environ.get(name) for name in added}
    os.environ.update(added)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
