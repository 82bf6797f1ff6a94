"""Which rank of how many this process is, and where the ranks meet. No torch here."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from megadpo.errors import MachineError

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# Below the ports that Linux and some clusters hand out by themselves (32768 and 9000 upwards are both seen).
FIRST_PORT, PORTS = 20000, 10000


@dataclass(frozen=True)
class Rank:
    """One process of a job."""

    rank: int
    world_size: int
    local_rank: int
    """Its number among the processes on its node."""
    local_world_size: int
    init_method: str
    """Where the ranks meet, as torch.distributed writes it: file:///path or tcp://host:port."""


def joined(environment: Mapping[str, str]) -> Rank | None:
    """The rank that torchrun or SLURM's srun gave this process; None where neither started it.

    Raises MachineError where their variables are incomplete or no numbers.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        return _from_torchrun(environment)
    # A batch script and an allocation's shell have SLURM_PROCID too; only srun counts its step's tasks.
    if "SLURM_PROCID" in environment and _number(environment, "SLURM_STEP_NUM_TASKS", 1) > 1:
        return _from_slurm(environment)
    return None


def _from_torchrun(environment: Mapping[str, str]) -> Rank:
    missing = [name for name in TORCHRUN if name not in environment]
    if missing:
        raise MachineError(
            f"RANK and WORLD_SIZE are set but {', '.join(missing)} not: start megadpo with torchrun, or "
            "unset RANK and WORLD_SIZE to let it start its own processes"
        )
    return _checked(
        Rank(
            rank=_number(environment, "RANK"),
            world_size=_number(environment, "WORLD_SIZE"),
            local_rank=_number(environment, "LOCAL_RANK"),
            local_world_size=_number(environment, "LOCAL_WORLD_SIZE"),
            init_method=_tcp(environment["MASTER_ADDR"], _number(environment, "MASTER_PORT")),
        )
    )


def _from_slurm(environment: Mapping[str, str]) -> Rank:
    """MASTER_ADDR and MASTER_PORT decide where both are set.

    Else the ranks meet on the step's first node, where rank 0 runs, at a port of the job's own.
    """
    if "MASTER_ADDR" in environment and "MASTER_PORT" in environment:
        host, port = environment["MASTER_ADDR"], _number(environment, "MASTER_PORT")
    else:
        nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
        host = first_host(nodes)
        step = _number(environment, "SLURM_JOB_ID", 0) * 16 + _number(environment, "SLURM_STEP_ID", 0)
        port = FIRST_PORT + step % PORTS
    if not host:
        raise MachineError("SLURM_STEP_NODELIST is empty: set MASTER_ADDR to the first node and MASTER_PORT to a port")
    tasks = tasks_per_node(environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
    node = _number(environment, "SLURM_NODEID", 0)
    world = _number(environment, "SLURM_STEP_NUM_TASKS")
    return _checked(
        Rank(
            rank=_number(environment, "SLURM_PROCID"),
            world_size=world,
            local_rank=_number(environment, "SLURM_LOCALID"),
            local_world_size=tasks[node] if node < len(tasks) else world,
            init_method=_tcp(host, port),
        )
    )


def first_host(nodes: str) -> str:
    """The first host of SLURM's list notation: "gpu[003-012,20],login1" gives "gpu003"."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first.group() if first else "")


def tasks_per_node(text: str) -> list[int]:
    """SLURM's run-length notation: "4(x2),3" gives [4, 4, 3]."""
    counts: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        counts += [int(count)] * int(times or 1)
    return counts


def _tcp(host: str, port: int) -> str:
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def _number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environment.get(name, "" if default is None else str(default))
    if not text.isdecimal():
        raise MachineError(f"{name} = {text!r} in the environment: must be a whole number")
    return int(text)


def _checked(rank: Rank) -> Rank:
    if rank.rank >= rank.world_size or rank.local_rank >= rank.local_world_size:
        raise MachineError(
            f"rank {rank.rank} of {rank.world_size}, {rank.local_rank} of {rank.local_world_size} here: "
            "the variables of torchrun or SLURM do not fit together; start from a clean shell"
        )
    return rank
