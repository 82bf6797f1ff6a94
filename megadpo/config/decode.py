"""From YAML to the frozen dataclasses of `config`, strictly: every problem of a run file is reported at once.

Paths in a run file are relative to the folder in which megadpo was started; `~` is expanded where a path is
used.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml

from megadpo.config import Config
from megadpo.config.check import problems as rule_problems
from megadpo.config.schema import default_of, field_docs, field_types, leaf_paths, optional
from megadpo.config.suggest import one_of, unknown_key
from megadpo.config.yaml_file import read_yaml
from megadpo.errors import ConfigError
from megadpo.objectives import OBJECTIVES, Objective
from megadpo.objectives.names import ALIASES, AMBIGUOUS, SETTINGS_ELSEWHERE, SETTINGS_IN_PAPERS, as_settings

DEFAULT_OBJECTIVE = "dpo"


@dataclass(frozen=True)
class Problem:
    """path: dotted path of the setting. text: what is wrong with it, what is allowed, what to do."""

    path: str
    text: str


class _Bad:
    """Stands for a value that could not be decoded."""


BAD = _Bad()


def load_config(path: str | Path, overrides: list[str]) -> Config:
    """The run file at `path` with `key=value` overrides applied (dotted keys, values in YAML).

    Raises one ConfigError with every problem of the file: unknown keys, wrong types, missing keys, and what
    `check.problems` finds.
    """
    tree, lines = read_yaml(Path(path).expanduser())
    origins = {key: f"{path}:{line}" for key, line in lines.items()}
    found: list[Problem] = []
    for override in overrides:
        key = _apply(override, tree, found)
        origins[key] = "command line"
    config = _section(Config, tree, "", found)
    if not isinstance(config, _Bad):
        # A rule that speaks of a setting which is wrong already would only confuse.
        wrong = {problem.path for problem in found}
        rules = [(_settings_named(text), text) for text in rule_problems(config)]
        found += [Problem(names[0], text) for names, text in rules if wrong.isdisjoint(names)]
    if found:
        raise ConfigError(_report(str(path), found, origins))
    return config


def to_yaml(config: Config) -> str:
    """The resolved run file, which `load_config` reads back. Credentials in URLs are masked."""
    tree = asdict(config)
    tree["objective"] = as_settings(config.objective)
    return yaml.safe_dump(_plain(tree), sort_keys=False, allow_unicode=True, width=110)


def _plain(value: Any) -> Any:
    """Lists for tuples, and `***` for the user and password of a URL and for Hugging Face tokens that `check` let
    through."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, str):
        return re.sub(r"hf_[A-Za-z0-9]{16,}", "***", re.sub(r"://[^/@\s]+@", "://***@", value))
    return value


def _apply(override: str, tree: dict[str, Any], found: list[Problem]) -> str:
    """Put one `key=value` into the tree; returns the key, or the whole override where it has none."""
    key, equals, text = override.partition("=")
    if not equals or not re.fullmatch(r"\w[\w-]*(\.\w[\w-]*)*", key):
        text = f"{override!r}: an override is key=value, such as optimizer.learning_rate=1e-6"
        found.append(Problem(override, text))
        return override
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):
        text = f"{override!r}: the value is not valid YAML; put text with special characters in quotes"
        found.append(Problem(key, text))
        return key
    *sections, last = key.split(".")
    for section in sections:
        if tree.get(section) is None:
            tree[section] = {}
        tree = tree[section]
        if not isinstance(tree, dict):
            return key  # the section itself is wrong in the file and will be reported
    tree[last] = value
    return key


# ---- decoding


def _section(kind: type, value: Any, path: str, found: list[Problem]) -> Any:
    """A dataclass from a mapping. A wrong setting counts as left out, so that the rest is checked too."""
    if value is None:
        value = {}
    if not isinstance(value, dict):
        names = ", ".join(field_types(kind))
        found.append(Problem(path, f"{path} = {_show(value)}: must be a section with keys of: {names}"))
        return BAD
    hints = field_types(kind)
    prefix = f"{path}." if path else ""
    for key in value:
        if key not in hints:
            found.append(Problem(f"{prefix}{key}", unknown_key(str(key), list(hints), path)))
    settings, complete = {}, True
    for field in fields(kind):
        name = f"{prefix}{field.name}"
        decoded: Any = BAD
        required = default_of(field) is MISSING
        if field.name in value:
            decoded = _decode(hints[field.name], value[field.name], name, found)
        elif required and is_dataclass(hints[field.name]):
            decoded = _section(hints[field.name], {}, name, found)
        elif required:
            doc = field_docs(kind).get(field.name, "it must be given")
            found.append(Problem(name, f"{name}: missing; {doc[0].lower()}{doc[1:]}"))
        if not isinstance(decoded, _Bad):
            settings[field.name] = decoded
        elif required:
            complete = False
    return kind(**settings) if complete else BAD


