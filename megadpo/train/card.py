"""README.md of an exported folder, the model card: what was trained from what, on what, how, and with what result.

No secret gets in: what looks like one is blotted out wherever it stands, and the home folder is written as ~.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from megadpo.config import Config
from megadpo.convert.config_json import read_json
from megadpo.convert.imported import ABOUT
from megadpo.errors import ModelError

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
SECRETS = (
    re.compile(r"\b(?:hf_|sk-|gh[pousr]_|github_pat_|glpat-|xox[abprs]-|AKIA|wandb_v\d_)[A-Za-z0-9_-]{8,}"),
    re.compile(r"(?<=://)[^/\s@]+(?=@)"),
    re.compile(r"(?i)(?<=[?&])((?:[\w-]*(?:token|key|secret|password|sig(?:nature)?|credential)))=[^&\s\"'`]+"),
)
BLOT = "[removed]"


def run_card(config: Config, checkpoint: Path) -> str:
    """The card of a run's checkpoint, from its run folder's run.yaml, identity.json and metrics.jsonl."""
    run_dir = Path(config.run_dir).expanduser()
    identity = _read(run_dir / "identity.json")
    records = _records(run_dir / "metrics.jsonl")
    step = _read(checkpoint / "state.json").get("step")
    trained = [r for r in records if "loss" in r and (step is None or r["step"] <= step)]
    held_out = [r for r in records if "eval_loss" in r and (step is None or r["step"] <= step)]
    objective = type(config.objective).__name__.lower()
    base = _hub_name(config.model.path)
    facts = {
        "trained from": f"`{config.model.path}`" + _digest(identity, "model.weights"),
        "objective": f"`{config.objective}`",
        "reference": f"`{config.reference.path or config.model.path}`, {config.reference.mode}"
        if config.objective.needs_reference
        else None,
        "training data": ", ".join(f"`{x}`" for x in config.data.train) + _digest(identity, "data"),
        "held-out data": ", ".join(f"`{x}`" for x in config.data.eval) or None,
        "checkpoint": f"step {step}" if step is not None else None,
        "written by": f"megadpo {version('megadpo')}",
    }
    parts = [
        _front(base, [objective]),
        f"# {Path(config.model.path).name}, {objective}\n",
        _table({name: text for name, text in facts.items() if text}),
        _metrics("Last training step", trained),
        _metrics("Held-out data", held_out),
        _run_file(run_dir / "run.yaml"),
    ]
    return redacted("\n".join(part for part in parts if part))


def imported_card(folder: Path) -> str:
    """The card of a folder that was only converted, from its import.json."""
    about = _read(folder / ABOUT)
    source = str(about.get("source", folder.name))
    facts = {
        "converted from": f"`{source}`" + _digest(about, "source_weights"),
        "adapter merged in": f"`{about['adapter']}`" if about.get("adapter") else None,
        "training": "none by megadpo",
        "written by": f"megadpo {version('megadpo')}",
    }
    base = source if HUB_NAME.fullmatch(source) else None
    table = _table({name: text for name, text in facts.items() if text})
    return redacted("\n".join([_front(base, []), f"# {Path(source).name}\n", table]))


def redacted(text: str) -> str:
    """The text without what looks like a secret, and with ~ for the home folder."""
    for pattern in SECRETS:
        text = pattern.sub(lambda m: f"{m[1]}={BLOT}" if m.lastindex else BLOT, text)
    home = str(Path.home())
    return text.replace(home, "~") if len(home) > 1 else text


def _front(base: str | None, tags: list[str]) -> str:
    """The block at the top that the Hub reads."""
    lines = ["---", "library_name: transformers", *([f"base_model: {base}"] if base else [])]
    lines += ["tags:", "- megadpo", *(f"- {tag}" for tag in tags), "---", ""]
    return "\n".join(lines)


def _hub_name(model: str) -> str | None:
    """The model's name on the Hub, where its config.json keeps one."""
    try:
        name = read_json(Path(model).expanduser() / "config.json").get("_name_or_path")
    except ModelError:
        return None
    return name if isinstance(name, str) and HUB_NAME.fullmatch(name) else None


def _digest(identity: Mapping[str, Any], name: str) -> str:
    return f" (digest `{identity[name]}`)" if identity.get(name) else ""


def _table(facts: Mapping[str, str]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {text} |" for name, text in facts.items()), ""])


def _metrics(title: str, records: list[dict[str, Any]]) -> str:
    if not records:
        return ""
    values = {f"`{name}`": _number(value) for name, value in records[-1].items()}
    return f"## {title}\n\n{_table(values)}"


def _number(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _run_file(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError:
        return ""
    return f"## Run file\n\n```yaml\n{text.rstrip()}\n```\n"


def _read(path: Path) -> dict[str, Any]:
    """A JSON object of the run folder; nothing where it is missing or unreadable, as a card must not stop an export."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def _records(path: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError):
        return []
