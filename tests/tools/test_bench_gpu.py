"""tools/bench_gpu.py: a toy on a CPU from the command line to the table, and the table from figures."""

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import bench_gpu
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'kernels'}")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def answered(text: str, code: int = 0, error: str = "") -> Any:
    def run(command: Sequence[str]) -> "subprocess.CompletedProcess[str]":
        return subprocess.CompletedProcess(command, code, text, error)

    return run


MEASURED = {
    "device": "NVIDIA H200", "driver": "570", "versions": {"torch": "2.13"}, "commit": "abc", "seconds": 4.0,
    "seconds_lowest": 3.9, "seconds_highest": 4.1, "tokens_per_second": 1e4, "pairs_per_second": 8.0,
    "perf/mfu": 0.41, "perf/peak_memory_gib": 101.5,
}  # fmt: skip


def test_a_toy_from_the_command_line(tmp_path: Path) -> None:
    """One row is measured; those that need a GPU say so, as do the tables."""
    output = tmp_path / "toy.md"
    arguments = ["--tiny", "--output", str(output)]
    assert bench_gpu.main([*arguments, "--parts", "rows", "--only", "bf16, resident, 256"]) == 0
    assert bench_gpu.main([*arguments, "--parts", "rows,kernels", "--only", "FP8"]) == 0
    assert bench_gpu.main([*arguments, "--parts", "kernels"]) == 0
    lines = output.read_text().splitlines()
    [row] = [line for line in lines if line.startswith("| bf16, resident, 256 |")]
    assert "not measured" not in row
    assert "not known" in row  # MFU: a CPU has no peak here
    fp8 = [line for line in lines if line.startswith("| FP8")]
    assert len(fp8) == 10
    assert all("| not measured |" in line and "needs a GPU" in line for line in fp8)
    assert "not measured: needs a GPU (tools/results/kernels-cpu.md has a CPU's)" in lines
    kept = json.loads(output.with_suffix(".json").read_text())
    assert kept["rows"]["bf16, resident, 256"]["perf/tflops_per_gpu"] > 0


def test_figures_become_a_table_with_predictions(tmp_path: Path) -> None:
    size = bench_gpu.LLAMA_8B
    name = "bf16, precomputed, 4096"
    rows = {
        name: MEASURED,
        f"{name}, half the layers": MEASURED | {"seconds": 2.5},
        "FP8 tensorwise, precomputed, 4096": MEASURED | {"seconds": 3.2},
        "FP8 mxfp8, precomputed, 4096": {"reason": "mxfp8 needs a Blackwell GPU"},
    }
    guess = {name: {"seconds": 3.6, "mfu": 0.45, "bytes": 100 * 2**30}}
    text = bench_gpu.page({"rows": rows, "predicted": guess, "tables": {}}, size, "python tools/bench_gpu.py")
    assert (
        f"| {name} | 4.000 (3.900 - 4.100) | 10000 | 8.00 | 41.0% | 1.00 | 101.5 | 3.600 | 45.0% | 100.0 |  |"
    ) in text
    assert "| FP8 tensorwise, precomputed, 4096 | 3.200 (3.900 - 4.100) | 10000 | 8.00 | 41.0% | 1.25 |" in text
    assert "| FP8 mxfp8, precomputed, 4096 | not measured |" in text
    # 6 layers more took 1.5 s: 20 more take 5 s
    assert "Extrapolated to 32 layers (bf16, precomputed, 4096; the memory would not fit): 9.000 s" in text
    assert "32 layers, bf16, precomputed, 16384: not measured." in text
    assert "Device: NVIDIA H200; driver 570; torch 2.13; commit abc." in text


def test_a_prediction_is_that_of_the_same_setting(tmp_path: Path) -> None:
    row = bench_gpu.rows(bench_gpu.LLAMA_8B)[1]
    assert row.name == "bf16, resident, 4096"

    def plan(tokens: int, reference: str, seconds: float) -> dict[str, Any]:
        grid = {"tokens": tokens, "reference": reference, "recompute": "none"}
        return {"grid": grid, "update_seconds": seconds, "mfu": 0.5, "memory": {"total": 7.0}}

    plans = [plan(8192, "resident", 1.0), plan(4096, "precomputed", 2.0), plan(4096, "resident", 3.0)]
    asked: list[Sequence[str]] = []

    def run(command: Sequence[str]) -> "subprocess.CompletedProcess[str]":
        asked.append(command)
        return subprocess.CompletedProcess(command, 0, json.dumps({"grids": plans}), "")

    found = bench_gpu.predicted(row, bench_gpu.LLAMA_8B, tmp_path, "h200", run)
    assert asked[0][asked[0].index("--spread") + 1] == str(bench_gpu.LLAMA_8B.spread)
    assert found == {"seconds": 3.0, "mfu": 0.5, "bytes": 7.0}
    assert bench_gpu.predicted(row, bench_gpu.LLAMA_8B, tmp_path, "h200", answered("", 2)) is None
    assert bench_gpu.predicted(row, bench_gpu.LLAMA_8B, tmp_path, None, run) is None


def test_what_fails_is_a_row_with_its_reason(tmp_path: Path) -> None:
    row, size = bench_gpu.rows(bench_gpu.TINY)[0], bench_gpu.TINY
    failed = answered("", 1, "torch.OutOfMemoryError: CUDA out of memory. Tried 9 GiB.\nmegadpo: error: rank 0 failed")
    assert bench_gpu.measure(row, size, tmp_path, True, failed)["reason"].startswith("out of memory")
    assert bench_gpu.tables("trl-nothing,shared", size, False, answered("", 2, "bench_step: no")) == {
        "reason": "bench_step: no"
    }


def test_figures_of_another_size_are_not_mixed(tmp_path: Path) -> None:
    output = tmp_path / "x.md"
    kept = bench_gpu.Kept(output, bench_gpu.TINY, "", again=False)
    kept.keep("rows", "a", {"seconds": 1})
    assert not bench_gpu.Kept(output, bench_gpu.TINY, "", again=False).missing("rows", "a")
    assert bench_gpu.Kept(output, bench_gpu.LLAMA_8B, "", again=False).missing("rows", "a")
    assert bench_gpu.Kept(output, bench_gpu.TINY, "", again=True).missing("rows", "a")
    kept.keep("rows", "a", {"reason": "out of memory"})
    assert bench_gpu.Kept(output, bench_gpu.TINY, "", again=False).missing("rows", "a")


def test_a_full_size_needs_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_gpu.main([]) == 2
    assert "this machine has no GPU" in capsys.readouterr().out


def test_predictions_need_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = {"tokens": 4096, "reference": "precomputed", "recompute": "none"}
    plan = {"grid": grid, "update_seconds": 2.5, "mfu": 0.5, "memory": {"total": 2**33}}
    monkeypatch.setattr(bench_gpu, "run", answered(json.dumps({"grids": [plan]})))
    output = tmp_path / "x.md"
    arguments = ["--parts", "plan", "--gpu", "h200", "--output", str(output), "--only", "bf16, precomputed, 4096"]
    assert bench_gpu.main(arguments) == 0
    [row] = [line for line in output.read_text().splitlines() if line.startswith("| bf16, precomputed, 4096 |")]
    assert row == "| bf16, precomputed, 4096 | not measured | - | - | - | - | - | 2.500 | 50.0% | 8.0 | not begun |"
