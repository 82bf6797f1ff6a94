"""Held-out accuracy of every objective after the same budget, from the same model and pairs: a table and a picture.

python tools/bench_objectives.py --model ../shared/models/stories260k --train ../shared/data/stories_pairs_train.jsonl
    --eval ../shared/data/stories_pairs_eval.jsonl --write
python tools/bench_objectives.py ... --only dpo simpo --steps 20     a quick look at some

One yardstick for all, with or without a reference in training: the share of held-out pairs whose chosen response gained
more log-probability over the starting model than the rejected one (DPO's accuracy; a tie counts half), measured by
`megadpo eval` on the exported model. What an objective cannot be trained on here is named with the reason. --write puts
tools/results/objectives.md and objectives.svg there; they stand for one run each, on the hyper-parameters in the table.
"""

from __future__ import annotations

import argparse
import math
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megadpo.config.decode import load_config
from megadpo.errors import ConfigError
from megadpo.objectives import OBJECTIVES

RESULTS = Path(__file__).resolve().parent / "results"
SETTINGS: dict[str, dict[str, Any]] = {
    "dpo_norm": {"beta": 5.0},
    "sppo_hard": {"beta": 0.1},
    "dpop": {"alpha": 5.0},
    "robust": {"label_smoothing": 0.1},
    "mix": {"parts": [{"loss_type": "dpo"}, {"loss_type": "bco"}, {"loss_type": "sft"}], "weights": [0.8, 0.2, 1.0]},
}
"""Where the default is not for a model that is this small."""
CONVERT = {name: "pairs_to_unpaired" for name in ("kto", "bco_unpaired", "apo_zero_unpaired")} | {
    "sft": "pairs_to_demonstrations"
}
"""What the pairs become for objectives on single responses; their batches count responses."""


@dataclass(frozen=True)
class Row:
    """What came of one objective. accuracy and the like are None where it was not run; why says the reason."""

    name: str
    settings: dict[str, Any]
    accuracy: float | None = None
    margin: float | None = None
    chosen: float | None = None
    seconds: float | None = None
    why: str = ""


def run_file(options: argparse.Namespace, run_dir: Path, objective: dict[str, Any]) -> dict[str, Any]:
    """The same for all but the objective."""
    return {
        "run_dir": str(run_dir),
        "model": {"path": options.model, "dtype": "float32"},
        "data": {"train": options.train, "eval": options.eval, "convert": CONVERT.get(objective["loss_type"])},
        "objective": objective,
        "reference": {"mode": "resident"},
        "batch": {"global_batch_size": options.batch},
        "optimizer": {"learning_rate": options.learning_rate, "lr_scheduler_type": "linear", "warmup_ratio": 0},
        "train": {"max_steps": options.steps},
    }


def command(*words: str) -> str:
    """megadpo's output; raises with it where the command fails."""
    code = "import sys; from megadpo.cli import main; sys.exit(main())"
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(
            f"megadpo {' '.join(words)}: exit code {done.returncode}\n{done.stdout}{done.stderr}"[-3000:]
        )
    return done.stdout + done.stderr


def measure(options: argparse.Namespace, name: str, folder: Path) -> Row:
    """Train with one objective, then measure what came out."""
    settings = SETTINGS.get(name, {})
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(run_file(options, folder / name, {"loss_type": name} | settings)))
    try:
        config = load_config(path, [])
    except ConfigError as error:
        return Row(name, settings, why=str(error).split(": ", 1)[-1])
    if config.objective.head == "scalar":
        return Row(name, settings, why="trains a reward model, which has no log-probabilities to measure")
    started = time.monotonic()
    try:
        command("train", str(path), *([] if config.objective.needs_reference else ["reference.mode=precomputed"]))
    except RuntimeError as refused:  # data without scores, say; the reason is megadpo's last line
        return Row(name, settings, why=str(refused).strip().splitlines()[-1])
    seconds = time.monotonic() - started
    yardstick = folder / f"{name}-eval.yaml"
    tree = run_file(options, folder / f"{name}-eval", {"loss_type": "dpo"})
    tree["model"]["path"], tree["reference"]["path"] = str(folder / name / "export"), options.model
    yardstick.write_text(yaml.safe_dump(tree))
    said = command("eval", str(yardstick))

    def number(metric: str) -> float:
        found = re.search(rf"eval_{metric} (-?[\d.]+)", said)
        if found is None:
            raise RuntimeError(f"megadpo eval said no eval_{metric}:\n{said[-2000:]}")
        return float(found.group(1))

    return Row(
        name,
        settings,
        number("rewards/accuracies"),
        number("rewards/margins") / 0.1,  # back to nats
        number("logps/chosen"),
        seconds,
    )


