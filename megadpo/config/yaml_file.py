"""A YAML file as plain Python, with the line of every key, so that messages can say where to look."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from megadpo.errors import ConfigError


def read_yaml(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """The file as plain Python, and the line of every key down to the second level."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; give the path of a run file") from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: is a folder; give the path of a run file in it") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not UTF-8 text; a run file is YAML") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        lines = _key_lines(node, "", depth=2)
        tree = loader.construct_document(node) if node is not None else {}
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise ConfigError(
            f"{where}: {' '.join(str(error.problem or error.context).split())}; mend the YAML there"
        ) from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{path}: {' '.join(str(error).split())}; mend the YAML there") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: is not a mapping; a run file is a mapping of keys such as run_dir, model and data")
    return tree, lines


def _key_lines(node: yaml.Node | None, prefix: str, depth: int) -> dict[str, int]:
    """The line of each dotted key, counted from 1. Refuses a key that stands twice."""
    lines: dict[str, int] = {}
    if not isinstance(node, yaml.MappingNode) or depth == 0:
        return lines
    for key, value in node.value:
        path = f"{prefix}{key.value}"
        if path in lines:
            problem = f"{path} stands twice, first in line {lines[path]}"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
        lines[path] = key.start_mark.line + 1
        lines |= _key_lines(value, f"{path}.", depth - 1)
    return lines