def _decode(kind: Any, value: Any, path: str, found: list[Problem]) -> Any:
    kind, nullable = optional(kind)
    if value is None and nullable:
        return None
    if kind is Objective:
        return _objective(value, path, found)
    if get_origin(kind) is tuple and get_args(kind)[0] is not str:
        return _list(get_args(kind)[0], value, path, found)
    if is_dataclass(kind) and isinstance(kind, type):
        return _section(kind, value, path, found)
    decoded, allowed = _scalar(kind, value)
    if isinstance(decoded, _Bad):
        allowed += " or null" if nullable else ""
        found.append(Problem(path, f"{path} = {_show(value)}: must be {allowed}"))
    return decoded


def _list(kind: Any, value: Any, path: str, found: list[Problem]) -> Any:
    """A tuple from a list."""
    if not isinstance(value, list | tuple):
        what = "sections, each with loss_type and its settings" if kind is Objective else "numbers"
        what = ", ".join(get_args(kind)) if get_origin(kind) is Literal else what
        found.append(Problem(path, f"{path} = {_show(value)}: must be a list of {what}"))
        return BAD
    items = [_decode(kind, item, f"{path}[{number}]", found) for number, item in enumerate(value)]
    return BAD if any(isinstance(item, _Bad) for item in items) else tuple(items)


def _objective(value: Any, path: str, found: list[Problem]) -> Any:
    """`loss_type` picks the dataclass, whose fields are the only other keys."""
    value = {} if value is None else value
    if not isinstance(value, dict):
        text = f"{path} = {_show(value)}: must be a section with loss_type and its settings"
        found.append(Problem(path, text))
        return BAD
    given = value.get("loss_type", DEFAULT_OBJECTIVE)
    given = given[0] if isinstance(given, list) and len(given) == 1 else given  # as TRL writes it
    name, settings, problem = _loss_type(given, path)
    if problem:
        found.append(Problem(f"{path}.loss_type", f"{path}.loss_type = {_show(given)}: {problem}"))
        return BAD
    kind = OBJECTIVES[name]
    names = list(field_types(kind))
    for key, inner in value.items():
        if key == "loss_type":
            continue
        if key not in names:
            text = f"{path}.{key}: {given} has no such setting; {_instead(str(key), name, names, path)}"
            found.append(Problem(f"{path}.{key}", text))
        elif key in settings and settings[key] != inner:
            text = f"{path}.{key} = {_show(inner)}: loss_type {given} says {settings[key]}; write loss_type: {name}"
            found.append(Problem(f"{path}.{key}", text))
        else:
            settings[key] = inner
    objective = _section(kind, settings, path, found)
    above_0 = ALIASES[_plain_name(given)].above_0 if _plain_name(given) in ALIASES else None
    if above_0 is not None and settings.get(above_0, 0) == 0:
        text = f"{path}.{above_0} = 0: loss_type {given} is {name} with {above_0} over 0; set it, or write {name}"
        found.append(Problem(f"{path}.{above_0}", text))
    return objective


def _plain_name(loss_type: str) -> str:
    """As the tables of names have it."""
    return loss_type.strip().lower().replace("-", "_")


def _loss_type(given: Any, path: str) -> tuple[str, dict[str, Any], str]:
    """(the objective's own name, what the given name says of its settings, what is wrong or nothing)."""
    if isinstance(given, list):
        parts = ", ".join(f"{{loss_type: {part}}}" for part in given)
        return "", {}, f"must be one name; for several objectives write loss_type: mix, parts: [{parts}] and weights"
    if not isinstance(given, str):
        return "", {}, f"must be {one_of(tuple(OBJECTIVES), given)}"
    name = _plain_name(given)
    if name in AMBIGUOUS:
        return "", {}, AMBIGUOUS[name]
    if name in ALIASES:
        return ALIASES[name].loss_type, dict(ALIASES[name].settings), ""
    if name in OBJECTIVES:
        return name, {}, ""
    close = difflib.get_close_matches(name, [*OBJECTIVES, *ALIASES], 1)
    meant = f"did you mean {close[0]}? " if close else ""
    return "", {}, f"is no objective; {meant}There are {', '.join(OBJECTIVES)} (docs/objectives.md)"


