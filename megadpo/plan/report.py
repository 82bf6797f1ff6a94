"""What the planner found, as a table, as JSON and as settings of a run file."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megadpo.observe.gpus import GIB, Gpu
from megadpo.plan import constants as c
from megadpo.plan.grids import Candidate, Rejected, Space
from megadpo.plan.search import Found, Plan, usable

Row = Sequence[str]


@dataclass(frozen=True)
class Report:
    """All that is said of one search."""

    space: Space
    found: Found
    assumptions: tuple[str, ...]
    price: float | None = None
    """Of an hour of one GPU."""
    rows: int | None = 15
    """Of the table; None: all, and every way to run each grid."""

    @property
    def shown(self) -> tuple[Plan, ...]:
        return self.found.plans if self.rows is None else self.found.best[: self.rows]


def text(report: Report) -> list[str]:
    """Lines for the terminal."""
    found, gpu = report.found, report.space.gpu
    lines = [
        f"{report.space.config.model.path} on {report.space.gpus} x {gpu.name}, "
        f"{report.space.config.batch.global_batch_size} groups per update. Estimated, not measured.",
        *(f"  assumed: {line}" for line in report.assumptions),
        "",
    ]
    if found.plans:
        lines += [*_aligned(_table(report)), "", *_where(report.shown[:5]), "", *settings(found.plans[0]), ""]
        hidden = len(found.best) - len(report.shown) if report.rows is not None else 0
        if hidden > 0:
            lines.append(f"{hidden} more grids, and other ways to run each: --all")
    else:
        lines += ["no grid is left", ""]
    return lines + _counts(found)


def _table(report: Report) -> list[Row]:
    head = ["", "TP", "PP", "VPP", "DP", "EP", "SP", "tokens", "recompute", "reference", "s/step", "pairs/s"]
    head += ["tok/s/GPU", "MFU", "GiB", "pad", "hours", "GPU-h"] + (["cost"] if report.price is not None else [])
    return [head, *(_row(number, plan, report.price) for number, plan in enumerate(report.shown, 1))]


def _row(number: int, plan: Plan, price: float | None) -> Row:
    one, how = plan.candidate, plan.estimate
    cells = [f"{number}", f"{one.tensor}", f"{one.pipeline}", f"{one.virtual or '-'}", f"{one.data}", f"{one.expert}"]
    cells += ["yes" if one.sequence else "-", f"{one.tokens}", one.recompute, one.reference, _digits(how.step)]
    cells += [_digits(how.pairs_per_second), f"{how.tokens_per_second_per_gpu:.0f}", f"{100 * how.mfu:.1f}%"]
    cells += [f"{plan.memory.total / GIB:.1f}", f"{100 * plan.work.padding:.0f}%", _digits(plan.hours)]
    cells += [_digits(plan.gpu_hours)]
    return cells if price is None else [*cells, _digits(plan.gpu_hours * price)]


def _where(plans: Sequence[Plan]) -> list[str]:
    """Where the time and the memory of some plans go."""
    times = [["seconds", *vars(plans[0].estimate.parts)]]
    times += [[f"{n}", *(_digits(s) for s in vars(p.estimate.parts).values())] for n, p in enumerate(plans, 1)]
    sizes = [["GiB", *vars(plans[0].memory), "stage", "micro-batches"]]
    sizes += [
        [f"{n}", *(f"{b / GIB:.2f}" for b in vars(p.memory).values()), f"{p.stage}", f"{p.work.micro_batches}"]
        for n, p in enumerate(plans, 1)
    ]
    return [*_aligned(times), "", *_aligned(sizes)]


def settings(plan: Plan) -> list[str]:
    """The grid as lines of a run file."""
    one = plan.candidate
    parallel = {
        "tensor_model_parallel_size": one.tensor,
        "pipeline_model_parallel_size": one.pipeline,
        "virtual_pipeline_model_parallel_size": one.virtual,
        "expert_model_parallel_size": one.expert if one.expert > 1 else None,
        "sequence_parallel": True if one.sequence else None,
    }
    return [
        "for the run file:",
        "parallel:",
        *(f"  {name}: {str(value).lower()}" for name, value in parallel.items() if value is not None),
        "batch:",
        f"  micro_batch_tokens: {one.tokens}",
        "model:",
        f"  recompute: {one.recompute}",
        "reference:",
        f"  mode: {one.reference}",
    ]


def _counts(found: Found) -> list[str]:
    """How many were rejected, and why."""
    lines = [f"{found.considered} ways looked at: {len(found.plans)} fit, {len(found.rejected)} do not"]
    if found.dominated:
        lines[0] += f", {found.dominated} left out (the same grid is faster in another way)"
    for reason, count, example in grouped(found.rejected):
        lines.append(f"  {count:5} x {reason}" + (f" (such as {example.text()})" if reason.startswith("does") else ""))
    return lines


def grouped(rejected: Sequence[Rejected]) -> list[tuple[str, int, Candidate]]:
    """(reason, how often, one of them), the most frequent first. Sizes of memory do not tell reasons apart: what
    needs least is the example."""
    counts: Counter[str] = Counter()
    examples: dict[str, tuple[float, str, Candidate]] = {}
    for one in rejected:
        for reason in one.reasons:
            key = _kind(reason)
            counts[key] += 1
            size = _needed(reason)
            if key not in examples or size < examples[key][0]:
                examples[key] = (size, reason, one.candidate)
    return [(examples[key][1], count, examples[key][2]) for key, count in counts.most_common()]


def _kind(reason: str) -> str:
    return f"memory {reason.rpartition(' ')[2]}" if reason.startswith("does not fit") else reason


def _needed(reason: str) -> float:
    return float(reason.split()[4]) if reason.startswith("does not fit") else math.inf


def as_json(report: Report) -> dict[str, Any]:
    """The same as one JSON object; seconds, bytes, hours."""
    space, found = report.space, report.found
    return {
        "model": space.config.model.path,
        "gpus": space.gpus,
        "gpu": asdict(space.gpu),
        "usable_memory": usable(space.gpu),
        "measured": False,
        "assumptions": list(report.assumptions),
        "price": report.price,
        "considered": found.considered,
        "dominated": found.dominated,
        "grids": [_plan_json(plan, report.price) for plan in report.shown],
        "rejected": [
            {"reason": reason, "count": count, "example": asdict(example)}
            for reason, count, example in grouped(found.rejected)
        ],
    }


def _plan_json(plan: Plan, price: float | None) -> dict[str, Any]:
    how = plan.estimate
    return {
        "grid": asdict(plan.candidate),
        "memory_exact": plan.exact,
        "step_seconds": how.step,
        "update_seconds": how.update,
        "parts": asdict(how.parts),
        "mfu": how.mfu,
        "pairs_per_second": how.pairs_per_second,
        "tokens_per_second_per_gpu": how.tokens_per_second_per_gpu,
        "memory": asdict(plan.memory) | {"total": plan.memory.total},
        "fullest_stage": plan.stage,
        "parameters": plan.parameters,
        "micro_batches": plan.work.micro_batches,
        "padding": plan.work.padding,
        "steps": plan.steps,
        "hours": plan.hours,
        "gpu_hours": plan.gpu_hours,
        "cost": None if price is None else plan.gpu_hours * price,
    }


def of_the_model(gpu: Gpu) -> list[str]:
    """What the estimate rests on, shortly; docs/plan.md has the rest."""
    return [
        f"products at {c.GEMM_PEAK:.0%} of peak less half a wave of tiles, attention at {c.ATTENTION_PEAK:.0%} of long "
        f"segments, collectives at {c.LINK_SHARE:.0%} of {gpu.link_bandwidth / 1e9:g} GB/s in a node and "
        f"{c.NETWORK_SHARE:.0%} of {gpu.network_bandwidth / 1e9:g} GB/s per GPU between nodes (plan/constants.py)"
    ]


def _digits(number: float) -> str:
    """Three digits that count: 0.0123, 4.56, 78.9, 1234."""
    if number == 0:
        return "0"
    if abs(number) >= 100:
        return f"{number:.0f}"
    places = min(max(2 - math.floor(math.log10(abs(number))), 0), 4)
    return f"{number:.{places}f}"


def _aligned(rows: Sequence[Row]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
