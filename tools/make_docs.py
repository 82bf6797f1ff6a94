"""Write docs/run_file.md and docs/run_file.schema.json from the dataclasses that read the run file.

python tools/make_docs.py            writes both; the test-suite fails where they are not current
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megadpo.config.schema import json_schema

DOCS = Path(__file__).resolve().parents[1] / "docs"


def kind(entry: dict[str, Any]) -> str:
    """A type as a reader writes it."""
    if "enum" in entry:
        return " or ".join(f"`{value}`" for value in entry["enum"])
    if "anyOf" in entry:
        return " or ".join(kind(part) for part in entry["anyOf"])
    if entry["type"] == "array":
        return f"list of {kind(entry['items'])}"
    return {"integer": "whole number", "null": "nothing"}.get(entry["type"], entry["type"])


def rows(section: dict[str, Any]) -> list[str]:
    lines = ["| setting | type | default | meaning |", "|---|---|---|---|"]
    for name, entry in section["properties"].items():
        if "const" in entry:
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
    lines += ["", "## objective", "", "`loss_type` chooses; each objective has its own settings."]
    for branch in properties["objective"]["anyOf"]:
        loss_type = branch["properties"]["loss_type"]["const"]
        lines += ["", f"### loss_type: {loss_type}", "", branch["description"]]
        if len(branch["properties"]) > 1:
            lines += ["", *rows(branch)]
    return "\n".join(lines) + "\n"


def documents() -> dict[Path, str]:
    """Every generated document with its content."""
    schema = json_schema()
    return {
        DOCS / "run_file.md": page(schema),
        DOCS / "run_file.schema.json": json.dumps(schema, indent=1) + "\n",
    }


if __name__ == "__main__":
    for path, text in documents().items():
        path.write_text(text)
        print(f"wrote {path.relative_to(DOCS.parent)}")
