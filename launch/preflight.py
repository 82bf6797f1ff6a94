"""Is every node fit to train? Under a minute; names the nodes that are not, and exits with 1 where there are any.

Started like the training itself, one task per GPU, alone or by train.sbatch (`megadpo launch --preflight`):

    srun --nodes=2 --ntasks-per-node=8 --gpus-per-node=8 python launch/preflight.py --run-dir RUN_DIR
    torchrun --nnodes 2 --nproc-per-node 8 ... launch/preflight.py --run-dir RUN_DIR

It compares versions over the nodes, looks at GPUs, memory and disks, checks that the run folder is one folder for all,
compares clocks, and times matrix products and an all-reduce. It needs torch only, so a node on which megadpo is missing
is reported like any other.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import platform
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("megadpo", "torch", "megatron-core", "transformer-engine", "transformers", "triton", "numpy")
GPU_FIELDS = ("name", "memory.total", "memory.used", "clocks.max.sm", "driver_version")  # MiB, MHz
GPU_TROUBLE = ("clocks_throttle_reasons.hw_slowdown", "ecc.errors.uncorrected.volatile.total")
MEETING = 40.0
"""Seconds within which every rank must have reported."""
SEEING = 10.0
"""Seconds that a file of another node gets to appear: network file systems keep lists of files for a while."""
COLLECTIVE = 30.0
"""Seconds for a collective."""
SKEW = 2.0
"""Largest difference of two clocks (seconds)."""
SLOW = 0.7
"""A GPU, or a node's network, below this part of the median is not fit."""
LITTLE = 0.5
"""A node with less than this part of the median's free memory is not fit: another program has it."""
USED = 2048
"""MiB of a GPU's memory that may be in use before the run."""
SIZE = {"cpu": 4 * 2**20, "cuda": 256 * 2**20}
"""Bytes of the timed all-reduce."""


@dataclass(frozen=True)
class Place:
    """This process among all."""

    rank: int
    world: int
    local_rank: int
    local_world: int
    address: str
    port: int

    @property
    def first_here(self) -> bool:
        return self.local_rank == 0

    @property
    def node(self) -> int:
        return self.rank // self.local_world


def place(environment: Mapping[str, str]) -> Place:
    """From torchrun's variables or SLURM's; alone without either."""

    def number(name: str, default: int) -> int:
        return int(environment.get(name, default))

    if "RANK" in environment:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        rank, world, local, here = (number(name, 1) for name in names)
    else:
        rank, world, local = (
            number(name, least)
            for name, least in (("SLURM_PROCID", 0), ("SLURM_STEP_NUM_TASKS", 1), ("SLURM_LOCALID", 0))
        )
        here = max(1, world // number("SLURM_STEP_NUM_NODES", 1))
    nodes = host_names(environment.get("SLURM_STEP_NODELIST", "")) or ["localhost"]
    port = 20000 + (number("SLURM_JOB_ID", 0) * 16 + number("SLURM_STEP_ID", 0)) % 10000
    return Place(rank, world, local, here, environment.get("MASTER_ADDR", nodes[0]), number("MASTER_PORT", port))


def host_names(nodes: str) -> list[str]:
    """SLURM's list notation written out: "gpu[003-004,9],login1" gives gpu003, gpu004, gpu9, login1."""
    names: list[str] = []
    for part in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", nodes):
        match = re.fullmatch(r"([^\[]*)\[([^\]]*)\](.*)", part)
        if not match:
            names.append(part)
            continue
        before, ranges, after = match.groups()
        for entry in ranges.split(","):
            low, _, high = entry.partition("-")
            numbers = range(int(low), int(high or low) + 1)
            names += [f"{before}{number:0{len(low)}}{after}" for number in numbers]
    return names


def host_name() -> str:
    """As SLURM calls the node; its own name may be longer."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


# ---- what a node says of itself


def node_facts(folders: list[Path]) -> dict[str, Any]:
    """Of this machine; nothing here takes the GPU. Disk and memory in GiB."""
    import torch

    found, driver, trouble = gpus()
    return {
        "versions": {
            "python": platform.python_version(),
            **{package: package_version(package) for package in PACKAGES},
            "megadpo's files": code_digest("megadpo"),
            "CUDA": str(torch.version.cuda),
            "GPU driver": driver,
        },
        "gpus": found,
        "trouble": trouble,
        "visible": torch.cuda.device_count(),
        "disk": {str(folder): shutil.disk_usage(folder).free / 2**30 for folder in folders if folder.exists()},
        "memory": free_memory(),
    }


def free_memory() -> float:
    """GiB that programs can still have, as Linux says; 0 where it does not."""
    try:
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        return 0.0
    return int(found[1]) / 2**20 if found else 0.0


def package_version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def code_digest(package: str) -> str:
    """Of the package's source files: two checkouts may have one version."""
    spec = importlib.util.find_spec(package)
    digest = hashlib.sha256()
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(folder).rglob("*.py")):
            digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12] if spec else "not installed"


