"""Write docs/run_file.md, docs/run_file.schema.json and docs/objectives.md from the dataclasses that they describe.

python tools/make_docs.py            writes them; the test-suite fails where they are not current
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megadpo.config.schema import json_schema
from megadpo.objectives.mixes import Mix
from megadpo.objectives.names import ALIASES, AMBIGUOUS, OBJECTIVES, aliases_of

DOCS = Path(__file__).resolve().parents[1] / "docs"


def kind(entry: dict[str, Any]) -> str:
    """A type as a reader writes it."""
    if "enum" in entry:
        return " or ".join(f"`{value}`" for value in entry["enum"])
    if "anyOf" in entry:
        return " or ".join(kind(part) for part in entry["anyOf"])
    if "$ref" in entry:
        return "objective sections"
    if entry["type"] == "array":
        return f"list of {kind(entry['items'])}"
    return {"integer": "whole number", "null": "nothing"}.get(entry["type"], entry["type"])


def rows(section: dict[str, Any]) -> list[str]:
    lines = ["| setting | type | default | meaning |", "|---|---|---|---|"]
    for name, entry in section["properties"].items():
        if name == "loss_type":
            continue
        default = f"`{json.dumps(entry['default'])}`" if "default" in entry else "required"
        lines.append(f"| `{name}` | {kind(entry)} | {default} | {entry.get('description', '')} |")
    return lines


def page(schema: dict[str, Any]) -> str:
    properties = schema["properties"]
    top = {name: entry for name, entry in properties.items() if "properties" not in entry and name != "objective"}
    lines = [
        "# The run file",
        "",
        "Written by `python tools/make_docs.py`; the source is `megadpo/config/sections.py` and `megadpo/objectives/`.",
        "YAML, strict: an unknown or misspelt key is an error that names the nearest one. `key=value` arguments go",
        "through the same reader (`optimizer.learning_rate=1e-6`). Relative paths are relative to where `megadpo` is",
        "started.",
        "`run_file.schema.json` beside this page lets an editor check a run file while it is typed.",
        "",
        *rows({"properties": top}),
    ]
    for name, section in properties.items():
        if "properties" in section:
            lines += ["", f"## {name}", "", section["description"], "", *rows(section)]
    lines += [
        "",
        "## objective",
        "",
        "`loss_type` chooses (`dpo` where not given); each objective has its own settings: see",
        "[objectives.md](objectives.md).",
    ]
    return "\n".join(lines) + "\n"


NEEDS = {
    "labels_S": "a label per response",
    "scores_S": "a judge's scores",
    "mismatched_kl": "responses to other prompts",
    "policy_N": "the policy's log-probability of each token",
    "reference_N": "the reference's log-probability of each token (`reference.mode: resident` or `swapped`)",
    "body_N": "which tokens are formatting",
    "collision_N": "the sum of squared probabilities at each token",
    "kl_N": "the KL to the reference at each token (`reference.mode: resident`, of the policy's vocabulary; keeps the "
    "reference's hidden state of each scored token of the batch; `model.logprob_backend` not `triton`)",
    "rival_N": "another token from the policy's top k at each token",
}


def needs(kind: type) -> list[str]:
    """What an objective wants of data and model, in words."""
    if kind is Mix:
        return ["what its parts need"]
    own = kind()
    groups = {None: "ranked lists of any length", 1: "one response per prompt", 2: "pairs"}[own.responses]
    words = [groups, "a reference" if own.needs_reference else "no reference"]
    words += [NEEDS[need] for need in sorted(own.needs - {"reference_S"})]
    if own.head == "scalar":
        words.append("a scalar head")
    if own.whole_batch:
        words.append("one more forward pass (the formula looks across the global batch)")
    return words


def objective_page(schema: dict[str, Any]) -> str:
    lines = [
        "# Objectives",
        "",
        "Written by `python tools/make_docs.py` from the docstrings in `megadpo/objectives/`. In the run file:",
        "`objective: {loss_type: NAME, setting: value}`. A setting that an objective does not have is an error.",
        "",
        "Notation: w chosen, l rejected; p policy, q reference; D = log p - log q of a response (nats, summed over its",
        "scored tokens); \\|y\\| its scored tokens, the end-of-sequence token included; b = `beta`; r = b D; s the",
        "sigmoid, h its logarithm. A loss is a mean over the pairs of the global batch unless it says otherwise,",
        "whatever the grid and the micro-batches; terms with other denominators are divided by theirs, of the global",
        "batch too.",
        "In the logs `rewards/*` are the rewards that a loss compares; those of `llama3`, `ld_dpo`, `dpop` and `r_dpo`",
        "are plain b D of the whole response, without what these losses leave out, weigh or add.",
        "Every objective is tested against an independent implementation, value and gradient (`tests/objectives/`,",
        "`make test`), and on grids: one of each way in which a grid could matter by `make test`, all of them by",
        "`make test-long`.",
        "",
        "| `loss_type` | elsewhere | what it is |",
        "|---|---|---|",
    ]
    for name, kind in OBJECTIVES.items():
        others = ", ".join(f"`{other}`" for other in aliases_of(name))
        lines.append(f"| [`{name}`](#{name}) | {others} | {summary(kind)} |")
    lines += [
        "",
        "Names that mean several things, or something that is not here, are refused with what to write instead:",
        "",
    ]
    lines += [f"* `{name}`: {text}." for name, text in AMBIGUOUS.items()]
    branches = {
        branch["properties"]["loss_type"]["enum"][0]: branch for branch in schema["properties"]["objective"]["anyOf"]
    }
    for name, kind in OBJECTIVES.items():
        lines += ["", f"## {name}", "", summary(kind), ""]
        parts = dict(
            part.split(": ", 1) for part in (" ".join(p.split()) for p in (kind.__doc__ or "").split("\n\n")[1:])
        )
        lines += [f"* Formula: `{parts['Formula']}`", f"* Paper: {parts['Paper']}", f"* TRL: {parts['TRL']}"]
        lines.append(f"* Needs: {'; '.join(needs(kind))}.")
        for alias in aliases_of(name):
            also = ", ".join(f"`{key}: {value}`" for key, value in ALIASES[alias].settings.items())
            lines.append(f"* `{alias}` ({ALIASES[alias].where}) is this" + (f" with {also}" if also else ""))
            if ALIASES[alias].above_0 is not None:
                lines[-1] += f", and asks for `{ALIASES[alias].above_0}` over 0"
        if len(branches[name]["properties"]) > 1:
            lines += ["", *rows(branches[name])]
    return "\n".join(lines) + "\n"


def summary(kind: type) -> str:
    return (kind.__doc__ or "").split("\n")[0]


def documents() -> dict[Path, str]:
    """Every generated document with its content."""
    schema = json_schema()
    return {
        DOCS / "run_file.md": page(schema),
        DOCS / "objectives.md": objective_page(schema),
        DOCS / "run_file.schema.json": json.dumps(schema, indent=1) + "\n",
    }


if __name__ == "__main__":
    for path, text in documents().items():
        path.write_text(text)
        print(f"wrote {path.relative_to(DOCS.parent)}")
