"""What `megadpo bench` tells: as text, as JSON, and as a row of a table that grows."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megadpo.config import BatchConfig, Config, ModelConfig, ParallelConfig
from megadpo.convert.shape import ModelShape
from megadpo.data.packing import Budget
from megadpo.errors import ConfigError
from megadpo.files import storage_errors
from megadpo.objectives.names import name_of
from megadpo.observe.parts import PARTS, Part
from megadpo.observe.speed import short

PACKAGES = ("torch", "megatron-core", "transformer-engine")
"""Whose versions a row names."""
WHAT = ("model", "data", "grid", "precision", "objective", "batch", "parts_in_use")
"""Of a Setting: what ran, beside where."""
RATES = ("tokens_per_second", "scored_tokens_per_second", "pairs_per_second")
COLUMNS = (
    "date",
    "device",
    "driver",
    "versions",
    "commit",
    "model; data; grid; precision; objective; batch; parts in use",
    "s per step: median (lowest - highest)",
    "tokens/s",
    "scored tokens/s",
    "pairs/s",
    "TFLOP/s per GPU",
    "MFU",
    "peak GiB",
    "padding",
    "parts of the slowest rank's step, ms",
    "command",
)


@dataclass(frozen=True)
class PerRank:
    """One rank's part of the measured steps."""

    rank: int
    stage: int
    """Its pipeline stage."""
    parts: dict[Part, float]
    """Seconds per step; they sum to step_seconds."""
    peak_memory: float
    """Bytes."""
    step_seconds: float
    """Mean."""


@dataclass(frozen=True)
class Measured:
    """What came out."""

    records: list[dict[str, float]]
    """Of every measured step, by the names of the training log; its seconds are those of the rank where it took
    longest."""
    ranks: list[PerRank]
    ahead_seconds: float | None
    """Of scoring one global batch ahead, with a precomputed reference."""

    def summary(self) -> dict[str, Any]:
        """For JSON: medians over the steps, lowest and highest step, and all there is."""
        seconds = [record["seconds"] for record in self.records]
        return {
            "steps": len(self.records),
            **{name: statistics.median(record[name] for record in self.records) for name in self.records[0]},
            "seconds_lowest": min(seconds),
            "seconds_highest": max(seconds),
            "reference_ahead_seconds": self.ahead_seconds,
            "ranks": [vars(rank) for rank in self.ranks],
            "records": self.records,
        }


@dataclass(frozen=True)
class Setting:
    """What it was measured on: whatever two rows can differ in."""

    device: str
    driver: str
    versions: dict[str, str]
    commit: str
    model: str
    data: str
    grid: str
    precision: str
    objective: str
    batch: str
    parts_in_use: str
    command: str

    @property
    def what(self) -> str:
        """What ran, in one cell."""
        return "; ".join(getattr(self, name) for name in WHAT)


def grid_text(parallel: ParallelConfig, world: int, experts: bool) -> str:
    """TP2 SP PP2 VPP3 DP4 EP8, sharded optimizer, overlap of gradients and parameters"""
    tensor, pipeline = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    virtual = parallel.virtual_pipeline_model_parallel_size
    sizes = [f"TP{tensor}", "SP" if parallel.sequence_parallel else "", f"PP{pipeline}"]
    sizes += [f"VPP{virtual}" if virtual else "", f"DP{world // (tensor * pipeline)}"]
    sizes += [f"EP{parallel.expert_model_parallel_size}" if experts else ""]
    overlapped = {
        "gradients": parallel.overlap_grad_reduce,
        "parameters": parallel.overlap_param_gather,
        "messages": bool(virtual) and parallel.overlap_p2p_comm,
        "tensor": parallel.tp_comm_overlap,
    }
    names = [name for name, on in overlapped.items() if on]
    return ", ".join(
        [
            " ".join(size for size in sizes if size),
            "sharded optimizer" if parallel.use_distributed_optimizer else "whole optimizer",
            *([f"overlap of {' and '.join(names)}"] if names else []),
        ]
    )


def precision_text(model: ModelConfig) -> str:
    """bfloat16, FP8 hybrid tensorwise but 1 first and 1 last layers, FP8 weights, recompute full"""
    found: list[str] = [model.dtype]
    if model.fp8_format:
        kept = f"{model.num_layers_at_start_in_bf16} first and {model.num_layers_at_end_in_bf16} last layers"
        found.append(
            f"{'emulated ' if model.fp8_emulation else ''}FP8 {model.fp8_format} {model.fp8_recipe}"
            + (f" but {kept}" if model.first_last_layers_bf16 else "")
        )
        found += ["FP8 weights"] if model.fp8_param_gather else []
    found.append(f"recompute {model.recompute}")
    found += [] if model.logprob_backend == "auto" else [f"head {model.logprob_backend}"]
    return ", ".join([*found, *([f"CUDA graphs of {' and '.join(model.cuda_graphs)}"] if model.cuda_graphs else [])])


def objective_text(config: Config, reference: ModelShape) -> str:
    """dpo, reference resident in FP8. reference: its shape."""
    name, how = name_of(config.objective), config.reference
    if not config.objective.needs_reference:
        return f"{name}, no reference"
    every = f" every {how.swap_steps} steps" if how.mode == "swapped" else ""
    other = f" of {reference.num_layers} layers, hidden {reference.hidden_size}" if how.path else ""
    return f"{name}, reference {how.mode}{' in FP8' if how.fp8_weights else ''}{every}{other}"


