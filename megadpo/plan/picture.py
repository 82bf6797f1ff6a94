"""The best grids as bars, time and memory side by side: one SVG, written by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from megadpo.observe.gpus import GIB
from megadpo.plan.report import Report
from megadpo.plan.search import Plan

COLOURS = ["#1f6feb", "#2da44e", "#bf8700", "#cf222e", "#8250df", "#0a7ea4", "#d4a72c", "#6e7781", "#bf3989"]
COLOURS += ["#57606a", "#a8b1bb"]
LEFT, WIDTH, GAP, STEP, TOP = 230, 330, 90, 24, 90


def svg(report: Report, rows: int = 15) -> str:
    """Seconds of a step by part, and GiB of the fullest rank by part against what the device has."""
    plans = report.shown[:rows]
    height = TOP + STEP * max(len(plans), 1) + 34
    right = LEFT + WIDTH + GAP
    gpu = report.space.gpu
    title = f"{report.space.config.model.path} on {report.space.gpus} x {gpu.name}: estimated, not measured"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{right + WIDTH + 70}" height="{height}" '
        'font-family="sans-serif" font-size="11">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="10" y="18" font-size="13">{escape(title)}</text>',
    ]
    if not plans:
        return "\n".join([*parts, f'<text x="10" y="{TOP}">no grid is left</text>', "</svg>"]) + "\n"
    longest = max(plan.estimate.step for plan in plans)
    most = max(gpu.memory, *(plan.memory.total for plan in plans)) / GIB
    parts += _legend("seconds per step", list(vars(plans[0].estimate.parts)), LEFT)
    parts += _legend("GiB of the fullest rank", list(vars(plans[0].memory)), right)
    for number, plan in enumerate(plans):
        y = TOP + STEP * number
        parts.append(f'<text x="{LEFT - 8}" y="{y + 13}" text-anchor="end">{escape(_name(plan))}</text>')
        parts += _bar(vars(plan.estimate.parts), LEFT, y, longest, f"{plan.estimate.step:.2f} s")
        sizes = {name: value / GIB for name, value in vars(plan.memory).items()}
        parts += _bar(sizes, right, y, most, f"{plan.memory.total / GIB:.1f}")
    limit = right + WIDTH * gpu.memory / GIB / most
    parts.append(
        f'<line x1="{limit:.1f}" x2="{limit:.1f}" y1="{TOP - 4}" y2="{height - 26}" stroke="#cf222e" '
        f'stroke-dasharray="4 3"/><text x="{limit:.1f}" y="{height - 12}" text-anchor="middle" fill="#cf222e">'
        f"{gpu.memory / GIB:.0f} GiB</text>"
    )
    return "\n".join([*parts, "</svg>"]) + "\n"


def _name(plan: Plan) -> str:
    one = plan.candidate
    chunks = f"x{one.virtual}" if one.virtual else ""
    experts = f" EP{one.expert}" if one.expert > 1 else ""
    return f"TP{one.tensor} PP{one.pipeline}{chunks} DP{one.data}{experts}, {one.tokens}, {one.recompute}"


def _legend(title: str, names: Sequence[str], x: float) -> list[str]:
    found = [f'<text x="{x}" y="36">{title}</text>']
    for number, name in enumerate(names):
        at, y = x + 78 * (number % 5), 50 + 12 * (number // 5)
        found.append(f'<rect x="{at}" y="{y - 8}" width="8" height="8" fill="{COLOURS[number]}"/>')
        found.append(f'<text x="{at + 11}" y="{y}" font-size="10">{name}</text>')
    return found


def _bar(parts: Mapping[str, float], x: float, y: float, most: float, label: str) -> list[str]:
    found, at = [], x
    for number, (name, value) in enumerate(parts.items()):
        width = WIDTH * max(value, 0) / most
        if width > 0:
            found.append(
                f'<rect x="{at:.1f}" y="{y}" width="{width:.1f}" height="{STEP - 8}" fill="{COLOURS[number]}">'
                f"<title>{name}: {value:.3f}</title></rect>"
            )
        at += width
    return [*found, f'<text x="{at + 5:.1f}" y="{y + 12}">{label}</text>']