def gpus() -> tuple[list[dict[str, str]], str, list[str]]:
    """(GPUs as nvidia-smi has them, driver, what is wrong with some); nothing where there is no nvidia-smi."""
    rows = query(GPU_FIELDS)
    found = [dict(zip(GPU_FIELDS, row, strict=True)) for row in rows]
    trouble = []
    for index, (slowed, errors) in enumerate(query(GPU_TROUBLE)):
        if slowed == "Active":
            trouble.append(f"GPU {index} is slowed down by its hardware (heat or power)")
        if errors.isdecimal() and int(errors) > 0:
            trouble.append(f"GPU {index} has {errors} uncorrected memory errors")
    return found, found[0]["driver_version"] if found else "none", trouble


def query(fields: tuple[str, ...]) -> list[list[str]]:
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines()]
    return [row for row in rows if len(row) == len(fields)] if done.returncode == 0 else []


# ---- what is wrong


def judge(ranks: dict[int, dict[str, Any]], here: Place, need_gb: float) -> dict[str, list[str]]:
    """What is wrong with each node, from what the ranks said (by rank); nodes with nothing wrong are left out.

    A node is compared with what most nodes have; of two that differ, with the first.
    """
    nodes = [ranks[rank] for rank in sorted(ranks) if "versions" in ranks[rank]]
    bad: dict[str, list[str]] = {}
    if not nodes:
        return bad
    usual = {name: most(node["versions"][name] for node in nodes) for name in nodes[0]["versions"]}
    usual_gpus = most(gpu_names(node) for node in nodes)
    usual_memory = statistics.median(node["memory"] for node in nodes)
    for node in nodes:
        found = [
            f"{name} is {node['versions'][name]}, elsewhere {usual[name]}"
            for name in usual
            if node["versions"][name] != usual[name]
        ]
        if gpu_names(node) != usual_gpus:
            found.append(f"its GPUs are {gpu_names(node)}, elsewhere {usual_gpus}")
        found += [*gpu_problems(node, here.local_world), *node["trouble"], *node["sharing"]]
        found += [
            f"{folder} has {free:.1f} GiB free, {need_gb:g} are asked for"
            for folder, free in node["disk"].items()
            if free < need_gb
        ]
        if node["memory"] < LITTLE * usual_memory:
            found.append(f"{node['memory']:.1f} GiB of its memory are free, elsewhere {usual_memory:.1f}")
        if found:
            bad[node["host"]] = found
    return bad


def most(values: Iterator[Any]) -> Any:
    return Counter(values).most_common(1)[0][0]


def gpu_names(node: dict[str, Any]) -> str:
    counts = Counter(gpu["name"] for gpu in node["gpus"])
    return ", ".join(f"{count} x {name}" for name, count in counts.items()) or "none"


def gpu_problems(node: dict[str, Any], ranks: int) -> list[str]:
    """Of a node with so many ranks. One visible GPU is what SLURM shows each task under --gpus-per-task."""
    found = []
    if node["gpus"] and node["visible"] == 0:
        found.append(f"torch sees none of its {len(node['gpus'])} GPUs")
    if 1 < node["visible"] < ranks:
        found.append(f"torch sees {node['visible']} GPUs for {ranks} ranks")
    for index, gpu in enumerate(node["gpus"]):
        if gpu["memory.used"].isdecimal() and int(gpu["memory.used"]) > USED:
            found.append(f"GPU {index} has {gpu['memory.used']} MiB in use by another program")
    return found


def judge_speed(timed: list[dict[str, Any]]) -> dict[str, list[str]]:
    """What is wrong with clocks and speeds, from what the ranks measured together."""
    bad: dict[str, list[str]] = {}
    clock = statistics.median(facts["time"] for facts in timed)
    for facts in timed:
        if facts["first_here"] and abs(facts["time"] - clock) > SKEW:
            away = facts["time"] - clock
            bad.setdefault(facts["host"], []).append(f"its clock is {away:+.1f} s away from the others'")
    for name, what in (("tflops", "computes"), ("pair", "exchanges data with its neighbours")):
        every = [facts[name] for facts in timed if facts[name] is not None]
        for facts in timed:
            if facts[name] is not None and facts[name] < SLOW * statistics.median(every):
                share = facts[name] / statistics.median(every)
                rank = f"GPU {facts['local_rank']} " if name == "tflops" else ""
                bad.setdefault(facts["host"], []).append(f"{rank}{what} at {share:.0%} of the usual speed")
    return bad


