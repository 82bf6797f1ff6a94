"""Local ranks: started, told to stop, failing, killed. Jobs here are trivial; no Megatron-Core."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megadpo.config import Config, DataConfig, ModelConfig, ParallelConfig
from megadpo.errors import ConfigError, DataError, MachineError, StorageError
from megadpo.launch import RankFailedError, local_processes, start
from megadpo.launch.local import run_local
from megadpo.launch.worker import Job
from megadpo.parallel.ranks import Rank
from megadpo.parallel.stop import StopSignal


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch):
    for name in [*os.environ]:
        if name.startswith("SLURM_") or name in ("RANK", "WORLD_SIZE", "OMP_NUM_THREADS"):
            monkeypatch.delenv(name)


@pytest.fixture
def config(tmp_path):
    return Config(
        run_dir=str(tmp_path / "run"),
        model=ModelConfig(path="model"),
        data=DataConfig(train=("pairs.jsonl",)),
        parallel=ParallelConfig(data_parallel_size=2),
    )


def run(config: Config, job: Job) -> int:
    """Always forked, so that jobs may be functions of a test."""
    return run_local(config, job, 2, "fork")


def note(config: Config, rank: Rank, text: object) -> None:
    Path(config.run_dir, f"note-{rank.rank}").write_text(str(text))


def notes(config: Config) -> list[str]:
    return [Path(config.run_dir, f"note-{rank}").read_text() for rank in range(2)]


def log_of(config: Config, rank: int) -> str:
    return Path(config.run_dir, "logs", f"rank-{rank}.log").read_text()


def meet(rank: Rank) -> None:
    dist.init_process_group("gloo", init_method=rank.init_method, rank=rank.rank, world_size=rank.world_size)


def test_ranks_reduce_over_loopback(config):
    def job(config, rank):
        meet(rank)
        value = torch.tensor([float(rank.rank + 1)])
        dist.all_reduce(value)
        note(
            config,
            rank,
            (value.item(), os.environ["GLOO_SOCKET_IFNAME"], torch.get_num_threads(), rank.local_rank),
        )
        dist.destroy_process_group()
        return 0

    assert run(config, job) == 0
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    assert notes(config) == [str((3.0, "lo", threads, rank)) for rank in range(2)]
    assert "GLOO_SOCKET_IFNAME" not in os.environ
    assert not Path(config.run_dir, "logs").exists(), "logs in which nothing stands are removed"


def test_start_counts_the_grid_and_preloads_once(config, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    loaded = []

    def job(config, rank):
        note(config, rank, (rank.world_size, loaded))
        return 0

    assert start(config, job, preload=lambda: loaded.append(1)) == 0
    assert notes(config) == ["(2, [1])"] * 2


def test_the_largest_exit_code_is_returned(config):
    assert run(config, lambda config, rank: 3 * rank.rank) == 3


def test_spawned_ranks_work_too(config):
    assert run_local(config, spawned_job, 2, "spawn") == 0
    assert notes(config) == ["0 of 2", "1 of 2"]


def spawned_job(config, rank):
    note(config, rank, f"{rank.rank} of {rank.world_size}")
    return 0


# ---- failures


def test_a_mistake_in_one_rank_is_raised_once_and_ends_the_others(config):
    def job(config, rank):
        if rank.rank == 1:
            raise DataError("pairs.jsonl:3: no JSON; mend the line")
        time.sleep(60)
        return 0

    began = time.monotonic()
    with pytest.raises(DataError, match=r"^pairs.jsonl:3: no JSON; mend the line$"):
        run(config, job)
    assert time.monotonic() - began < 10
    assert not Path(config.run_dir).exists(), "a run that never began leaves nothing"


def test_the_first_failure_is_the_cause(config):
    def job(config, rank):
        meet(rank)
        if rank.rank == 1:
            raise ConfigError("the cause")
        dist.all_reduce(torch.zeros(1))  # fails as its peer is gone
        return 0

    with pytest.raises(ConfigError, match="the cause"):
        run(config, job)


def test_a_crash_is_told_with_rank_and_traceback(config):
    def job(config, rank):
        if rank.rank == 1:
            raise ValueError("odd thing")
        time.sleep(60)
        return 0

    with pytest.raises(RankFailedError, match=r"rank 1 failed with ValueError.*rank-1\.log") as caught:
        run(config, job)
    assert caught.value.exit_code == 1
    assert "ValueError: odd thing" in caught.value.traceback
    assert "ValueError: odd thing" in log_of(config, 1)


def test_a_killed_rank_is_named(config):
    def job(config, rank):
        meet(rank)
        if rank.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        dist.all_reduce(torch.zeros(1))
        return 0

    with pytest.raises(RankFailedError, match=r"rank 1 was killed by SIGKILL; out of memory is the usual") as caught:
        run(config, job)
    assert caught.value.exit_code == 128 + signal.SIGKILL


def test_a_rank_that_leaves_without_a_word_is_named(config):
    def job(config, rank):
        if rank.rank == 0:
            os._exit(7)
        time.sleep(60)
        return 0

    with pytest.raises(RankFailedError, match="rank 0 ended with exit code 7"):
        run(config, job)


def test_a_rank_that_ignores_sigterm_is_killed(config, monkeypatch):
    monkeypatch.setattr("megadpo.launch.local.SETTLE", 0.1)
    monkeypatch.setattr("megadpo.launch.local.GRACE", 0.3)

    def job(config, rank):
        with StopSignal():
            note(config, rank, os.getpid())
            while rank.rank == 0 and not Path(config.run_dir, "note-1").exists():
                time.sleep(0.01)
            if rank.rank == 0:
                raise ConfigError("no")
            while True:
                time.sleep(1)

    with pytest.raises(ConfigError, match="no"):
        run(config, job)
    with pytest.raises(ProcessLookupError):
        os.kill(int(notes(config)[1]), 0)


def test_a_folder_that_cannot_be_written(config, tmp_path):
    (tmp_path / "run").write_text("a file in the way")
    with pytest.raises(StorageError, match="run"):
        run(config, lambda config, rank: 0)


# ---- the terminal


def test_only_rank_0_reaches_the_terminal(config, capfd):
    def job(config, rank):
        sys.stdout.write(f"library {rank.rank}\n")
        os.write(2, b"C++ library\n")
        sys.stderr.write("to stderr\n")
        assert sys.__stdout__ is not None
        sys.__stdout__.write(f"our own line {rank.rank}\n")
        sys.__stdout__.flush()
        return 0

    assert run(config, job) == 0
    terminal = capfd.readouterr()
    assert "our own line 0" in terminal.out
    assert "our own line 1" not in terminal.out
    assert "library" not in terminal.out + terminal.err
    assert "to stderr" not in terminal.out + terminal.err
    for rank in range(2):
        log = log_of(config, rank)
        assert f"library {rank}" in log
        assert "C++ library" in log
    assert "our own line 1" in log_of(config, 1)


# ---- signals


def send_later(signum: int, config: Config, *more: tuple[float, int]) -> threading.Thread:
    """Send signals to this process once both ranks have left a note."""

    def send() -> None:
        while not all(Path(config.run_dir, f"note-{rank}").exists() for rank in range(2)):
            time.sleep(0.02)
        os.kill(os.getpid(), signum)
        for pause, again in more:
            time.sleep(pause)
            os.kill(os.getpid(), again)

    thread = threading.Thread(target=send)
    thread.start()
    return thread


def train_until_stopped(config, rank):
    """A loop with step boundaries, as training has."""
    with StopSignal() as stop:
        note(config, rank, "ready")
        while not stop.requested:
            time.sleep(0.02)
        Path(config.run_dir, f"saved-{rank.rank}").touch()
        return stop.exit_code


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_ranks_are_asked_to_stop_and_awaited(config, signum):
    thread = send_later(signum, config, (0.0, signum))
    assert run(config, train_until_stopped) == 128 + signum
    thread.join()
    assert all(Path(config.run_dir, f"saved-{rank}").exists() for rank in range(2))


def test_a_signal_before_training_cleans_up(config):
    def job(config, rank):
        try:
            note(config, rank, "ready")
            time.sleep(60)
        finally:
            Path(config.run_dir, f"cleaned-{rank.rank}").touch()
        return 0

    thread = send_later(signal.SIGINT, config)
    began = time.monotonic()
    assert run(config, job) == 128 + signal.SIGINT
    thread.join()
    assert time.monotonic() - began < 5
    assert all(Path(config.run_dir, f"cleaned-{rank}").exists() for rank in range(2))


def test_a_second_ctrl_c_ends_a_rank_that_does_not(config):
    def job(config, rank):
        with StopSignal():
            note(config, rank, os.getpid())
            time.sleep(60)
            time.sleep(60)
        return 0

    thread = send_later(signal.SIGINT, config, (1.2, signal.SIGINT))
    assert run(config, job) == 128 + signal.SIGINT
    thread.join()
    for pid in notes(config):
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)


def test_handlers_are_put_back(config):
    before = signal.getsignal(signal.SIGTERM)
    run(config, lambda config, rank: 0)
    assert signal.getsignal(signal.SIGTERM) is before


def test_ranks_end_with_their_parent(config):
    """Even where the parent is killed and can tell them nothing."""
    script = (
        "import sys, os, time, pathlib\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import test_launch as t\n"
        "from megadpo.config import *\n"
        f"config = Config(run_dir={config.run_dir!r}, model=ModelConfig('m'), data=DataConfig(('d',)))\n"
        "def job(config, rank):\n"
        "    t.note(config, rank, os.getpid())\n"
        "    time.sleep(60)\n"
        "    return 0\n"
        "t.run(config, job)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script])
    while not all(Path(config.run_dir, f"note-{rank}").exists() for rank in range(2)):
        assert parent.poll() is None
        time.sleep(0.02)
    pids = [int(text) for text in notes(config) if text]
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 5
    while any(running(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(running(pid) for pid in pids)


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# ---- how many


@pytest.mark.parametrize(
    ("tensor", "pipeline", "data", "gpus", "count"),
    [
        (1, 1, None, 0, 1),
        (2, 2, None, 0, 4),
        (2, 1, 3, 0, 6),
        (1, 1, None, 8, 8),
        (2, 2, None, 8, 8),
        (2, 1, 2, 8, 4),
        (3, 1, None, 8, 6),
    ],
)
def test_local_processes(tensor, pipeline, data, gpus, count):
    grid = ParallelConfig(tensor, pipeline, data_parallel_size=data)
    assert local_processes(grid, gpus) == count


@pytest.mark.parametrize(("tensor", "data", "gpus"), [(4, None, 2), (2, 2, 2), (2, None, 1)])
def test_more_processes_than_gpus(tensor, data, gpus):
    with pytest.raises(MachineError, match=f"this machine has {gpus}"):
        local_processes(ParallelConfig(tensor, data_parallel_size=data), gpus)
