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

from megadpo.config import Config
from megadpo.convert.shape import ModelShape
from megadpo.files import storage_errors
from megadpo.observe.parts import PARTS, Part
from megadpo.observe.speed import short

PACKAGES = ("torch", "megatron-core", "transformer-engine")
"""Whose versions a row names."""
RATES = ("tokens_per_second", "scored_tokens_per_second", "pairs_per_second")
COLUMNS = (
    "date",
    "device",
    "driver",
    "versions",
    "commit",
    "model, grid",
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
    """What it was measured on."""

    device: str
    driver: str
    versions: dict[str, str]
    commit: str
    model: str
    grid: str
    parts_in_use: str
    command: str

    @staticmethod
    def of(
        config: Config,
        shape: ModelShape,
        found: dict[str, str | list[str]],
        on_gpu: bool,
        attention: str,
        te: bool,
        command: str,
    ) -> Setting:
        """found: as `observe.versions.versions` gives it. attention: the back end. te: whether layers are
        Transformer Engine's."""
        parallel, model = config.parallel, config.model
        devices = list(found["devices"]) if on_gpu else [cpu_here()]
        fp8 = f", FP8 {model.fp8_format} {model.fp8_recipe}" if model.fp8_format else ""
        return Setting(
            device=f"{len(devices)} x {devices[0]}" if len(devices) > 1 else devices[0],
            driver=str(found["nvidia-driver"]),
            versions={name: str(found[name]) for name in PACKAGES},
            commit=commit_here(),
            model=(
                f"{shape.family}, {shape.num_layers} layers, hidden {shape.hidden_size}, vocabulary {shape.vocab_size}"
            ),
            grid=(
                f"TP{parallel.tensor_model_parallel_size} PP{parallel.pipeline_model_parallel_size}, "
                f"{model.dtype}{fp8}, recompute {model.recompute}"
            ),
            parts_in_use=f"layers: {'Transformer Engine' if te else 'Megatron-Core'}; attention: {attention}",
            command=command,
        )


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
        f"model      {setting.model}; {setting.grid}; {setting.parts_in_use}",
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
        f"{setting.model}; {setting.grid}; {setting.parts_in_use}",
        f"{found['seconds']:.4f} ({found['seconds_lowest']:.4f} - {found['seconds_highest']:.4f})",
        *(f"{found[rate]:.4g}" for rate in RATES),
        f"{found['perf/tflops_per_gpu']:.4g}",
        f"{found['perf/mfu']:.1%}" if "perf/mfu" in found else "not known",
        f"{found['perf/peak_memory_gib']:.2f}",
        f"{found['padding_fraction']:.1%}",
        parts,
        f"`{setting.command}`",
    ]


def append_row(path: Path, setting: Setting, measured: Measured) -> None:
    """A row at the end of a Markdown table; a new file gets its head. Raises StorageError."""
    cells = [cell.replace("|", "\\|") for cell in row_of(setting, measured)]
    with storage_errors(path, "--append"):
        path.parent.mkdir(parents=True, exist_ok=True)
        new = not path.exists() or path.stat().st_size == 0
        with path.open("a", encoding="utf-8") as file:
            if new:
                file.write("# Steps measured by `megadpo bench`\n\ndocs/bench.md says what the columns mean.\n\n")
                file.write(f"| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}\n")
            file.write(f"| {' | '.join(cells)} |\n")