def report(rows: list[Row], options: argparse.Namespace, pairs: int) -> str:
    """The table."""
    lines = [
        "# Objectives on the stories pairs",
        "",
        "![held-out accuracy](objectives.svg)",
        "",
        f"Written by `python tools/bench_objectives.py --model {options.model} --train {options.train} --eval",
        f"{options.eval} --steps {options.steps}`: {options.steps} steps of {options.batch} pairs, learning rate",
        f"{options.learning_rate:g} (linear), float32, one process; the model `{Path(options.model).name}`, held out:",
        f"{pairs} pairs. Accuracy: share of held-out pairs whose chosen response gained more log-probability over the",
        "starting model than the rejected one. One run each and no search for hyper-parameters, so neighbours in the",
        "table are not to be told apart: the standard error of an accuracy is in the third column.",
        "",
        "| `loss_type` | accuracy | standard error | margin (nats) | log p(chosen) | seconds | settings |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda r: -(r.accuracy if r.accuracy is not None else -1)):
        settings = ", ".join(f"{key} {value}" for key, value in row.settings.items()) or "defaults"
        if row.accuracy is None:
            lines.append(f"| `{row.name}` | not run | | | | | {row.why} |")
            continue
        lines.append(
            f"| `{row.name}` | {row.accuracy:.3f} | {error(row.accuracy, pairs):.3f} | {row.margin:.2f} | "
            f"{row.chosen:.1f} | {row.seconds:.0f} | {settings} |"
        )
    return "\n".join(lines) + "\n"


def error(accuracy: float, pairs: int) -> float:
    """Standard error of a share of so many pairs."""
    return math.sqrt(max(accuracy * (1 - accuracy), 0) / pairs)


def picture(rows: list[Row], pairs: int) -> str:
    """An SVG: one dot per objective with a bar of one standard error either way."""
    shown = sorted((row for row in rows if row.accuracy is not None), key=lambda r: -(r.accuracy or 0))
    left, width, step, top = 150, 420, 18, 30
    height = top + step * len(shown) + 40

    def x(accuracy: float) -> float:
        return left + width * (min(max(accuracy, 0.4), 1.0) - 0.4) / 0.6

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + width + 70}" height="{height}" '
        'font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="{left}" y="18">held-out accuracy after the same budget, with one standard error</text>',
    ]
    for tick in range(4, 11):
        at = x(tick / 10)
        parts.append(f'<line x1="{at}" x2="{at}" y1="{top}" y2="{height - 30}" stroke="#ddd"/>')
        parts.append(f'<text x="{at}" y="{height - 14}" text-anchor="middle">{tick / 10:.1f}</text>')
    for number, row in enumerate(shown):
        assert row.accuracy is not None
        y, spread = top + step * number + 12, error(row.accuracy, pairs)
        parts += [
            f'<text x="{left - 8}" y="{y + 4}" text-anchor="end">{row.name}</text>',
            f'<line x1="{x(row.accuracy - spread)}" x2="{x(row.accuracy + spread)}" y1="{y}" y2="{y}" stroke="#888"/>',
            f'<circle cx="{x(row.accuracy)}" cy="{y}" r="4" fill="#1f6feb"/>',
            f'<text x="{left + width + 10}" y="{y + 4}">{row.accuracy:.3f}</text>',
        ]
    return "\n".join([*parts, "</svg>"]) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", required=True, help="Hugging Face folder to start from")
    parser.add_argument("--train", required=True, help="pairs to train on")
    parser.add_argument("--eval", required=True, help="held-out pairs")
    parser.add_argument("--only", nargs="+", metavar="LOSS_TYPE", help="only these objectives")
    parser.add_argument("--steps", type=int, default=112, help="updates (default 112: three epochs of 600 pairs)")
    parser.add_argument("--batch", type=int, default=16, help="pairs per update (default 16)")
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--write", action="store_true", help="write tools/results/objectives.md and .svg")
    options = parser.parse_args()
    unknown = set(options.only or ()) - OBJECTIVES.keys()
    if unknown:
        parser.error(f"no such objective: {', '.join(sorted(unknown))}; there are {', '.join(OBJECTIVES)}")
    for name in ("model", "train", "eval"):
        setattr(options, name, str(Path(getattr(options, name)).resolve()))
    pairs = sum(1 for line in Path(options.eval).read_text().splitlines() if line.strip())
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in OBJECTIVES:
            if not options.only or name in options.only:
                rows.append(measure(options, name, Path(folder)))
                print(rows[-1], flush=True)
    text = report(rows, options, pairs)
    print(text)
    if options.write:
        (RESULTS / "objectives.md").write_text(text)
        (RESULTS / "objectives.svg").write_text(picture(rows, pairs))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
