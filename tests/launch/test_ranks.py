"""Which rank a process is, from the variables of torchrun and SLURM."""

import pytest

from megadpo.errors import MachineError
from megadpo.parallel.ranks import Rank, first_host, joined, tasks_per_node

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "29500",
}
SLURM = {
    "SLURM_JOB_ID": "1234567",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_STEP_TASKS_PER_NODE": "4,3",
    "SLURM_STEP_NODELIST": "gpu[007-008]",
}


def test_nobody_started_us():
    assert joined({}) is None


def test_torchrun():
    assert joined(TORCHRUN) == Rank(5, 8, 1, 4, "tcp://node1:29500")


def test_an_address_of_ipv6_is_bracketed():
    rank = joined(TORCHRUN | {"MASTER_ADDR": "fe80::1"})
    assert rank is not None
    assert rank.init_method == "tcp://[fe80::1]:29500"


def test_torchrun_comes_before_slurm():
    rank = joined(SLURM | TORCHRUN)
    assert rank is not None
    assert rank.world_size == 8


@pytest.mark.parametrize("missing", ["LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"])
def test_torchrun_incomplete(missing):
    with pytest.raises(MachineError, match=missing):
        joined({name: value for name, value in TORCHRUN.items() if name != missing})


@pytest.mark.parametrize(
    ("name", "value"),
    [("RANK", "x"), ("RANK", "8"), ("LOCAL_RANK", "4"), ("MASTER_PORT", "")],
)
def test_torchrun_with_impossible_numbers(name, value):
    with pytest.raises(MachineError, match=r"torchrun|whole number"):
        joined(TORCHRUN | {name: value})


def test_slurm():
    rank = joined(SLURM)
    assert rank is not None
    assert (rank.rank, rank.world_size, rank.local_rank, rank.local_world_size) == (5, 7, 1, 3)
    assert rank.init_method == f"tcp://gpu007:{20000 + 1234567 * 16 % 10000}"


def test_slurm_steps_of_one_job_meet_at_different_ports():
    one, other = joined(SLURM), joined(SLURM | {"SLURM_STEP_ID": "1"})
    assert one is not None
    assert other is not None
    assert one.init_method != other.init_method


def test_slurm_with_a_meeting_place_of_the_users():
    rank = joined(SLURM | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "7000"})
    assert rank is not None
    assert rank.init_method == "tcp://10.0.0.1:7000"


def test_a_batch_script_is_no_rank():
    """sbatch sets the job's tasks and rank 0 for the script itself; waiting for the others would hang."""
    assert joined({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}) is None


def test_a_step_of_one_task_starts_its_own_processes():
    assert joined(SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}) is None


def test_slurm_without_nodes():
    with pytest.raises(MachineError, match="MASTER_ADDR"):
        joined({name: value for name, value in SLURM.items() if name != "SLURM_STEP_NODELIST"})


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("gpu[003-012,20],login1", "gpu003"),
        ("gpu[5,7-9]", "gpu5"),
        ("rack[1-2]n[01-16]-ib,x", "rack1n01-ib"),
        ("", ""),
    ],
)
def test_first_host(nodes, first):
    assert first_host(nodes) == first


def test_tasks_per_node():
    assert tasks_per_node("4(x2),3") == [4, 4, 3]
    assert tasks_per_node("") == []
