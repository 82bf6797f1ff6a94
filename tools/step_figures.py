"""What tools/bench_step.py says of the turns that its sides took: tables, ratios, the machine."""

from __future__ import annotations

import itertools
import os
import platform
import statistics
import subprocess
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path

from step_turns import Side, SideFailedError

LOSSES_APART = {"float32": 1e-3, "bfloat16": 3e-2}
"""Nats between the losses of two sides at the same step, from which on they do not do the same work. In bfloat16 a
response's log-probability has an error of tenths of a nat, of which the loss has beta, averaged over a batch."""


def pairs_per_second(seconds: Iterable[float], batch: int) -> float:
    return batch / statistics.median(seconds)


def ratio(faster: Sequence[float], slower: Sequence[float]) -> str:
    """How many times as fast, turn by turn: median (lowest - highest)."""
    ratios = [b / a for a, b in zip(faster, slower, strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} - {max(ratios):.2f})"


def values(records: Iterable[dict[str, float]], what: str = "seconds") -> list[float]:
    return [record[what] for record in records]


def table(rows: list[list[str]]) -> str:
    """Markdown; the first row is the head."""
    head, *body = rows
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def side_table(sides: list[Side], batch: int, warm_up: int) -> str:
    rows = [["side", "pairs/s", "s per step", "processor s", "rows per step", "peak memory, MiB"]]
    for side in sides:
        counted = side.steps[warm_up:]
        taken = values(counted)
        rows.append(
            [
                side.name,
                f"{pairs_per_second(taken, batch):.3f}",
                f"{statistics.median(taken):.2f} ({min(taken):.2f} - {max(taken):.2f})",
                f"{statistics.median(values(counted, 'processor')):.2f}",
                f"{statistics.mean(values(counted, 'rows')):.0f}" if "rows" in counted[0] else "",
                f"{side.memory['peak']:.0f}",
            ]
        )
    return table(rows)


def compare_table(sides: list[Side], warm_up: int) -> str:
    """Each layout against the one before it."""
    rows = [["", "by the clock", "by processor time"]]
    for slower, faster in itertools.pairwise(sides):
        measured = [
            ratio(values(faster.steps[warm_up:], what), values(slower.steps[warm_up:], what))
            for what in ("seconds", "processor")
        ]
        rows.append([f"{faster.name} over {slower.name}", *measured])
    return table(rows)


def against_table(ours: Side, trl: Side, trl_ahead: Side, batch: int, warm_up: int) -> str:
    """With the reference on both sides, and without it on either."""
    rows = [["", "megadpo pairs/s", "TRL pairs/s", "ratio by the clock", "ratio by processor time"]]
    for words, theirs, counts in (("reference counted", trl, True), ("reference not counted", trl_ahead, False)):
        measured = {}
        for what in ("seconds", "processor"):
            mine = values(ours.steps, what)
            if counts:
                mine = [step + scored for step, scored in zip(mine, values(ours.references, what), strict=True)]
            measured[what] = mine[warm_up:], values(theirs.steps[warm_up:], what)
        speeds = [f"{pairs_per_second(taken, batch):.3f}" for taken in measured["seconds"]]
        rows.append([words, *speeds, ratio(*measured["seconds"]), ratio(*measured["processor"])])
    return table(rows)


def same_losses(sides: list[Side], most: float = LOSSES_APART["float32"]) -> str:
    """Says how far the losses of the same step are apart; raises SideFailedError where they are not the same."""
    losses = [values(side.steps, "loss") for side in sides]
    apart = max(max(step) - min(step) for step in zip(*losses, strict=True))
    if apart > most:
        raise SideFailedError(f"the sides do not train the same thing: losses of one step are {apart:.1e} apart")
    return f"Losses of the same step are at most {apart:.1e} apart."


def machine() -> str:
    """The processor, what is installed, the commit."""
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "megatron-core", "transformers"))
    here = Path(__file__).parent
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"],
        cwd=here,
        capture_output=True,
        text=True,
        check=False,
    )
    load = ", ".join(f"{average:.1f}" for average in os.getloadavg())
    return (
        f"{names[0].partition(': ')[2]}, {len(os.sched_getaffinity(0))} cores; Python {platform.python_version()}, "
        f"{packages}; commit {described.stdout.strip()}; load averages at the end {load}"
    )
