"""Every shipped configuration compiles for every GPU in the list, without one, and what comes out is sound."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from megadpo_kernels import configs
from megadpo_kernels.configs import KernelConfig
from tune_kernels import merged

pytest.importorskip("triton", reason="Triton is not installed: kernels cannot be compiled")

HERE = Path(__file__).parent
SHARED_MEMORY = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99, 121: 99}
"""KiB of shared memory that one program may have."""


@pytest.fixture(scope="module", params=["", pytest.param("--all", marks=pytest.mark.slow)])
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")), "CUDA_VISIBLE_DEVICES": ""}
    program = [sys.executable, str(HERE / "compile_kernels.py"), *request.param.split()]
    done = subprocess.run(program, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def name_of(kernel: dict[str, Any]) -> str:
    return f"{kernel['name']} {kernel['constants']} {kernel['warps']} warps sm_{kernel['architecture']}"


def test_all_are_there(built: list[dict[str, Any]]) -> None:
    """What training can launch: every combination of dtype and flags, at least on one architecture."""
    assert {kernel["architecture"] for kernel in built} >= {80, 90, 100, 120}
    assert len({name_of(kernel) + str(kernel["types"]) for kernel in built}) == len(built)
    seen = {
        (k["name"], *(v for n, v in k["constants"].items() if n != "BLOCK"), k["types"].get("slopes")) for k in built
    }
    for capped in (False, True):
        assert {("row_stats_kernel", capped, extra, None) for extra in (0, 1, 2)} <= seen
        for entropy in (False, True):
            assert {("slope_kernel", capped, entropy, kind) for kind in ("*bf16", "*fp16", "*fp32")} <= seen
    copies = {kernel["types"]["sums"] for kernel in built if kernel["name"] == "add_copies_kernel"}
    assert copies == {"*bf16", "*fp16", "*fp32"}


def test_tuned_rows_are_compiled_for_their_architecture_once() -> None:
    """Rows as tools/tune_kernels.py adds them: one that says what the table says, one with other warps, one dtype's."""
    import compile_kernels

    def names(*added: KernelConfig) -> set[str]:
        found = compile_kernels.jobs(merged(configs.shipped(), added), everything=False)
        kept = [name_of(vars(variant) | {"architecture": arch}) + str(variant.types) for variant, arch in found]
        assert len(set(kept)) == len(kept)
        return set(kept)

    shipped = names()
    assert names(KernelConfig("row_stats", "sm_90", 16032, 4096, 8)) == shipped
    wider = names(KernelConfig("row_stats", "sm_90", 16032, 4096, 16)) - shipped
    assert len(wider) == 6
    assert all("16 warps sm_90" in name for name in wider)
    half = names(KernelConfig("slope", "sm_89", 16032, 2048, 8, "float16")) - shipped
    assert len(half) == 4
    assert all("sm_89" in name and "'slopes': '*fp16'" in name for name in half)


def test_no_spills_and_within_the_chip(built: list[dict[str, Any]]) -> None:
    for kernel in built:
        assert kernel["stack"] == 0, name_of(kernel)
        assert not {op for op in kernel["opcodes"] if op.startswith(("LDL", "STL"))}, name_of(kernel)
        assert kernel["registers"] <= 255, name_of(kernel)
        # 65536 registers on a multiprocessor: at least two programs at a time
        assert kernel["registers"] * kernel["warps"] * 32 * 2 <= 65536, name_of(kernel)
        assert kernel["shared"] <= 1024 * SHARED_MEMORY[kernel["architecture"]], name_of(kernel)


def test_no_atomics(built: list[dict[str, Any]]) -> None:
    for kernel in built:
        assert not {op for op in kernel["opcodes"] if op.startswith(("ATOM", "RED."))}, name_of(kernel)


def test_rows_are_read_and_written_16_bytes_at_a_time(built: list[dict[str, Any]]) -> None:
    for kernel in built:
        if kernel["name"] not in ("row_stats_kernel", "slope_kernel"):
            continue
        opcodes = kernel["opcodes"]
        per_thread = kernel["constants"]["BLOCK"] // (kernel["warps"] * 32)
        assert opcodes["LDG.E.128"] == per_thread // 4, name_of(kernel)
        # what is left are scalars of the row: target and its logit; or target, normaliser (3), upstream gradient, and
        # for the entropy its value and its upstream gradient
        narrow = sum(n for op, n in opcodes.items() if op.startswith("LDG") and op != "LDG.E.128")
        scalars = 2 if kernel["name"] == "row_stats_kernel" else 7 if kernel["constants"]["ENTROPY"] else 5
        assert narrow == scalars, name_of(kernel)
        if kernel["name"] == "slope_kernel":
            width = {"*fp32": 4, "*bf16": 2, "*fp16": 2}[kernel["types"]["slopes"]]
            stores = {op: n for op, n in opcodes.items() if op.startswith("STG")}
            assert stores == {"STG.E.128": per_thread * width // 16}, name_of(kernel)


def test_copies_are_read_and_written_16_bytes_at_a_time(built: list[dict[str, Any]]) -> None:
    for kernel in built:
        if kernel["name"] == "add_copies_kernel":
            loads = {
                op for op in kernel["opcodes"] if op.startswith("LDG") and "64" not in op
            }  # 64: its place, a scalar
            stores = {op for op in kernel["opcodes"] if op.startswith("STG")}
            assert loads == {"LDG.E.128"}, name_of(kernel)
            assert stores == {"STG.E.128"}, name_of(kernel)


def test_slopes_are_rounded_to_nearest_and_wait_for_the_loads(built: list[dict[str, Any]]) -> None:
    for kernel in built:
        if kernel["name"] == "slope_kernel":
            assert kernel["opcodes"]["BAR.SYNC.DEFER_BLOCKING"] >= 1, name_of(kernel)
            if kernel["types"]["slopes"] != "*fp32":
                assert kernel["ptx_rounding"], name_of(kernel)
                assert all(op.startswith("cvt.rn.") for op in kernel["ptx_rounding"]), name_of(kernel)
