"""Records of the same steps from two trainers, compared number by number."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

Record = Mapping[str, Any]

SHOWN = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
    "grad_norm",
)
RELATIVE = frozenset({"grad_norm"})


@dataclass(frozen=True)
class Limits:
    """Largest allowed difference at any step: absolute in the unit of the metric, of grad_norm relative."""

    loss: float = 1e-4
    logps: float = 1e-3
    rewards: float = 1e-4
    grad_norm: float = 1e-3
    first_loss: float = 1e-6
    """Of the first loss to ln 2, on either side."""

    def of(self, name: str) -> float | None:
        """None: the metric has no limit."""
        if name == "rewards/accuracies":
            return None
        return float(getattr(self, name.split("/")[0]))


@dataclass(frozen=True)
class Comparison:
    """differences: step -> metric -> difference (NaN where a side has no number). faults: one line each."""

    differences: dict[int, dict[str, float]]
    faults: list[str]

    def largest(self) -> dict[str, float]:
        """The largest difference of each metric; NaN where any step has NaN."""
        return {name: _worst([row[name] for row in self.differences.values()]) for name in SHOWN}


def compare(theirs: Sequence[Record], ours: Sequence[Record], steps: int, limits: Limits) -> Comparison:
    """TRL's records against megadpo's for steps 1 to `steps`; records of anything but a step are ignored.

    A fault: a missing step, a value that is missing or not finite, a difference over its limit, a first loss
    that is not ln 2.
    """
    sides = {"TRL": _by_step(theirs), "megadpo": _by_step(ours)}
    differences, faults = {}, []
    for step in range(1, steps + 1):
        missing = [side for side, records in sides.items() if step not in records]
        if missing:
            faults.append(f"step {step}: no record of {' and '.join(missing)}")
            continue
        mine, other = sides["megadpo"][step], sides["TRL"][step]
        row = {name: _difference(name, mine.get(name), other.get(name)) for name in SHOWN}
        differences[step] = row
        for name, value in row.items():
            limit = limits.of(name)
            if math.isnan(value):
                faults.append(f"step {step}: {name} is not a number ({mine.get(name)}, TRL {other.get(name)})")
            elif limit is not None and value > limit:
                faults.append(f"step {step}: {name} differs by {value:.2e}, over {limit:.0e}")
    for side, records in sides.items():
        first = _number(records.get(1, {}).get("loss"))
        if not abs(first - math.log(2)) <= limits.first_loss:
            faults.append(f"{side}: the first loss is {first!r}, not ln 2 = {math.log(2):.7f}")
    return Comparison(differences, faults)


def _by_step(records: Sequence[Record]) -> dict[int, Record]:
    """Only records of updates: held-out metrics carry a step too, but no loss."""
    return {int(record["step"]): record for record in records if "step" in record and "loss" in record}


def _number(value: Any) -> float:
    """NaN for what is missing or null; metrics.jsonl has null for NaN and infinity."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else math.nan


def _difference(name: str, mine: Any, other: Any) -> float:
    mine, other = _number(mine), _number(other)
    return abs(mine - other) / (abs(other) if name in RELATIVE and other else 1.0)


def _worst(values: Sequence[float]) -> float:
    return math.nan if not values or any(map(math.isnan, values)) else max(values)


def _heading(name: str) -> str:
    """In two lines, so that a table of all metrics is narrow."""
    return name.replace("/", "/\n")


def step_table(title: str, comparison: Comparison, ours: Sequence[Record], limits: Limits) -> Table:
    table = Table(title=title, title_justify="left")
    for heading in ("step", "loss", *(f"d {_heading(name)}" for name in SHOWN)):
        table.add_column(heading, justify="right")
    losses = {step: _number(record["loss"]) for step, record in _by_step(ours).items()}
    for step, row in comparison.differences.items():
        table.add_row(str(step), f"{losses[step]:.6f}", *(f"{row[name]:.1e}" for name in SHOWN))
    table.add_section()
    table.add_row("largest", "", *(f"{value:.1e}" for value in comparison.largest().values()))
    table.add_row("limit", "", *("" if limits.of(name) is None else f"{limits.of(name):.0e}" for name in SHOWN))
    return table


def summary_table(comparisons: Mapping[str, Comparison]) -> Table:
    table = Table(title="largest difference of any step; of grad_norm relative", title_justify="left")
    for heading in ("grid", *map(_heading, SHOWN), "verdict"):
        table.add_column(heading, justify="left" if heading == "grid" else "right")
    for grid, comparison in comparisons.items():
        largest = (f"{value:.1e}" for value in comparison.largest().values())
        table.add_row(grid, *largest, "over the limits" if comparison.faults else "within")
    return table