# ---- together


@contextmanager
def shared(store: Any, here: Place, folder: Path) -> Iterator[list[str]]:
    """What is wrong with the run folder: every node must be able to write there, and see the first rank's file, which
    stays until the end of the block."""
    mine = folder / f".preflight-{here.rank}"
    problems: list[str] = []
    nonce = f"{time.time_ns()}-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        mine.write_text(nonce)
    except OSError as error:
        problems.append(f"{folder} cannot be written ({error.strerror})")
    if here.rank == 0:
        store.set("nonce", nonce)
    elif not problems and not appears(folder / ".preflight-0", store.get("nonce").decode()):
        problems.append(f"{folder} is another folder here than on the first node: the file system is not shared")
    yield problems
    with suppress(OSError):
        mine.unlink(missing_ok=True)


def appears(path: Path, text: str) -> bool:
    end = time.monotonic() + SEEING
    while time.monotonic() < end:
        try:
            if path.read_text() == text:
                return True
        except OSError:
            pass
        time.sleep(0.2)
    return False


def measure(store: Any, here: Place, nodes: int) -> dict[str, Any]:
    """The clock after a barrier, TFLOP/s of this GPU, GB/s of the all-reduce and with the neighbouring nodes."""
    import torch
    import torch.distributed as dist

    cuda = torch.cuda.is_available()
    device = torch.device("cuda", here.local_rank % torch.cuda.device_count()) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        store=dist.PrefixStore("group", store),
        rank=here.rank,
        world_size=here.world,
        timeout=timedelta(seconds=COLLECTIVE),
    )

    def seconds(group: Any, size: int) -> float:
        values = torch.ones(size // 4, device=device)
        for _ in range(2):  # the first sets up the connections
            began = time.perf_counter()
            dist.all_reduce(values, group=group)
            values[0].item()
            taken = time.perf_counter() - began
        return taken

    size = SIZE[device.type]
    whole = seconds(None, size)
    dist.all_reduce(torch.ones(1, device=device))
    clock = time.time()
    pairs = []
    for first in (0, 1) if nodes > 2 and here.first_here else ():
        left = here.node - (here.node - first) % 2
        if left >= 0 and left + 1 < nodes:
            members = [left * here.local_world, (left + 1) * here.local_world]
            group = dist.new_group(members, use_local_synchronization=True)
            pairs.append(size / seconds(group, size) / 1e9)
    facts = {
        "rank": here.rank,
        "local_rank": here.local_rank,
        "first_here": here.first_here,
        "host": host_name(),
        "time": clock,
        "all_reduce": size / whole / 1e9,
        "pair": max(pairs) if pairs else None,
        "tflops": tflops(device) if cuda else None,
    }
    dist.destroy_process_group()
    return facts


def tflops(device: Any) -> float:
    """bfloat16 matrix products for about a second; a GPU that is hot or short of power is slower than its peers."""
    import torch

    side = 8192
    left, right = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for repeats in (5, 100):
        start.record()
        for _ in range(repeats):
            left @ right
        end.record()
        end.synchronize()
    return 2 * side**3 * repeats / start.elapsed_time(end) / 1e9


def gather(store: Any, here: Place, key: str, mine: dict[str, Any], seconds: float) -> dict[int, dict[str, Any]]:
    """On the first rank: what every rank said under `key`, of those that did in time. Elsewhere: nothing."""
    store.set(f"{key}/{here.rank}", json.dumps(mine))
    if here.rank != 0:
        return {}
    end, waiting, found = time.monotonic() + seconds, set(range(here.world)), {}
    while waiting and time.monotonic() < end:
        for rank in [rank for rank in waiting if store.check([f"{key}/{rank}"])]:
            found[rank] = json.loads(store.get(f"{key}/{rank}"))
            waiting.discard(rank)
        time.sleep(0.05)
    return found


def silent_nodes(found: dict[int, Any], here: Place, environment: Mapping[str, str]) -> dict[str, list[str]]:
    """The nodes of the ranks that said nothing."""
    names = host_names(environment.get("SLURM_STEP_NODELIST", ""))
    bad: dict[str, list[str]] = {}
    for rank in sorted(set(range(here.world)) - set(found)):
        node = rank // here.local_world
        bad.setdefault(names[node] if node < len(names) else f"node {node}", []).append(
            f"rank {rank} did not report: megadpo's environment or the network is missing there"
        )
    return bad


@contextmanager
def meeting(here: Place) -> Iterator[Any]:
    """The store over which the ranks speak; the first rank keeps it until all have read the verdict."""
    from torch.distributed import PrefixStore, TCPStore

    serves = here.rank == 0 and "TORCHELASTIC_USE_AGENT_STORE" not in os.environ  # torchrun has one at that port
    timeout = timedelta(seconds=MEETING)
    store = PrefixStore(
        "preflight", TCPStore(here.address, here.port, None, serves, timeout=timeout, wait_for_workers=False)
    )
    yield store
    end = time.monotonic() + 5
    store.add("read", 1)
    while here.rank == 0 and store.add("read", 0) < here.world and time.monotonic() < end:
        time.sleep(0.05)


def run(here: Place, run_dir: Path, need_gb: float) -> tuple[dict[str, list[str]], list[str]]:
    """What is wrong with each node and what was measured; on the first rank only. Others give whether all is well."""
    with meeting(here) as store:
        mine: dict[str, Any] = {"host": host_name()}
        with shared(store, here, run_dir) if here.first_here else nullcontext() as problems:
            if here.first_here:
                mine |= {"sharing": problems, **node_facts([run_dir, Path(tempfile.gettempdir())])}
            found = gather(store, here, "facts", mine, MEETING)
        if here.rank == 0:
            bad = judge(found, here, need_gb) | silent_nodes(found, here, os.environ)
            store.set("go", "no" if bad else "yes")
        if store.get("go") == b"no":
            return (bad, []) if here.rank == 0 else ({"": []}, [])
        nodes = here.world // here.local_world
        try:
            measured = measure(store, here, nodes)
        except Exception as error:  # whatever the network makes of it
            measured = {"error": f"rank {here.rank}: {str(error).splitlines()[0]}", "host": host_name()}
        every = gather(store, here, "speed", measured, 2 * COLLECTIVE)
        if here.rank != 0:
            store.wait(["verdict"], timedelta(seconds=2 * COLLECTIVE))
            return ({} if store.get("verdict") == b"fit" else {"": []}), []
        bad = silent_nodes(every, here, os.environ)
        for facts in every.values():
            if "error" in facts:
                bad.setdefault(facts["host"], []).append(f"the all-reduce failed: {facts['error']}")
        timed = [facts for facts in every.values() if "error" not in facts]
        lines: list[str] = []
        if timed and not bad:
            bad = judge_speed(timed)
            lines = speeds(timed)
        store.set("verdict", "not" if bad else "fit")
        return bad, lines


def speeds(timed: list[dict[str, Any]]) -> list[str]:
    clocks = [facts["time"] for facts in timed]
    lines = [
        f"all-reduce over all ranks: {statistics.median(facts['all_reduce'] for facts in timed):.2f} GB/s",
        f"clocks differ by at most {max(clocks) - min(clocks):.3f} s",
    ]
    products = [facts["tflops"] for facts in timed if facts["tflops"] is not None]
    if products:
        lines.append(f"bfloat16 matrix products: {min(products):.0f} to {max(products):.0f} TFLOP/s per GPU")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description="Check the nodes of a job.")
    parser.add_argument("--run-dir", type=Path, required=True, help="the run folder, which all nodes must share")
    parser.add_argument("--need-gb", type=float, default=1.0, help="GiB that must be free in it and in TMPDIR")
    parser.add_argument("--bad-nodes", type=Path, help="a file for the names of the nodes that are not fit")
    options = parser.parse_args()
    began, here = time.monotonic(), place(os.environ)
    bad, lines = run(here, options.run_dir.expanduser(), options.need_gb)
    if here.rank == 0:
        nodes = here.world // here.local_world
        print(f"preflight: {nodes} nodes x {here.local_world} ranks, {time.monotonic() - began:.1f} s")
        for line in lines:
            print(f"  {line}")
        for host, problems in bad.items():
            for problem in problems:
                print(f"  {host}: {problem}")
        print(f"preflight: not fit: {', '.join(bad)}" if bad else "preflight: every node is fit", flush=True)
        if options.bad_nodes:
            options.bad_nodes.write_text("".join(f"{host}\n" for host in bad))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
