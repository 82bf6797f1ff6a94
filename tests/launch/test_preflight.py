"""The checks of the nodes: what is found wrong, and with which node. tests/slurm runs them on nodes."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FILE = Path(__file__).resolve().parents[2] / "launch" / "preflight.py"


@pytest.fixture(scope="module")
def preflight() -> ModuleType:
    spec = importlib.util.spec_from_file_location("preflight", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["preflight"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


GPU = {"name": "H100", "memory.total": "81559", "memory.used": "4", "clocks.max.sm": "1980", "driver_version": "550"}


def nodes(count: int = 4, **changed: Any) -> dict[int, dict[str, Any]]:
    """What the first ranks of so many nodes of two GPUs say; the node n3 has the changes."""
    usual = {
        "versions": {"torch": "2.10", "GPU driver": "550"},
        "gpus": [GPU, GPU],
        "trouble": [],
        "visible": 2,
        "disk": {"/run": 100.0},
        "memory": 500.0,
        "sharing": [],
    }
    return {2 * n: {**usual, "host": f"n{n + 1}", **(changed if n == 2 else {})} for n in range(count)}


def here(preflight: ModuleType, world: int = 8) -> Any:
    return preflight.Place(0, world, 0, 2, "n1", 1)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"versions": {"torch": "2.9", "GPU driver": "550"}}, "torch is 2.9, elsewhere 2.10"),
        ({"gpus": [GPU]}, "its GPUs are 1 x H100, elsewhere 2 x H100"),
        ({"gpus": []}, "its GPUs are none, elsewhere 2 x H100"),
        ({"visible": 0}, "torch sees none of its 2 GPUs"),
        ({"gpus": [GPU, GPU | {"memory.used": "70000"}]}, "GPU 1 has 70000 MiB in use by another program"),
        ({"trouble": ["GPU 0 has 3 uncorrected memory errors"]}, "GPU 0 has 3 uncorrected memory errors"),
        ({"disk": {"/run": 0.2}}, "/run has 0.2 GiB free, 1 are asked for"),
        ({"memory": 200.0}, "200.0 GiB of its memory are free, elsewhere 500.0"),
        ({"sharing": ["/run cannot be written (Read-only file system)"]}, "/run cannot be written"),
    ],
)
def test_the_bad_node_is_named(preflight: ModuleType, changed: dict[str, Any], expected: str) -> None:
    assert preflight.judge(nodes(), here(preflight), 1.0) == {}
    bad = preflight.judge(nodes(**changed), here(preflight), 1.0)
    assert list(bad) == ["n3"]
    assert any(text.startswith(expected) for text in bad["n3"])


def test_a_node_that_says_nothing_is_named(preflight: ModuleType) -> None:
    found = {rank: {} for rank in (0, 1, 2, 3, 6, 7)}
    bad = preflight.silent_nodes(found, here(preflight), {"SLURM_STEP_NODELIST": "gpu[009-011,3]"})
    assert list(bad) == ["gpu011"]


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"time": 1003.5}, "its clock is +3.5 s away from the others'"),
        ({"tflops": 300.0}, "GPU 0 computes at 50% of the usual speed"),
        ({"pair": 5.0}, "exchanges data with its neighbours at 50% of the usual speed"),
    ],
)
def test_slow_nodes_and_wrong_clocks(preflight: ModuleType, changed: dict[str, Any], expected: str) -> None:
    usual = {"local_rank": 0, "first_here": True, "time": 1000.0, "tflops": 600.0, "pair": 10.0, "all_reduce": 9.0}
    timed = [{**usual, "host": f"n{n}"} for n in range(1, 5)]
    assert preflight.judge_speed(timed) == {}
    timed[2] |= changed
    assert preflight.judge_speed(timed) == {"n3": [expected]}


def test_places_under_slurm_torchrun_and_alone(preflight: ModuleType) -> None:
    slurm = {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_NODES": "2"}
    place = preflight.place(slurm | {"SLURM_STEP_NODELIST": "a[07-08]", "SLURM_JOB_ID": "3", "SLURM_STEP_ID": "2"})
    assert (place.rank, place.world, place.local_world, place.node, place.address) == (5, 8, 4, 1, "a07")
    assert place.port == 20050
    torchrun = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    place = preflight.place(torchrun | {"MASTER_ADDR": "h", "MASTER_PORT": "7"})
    assert (place.rank, place.local_rank, place.node, place.address, place.port) == (3, 1, 1, "h", 7)
    assert preflight.place({}).world == 1


def test_lists_of_hosts(preflight: ModuleType) -> None:
    assert preflight.host_names("gpu[003-004,9]-ib,login1") == ["gpu003-ib", "gpu004-ib", "gpu9-ib", "login1"]