def _instead(key: str, loss_type: str, names: list[str], path: str) -> str:
    """What to write instead of a setting that an objective does not have."""
    if key in SETTINGS_IN_PAPERS.get(loss_type, {}):
        return f"here that is {path}.{SETTINGS_IN_PAPERS[loss_type][key]}"
    if key in SETTINGS_ELSEWHERE and SETTINGS_ELSEWHERE[key].split()[0].rstrip(",:") in [*names, "loss_type"]:
        return f"here that is {path}.{SETTINGS_ELSEWHERE[key]}"
    if key in SETTINGS_ELSEWHERE:
        return f"elsewhere in megadpo that is {SETTINGS_ELSEWHERE[key]}; its settings: {', '.join(names) or 'none'}"
    close = difflib.get_close_matches(key, names, 1)
    return f"did you mean {path}.{close[0]}?" if close else f"its settings: {', '.join(names) or 'none'}"


def _scalar(kind: Any, value: Any) -> tuple[Any, str]:
    """(the value or BAD, what is allowed in words)."""
    if get_origin(kind) is Literal:
        choices = get_args(kind)
        return (value if isinstance(value, str) and value in choices else BAD), one_of(choices, value)
    if get_origin(kind) is tuple:
        items = (value,) if isinstance(value, str) else value
        good = isinstance(items, list | tuple) and all(isinstance(item, str) for item in items)
        return (tuple(items) if good else BAD), "text or a list of texts"
    if kind is bool:
        return (value if isinstance(value, bool) else BAD), "true or false"
    if kind is int:
        good = isinstance(value, int) and not isinstance(value, bool)
        return (value if good else BAD), f"a whole number{_whole_hint(value)}"
    if kind is float:
        return _float(value), "a finite number"
    assert kind is str, kind
    return (value if isinstance(value, str) else BAD), f"text{_text_hint(value)}"


def _whole_hint(value: Any) -> str:
    """For 64.0 and "64": how to write what was meant."""
    whole = value.is_integer() if isinstance(value, float) else isinstance(value, str) and value.isdecimal()
    return f" (write {int(value)})" if whole else ""


def _text_hint(value: Any) -> str:
    """For a number, a truth value or a date where text is asked for: how to write what was meant."""
    plain = isinstance(value, bool | int | float) or hasattr(value, "isoformat")
    return f' (write "{_show(value)}")' if plain else ""


def _float(value: Any) -> Any:
    """A finite float. YAML 1.1 reads 1e-4, which has no dot, as text."""
    number = r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?"
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return BAD
    if isinstance(value, str) and not re.fullmatch(number, value):
        return BAD
    try:
        decoded = float(value)
    except OverflowError:
        return BAD
    return decoded if math.isfinite(decoded) else BAD


# ---- words


def _settings_named(text: str) -> list[str]:
    """The settings that a rule speaks of, the first one first."""
    words = [word.strip(".") for word in re.split(r"[^\w.]+", text)]
    return [word for word in words if word in leaf_paths()] or [""]


def _show(value: Any) -> str:
    """A value as the user may have written it, on one line, at most 60 characters."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        text = _one_line(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _one_line(text: object) -> str:
    return " ".join(str(text).split())


def _report(path: str, found: list[Problem], origins: dict[str, str]) -> str:
    lines = [f"{_origin(problem.path, path, origins)}: {_one_line(problem.text)}" for problem in found]
    return lines[0] if len(lines) == 1 else "\n  ".join([f"{path} has {len(lines)} problems", *lines])


def _origin(key: str, path: str, origins: dict[str, str]) -> str:
    """Where a key was written, or the section that it belongs in; the file where it stands nowhere."""
    while key:
        if key in origins:
            return origins[key]
        key = key.rpartition(".")[0]
    return path