def batch_text(batch: BatchConfig, budget: Budget, fixed: bool) -> str:
    """64 groups a step, micro-batches of 8192 rows. fixed: whether all are so long; else they end with their groups."""
    most = f" and {budget.groups} groups" if budget.groups else ""
    repeated = "" if batch.share_prompt else ", prompts repeated"
    rows = f"{'' if fixed else 'at most '}{budget.tokens} rows{most}"
    return f"{batch.global_batch_size} groups a step, micro-batches of {rows}{repeated}"


def device_text(names: Sequence[str], on_gpu: bool, world: int) -> str:
    """16 x NVIDIA H100. names: of this machine's GPUs; those of a job on several are taken to be alike."""
    if on_gpu:
        return f"{world} x {names[0]}" if world > 1 else names[0]
    return cpu_here() + (f", {world} processes" if world > 1 else "")


def commit_here() -> str:
    """Of the checkout that this package runs from; "not a checkout" for an installed one."""
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "not a checkout"
    return found.stdout.strip()


def cpu_here() -> str:
    """The processor by its name, and how many of its cores this process may use."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()} (CPU, {len(os.sched_getaffinity(0))} cores)"


def text_of(setting: Setting, measured: Measured) -> str:
    """For the terminal."""
    found = measured.summary()
    mfu = f"{found['perf/mfu']:.1%}" if "perf/mfu" in found else "not known (no peak for this device and dtype)"
    versions = ", ".join(f"{name} {version}" for name, version in setting.versions.items())
    lines = [
        f"device     {setting.device}; driver {setting.driver}; {versions}; commit {setting.commit}",
        f"model      {setting.model}; {setting.data}",
        f"grid       {setting.grid}; {setting.precision}",
        f"run        {setting.objective}; {setting.batch}; {setting.parts_in_use}",
        f"step       {found['seconds']:.4f} s ({found['seconds_lowest']:.4f} - {found['seconds_highest']:.4f}), median "
        f"(lowest - highest) of {found['steps']}",
        f"speed      {short(found['tokens_per_second'])} tokens/s, {short(found['scored_tokens_per_second'])} scored "
        f"tokens/s, {short(found['pairs_per_second'])} pairs/s",
        f"per GPU    {short(found['perf/tokens_per_second_per_gpu'])} tokens/s, {found['perf/tflops_per_gpu']:.3g} "
        f"TFLOP/s, MFU {mfu}",
        f"memory     {found['perf/peak_memory_gib']:.2f} GiB at most on a rank",
        f"padding    {found['padding_fraction']:.1%} of the rows; load imbalance {found['load_imbalance']:.1%}",
    ]
    if measured.ahead_seconds is not None:
        lines.append(
            f"reference  ahead of training: {measured.ahead_seconds:.4f} s for the pairs of a step, once a run and not "
            "in the step"
        )
    lines.append("parts      ms per step; they sum to the rank's step")
    lines += table(
        [
            ["rank", "stage", *PARTS, "step"],
            *(
                [
                    str(rank.rank),
                    str(rank.stage),
                    *(f"{rank.parts[part] * 1e3:.1f}" for part in PARTS),
                    f"{rank.step_seconds * 1e3:.1f}",
                ]
                for rank in measured.ranks
            ),
        ]
    )
    return "\n".join(lines)


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns as wide as they must be, numbers to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def row_of(setting: Setting, measured: Measured) -> list[str]:
    """The cells of COLUMNS."""
    found = measured.summary()
    slowest = max(measured.ranks, key=lambda rank: rank.step_seconds)
    parts = ", ".join(f"{part} {slowest.parts[part] * 1e3:.1f}" for part in PARTS if slowest.parts[part])
    return [
        time.strftime("%Y-%m-%d"),
        setting.device,
        setting.driver,
        ", ".join(f"{name} {version}" for name, version in setting.versions.items()),
        setting.commit,
        setting.what,
        f"{found['seconds']:.4f} ({found['seconds_lowest']:.4f} - {found['seconds_highest']:.4f})",
        *(f"{found[rate]:.4g}" for rate in RATES),
        f"{found['perf/tflops_per_gpu']:.4g}",
        f"{found['perf/mfu']:.1%}" if "perf/mfu" in found else "not known",
        f"{found['perf/peak_memory_gib']:.2f}",
        f"{found['padding_fraction']:.1%}",
        parts,
        f"`{setting.command}`",
    ]


HEAD = f"| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}\n"


def check_table(path: Path) -> None:
    """Raise, before hours of measuring, where `append_row` could not write or would mix two tables: StorageError,
    ConfigError."""
    with storage_errors(path, "--append"):
        path.parent.mkdir(parents=True, exist_ok=True)
        there = path.exists()
        with path.open("a+", encoding="utf-8") as file:
            file.seek(0)
            text = file.read()
        if not there:
            path.unlink()
    if text and HEAD not in text:
        raise ConfigError(f"--append {path}: is no table of this version's rows (its head is another); name a new file")


def append_row(path: Path, setting: Setting, measured: Measured) -> None:
    """A row at the end of a Markdown table; a new file gets its head. Raises StorageError."""
    cells = [cell.replace("|", "\\|") for cell in row_of(setting, measured)]
    with storage_errors(path, "--append"):
        path.parent.mkdir(parents=True, exist_ok=True)
        new = not path.exists() or path.stat().st_size == 0
        title = "# Steps measured by `megadpo bench`\n\ndocs/bench.md says what the columns mean.\n\n" + HEAD
        with path.open("a", encoding="utf-8") as file:
            file.write(f"{title if new else ''}| {' | '.join(cells)} |\n")
