"""Being a rank of somebody else's job: torchrun's variables, in this process and under the real torchrun."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megadpo.config import Config, DataConfig, ModelConfig, ParallelConfig
from megadpo.errors import ConfigError, DataError, MachineError
from megadpo.launch import RankFailedError
from megadpo.launch.join import join
from megadpo.parallel.ranks import Rank

ROOT = Path(__file__).resolve().parents[2]


def config_in(folder: Path, **grid: int) -> Config:
    return Config(
        run_dir=str(folder / "run"),
        model=ModelConfig(path="model"),
        data=DataConfig(train=("pairs.jsonl",)),
        parallel=ParallelConfig(**grid),
    )


def rank_of(number: int, world: int = 4, host: str = "localhost") -> Rank:
    return Rank(number, world, number, world, f"tcp://{host}:29555")


def test_the_job_runs_here(tmp_path):
    seen = []
    assert join(config_in(tmp_path), rank_of(2), lambda config, rank: seen.append(rank.rank) or 5) == 5
    assert seen == [2]


def test_a_world_that_the_grid_does_not_divide(tmp_path):
    with pytest.raises(ConfigError, match=r"tensor 3 x pipeline 1 = 3 processes.*4 were started"):
        join(config_in(tmp_path, tensor_model_parallel_size=3), rank_of(0), lambda config, rank: 0)


def test_a_world_of_another_size_than_asked(tmp_path):
    with pytest.raises(ConfigError, match=r"data 3 = 3 processes and 4 were started"):
        join(config_in(tmp_path, data_parallel_size=3), rank_of(0), lambda config, rank: 0)


def test_an_unknown_meeting_place_is_told_at_once(tmp_path):
    began = time.monotonic()
    with pytest.raises(MachineError, match=r"no-such-host\.invalid.*MASTER_ADDR"):
        join(config_in(tmp_path), rank_of(0, host="no-such-host.invalid"), lambda config, rank: 0)
    assert time.monotonic() - began < 10


def test_of_ranks_that_fail_together_one_speaks(tmp_path):
    def job(config, rank):
        raise DataError("the same everywhere")

    with pytest.raises(DataError, match="the same everywhere"):
        join(config_in(tmp_path), rank_of(1), job)
    with pytest.raises(RankFailedError) as caught:
        join(config_in(tmp_path), rank_of(3), job)
    assert str(caught.value) == ""
    assert caught.value.exit_code == 2


def test_a_new_start_speaks_again(tmp_path):
    def job(config, rank):
        raise DataError("once more")

    for _ in range(2):
        with pytest.raises(DataError):
            join(config_in(tmp_path), rank_of(0), job)


@pytest.mark.parametrize(
    ("number", "code", "kept", "returned"),
    [(0, 138, "138\n", 0), (0, 0, "0\n", 0), (2, 138, None, 0)],
)
def test_the_jobs_exit_code_goes_into_a_file(tmp_path, monkeypatch, number, code, kept, returned):
    """srun ends the other ranks at the first code that is not 0, and they may still close files after a stop."""
    end = tmp_path / "end"
    monkeypatch.setenv("MEGADPO_END_FILE", str(end))
    assert join(config_in(tmp_path), rank_of(number), lambda config, rank: code) == returned
    assert (end.read_text() if end.exists() else None) == kept


def test_the_first_mistake_is_the_jobs_exit_code(tmp_path, monkeypatch):
    end = tmp_path / "end"
    monkeypatch.setenv("MEGADPO_END_FILE", str(end))

    def mistaken(config, rank):
        raise DataError("the same everywhere")

    def crashed(config, rank):
        raise ValueError("its peer is gone")

    with pytest.raises(DataError):
        join(config_in(tmp_path), rank_of(3), mistaken)
    with pytest.raises(RankFailedError):
        join(config_in(tmp_path), rank_of(1), crashed)
    assert end.read_text() == "2\n"


SCRIPT = """
import os, signal, sys, time
import torch, torch.distributed as dist
from megadpo.config import Config, DataConfig, ModelConfig
from megadpo.launch import start
from megadpo.parallel.context import from_first_rank, join_world

def job(config, rank):
    join_world(rank.rank, rank.world_size, rank.local_rank, rank.init_method)
    attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]

    def work(sign):
        time.sleep(1)  # the other rank looks for an answer meanwhile
        return f"of attempt {attempt}"

    text = from_first_rank(rank.rank, rank.world_size, work)
    if attempt == "0" and rank.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    total = torch.tensor([1.0 + rank.rank])
    dist.all_reduce(total)
    print(f"{text}: sum {total.item()} on {rank.rank} of {rank.world_size}", file=sys.__stdout__, flush=True)
    dist.destroy_process_group()
    return 0

sys.exit(start(Config(sys.argv[1], ModelConfig("m"), DataConfig(("d",))), job))
"""


def test_under_the_real_torchrun(tmp_path):
    """A rank is killed, and torchrun starts both again: they find nothing of the attempt before in its store."""
    script = tmp_path / "job.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [*command, "--max-restarts", "1", str(script), str(tmp_path / "run")],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "of attempt 1: sum 3.0 on 0 of 2"
    assert "of attempt 1: sum 3.0 on 1 of 2" in (tmp_path / "run" / "logs" / "rank-1.log").read_text()
