"""What a run file may say, read off the dataclasses of `config`: names, types, defaults, descriptions."""

from __future__ import annotations

import ast
import inspect
import textwrap
import types
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import cache
from itertools import pairwise
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from megadpo.config import Config
from megadpo.objectives import OBJECTIVES, Objective
from megadpo.objectives.names import aliases_of


def field_types(section: type) -> dict[str, Any]:
    """The fields of a dataclass in their order, with resolved types."""
    hints = get_type_hints(section)
    return {field.name: hints[field.name] for field in fields(section)}


def optional(kind: Any) -> tuple[Any, bool]:
    """(the type without None, whether None is allowed). A run file has no other unions."""
    if get_origin(kind) not in (Union, types.UnionType):
        return kind, False
    inner = [part for part in get_args(kind) if part is not type(None)]
    assert len(inner) == 1, kind
    return inner[0], True


def default_of(field: Field[Any]) -> Any:
    """The value where the key is left out; MISSING where the key is required."""
    return field.default_factory() if field.default_factory is not MISSING else field.default


@cache
def field_docs(section: type) -> dict[str, str]:
    """The docstring under each field, on one line; empty where Python runs without source files."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(section)))
    except OSError:
        return {}
    body = tree.body[0].body if isinstance(tree.body[0], ast.ClassDef) else []
    docs = {}
    for before, after in pairwise(body):
        is_text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
        if isinstance(before, ast.AnnAssign) and isinstance(before.target, ast.Name) and is_text:
            docs[before.target.id] = " ".join(str(after.value.value).split())  # type: ignore[attr-defined]
    return docs


@cache
def leaf_paths() -> tuple[str, ...]:
    """The dotted path of every setting, those of the objectives included."""
    paths = []
    for name, kind in field_types(Config).items():
        if is_dataclass(kind) and isinstance(kind, type):
            paths += [f"{name}.{key}" for key in field_types(kind)]
        elif kind is Objective:
            keys = {key: None for objective in OBJECTIVES.values() for key in field_types(objective)}
            paths += [f"{name}.{key}" for key in ("loss_type", *keys)]
        else:
            paths.append(name)
    return tuple(paths)


def json_schema() -> dict[str, Any]:
    """JSON schema (2020-12) of a run file, for editors that check YAML while it is typed."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "megadpo run file",
        **_section_schema(Config),
    }


def _section_schema(section: type) -> dict[str, Any]:
    docs = field_docs(section)
    properties, required = {}, []
    for field, kind in zip(fields(section), field_types(section).values(), strict=True):
        entry = _type_schema(kind)
        if field.name in docs:
            entry["description"] = docs[field.name]
        default = default_of(field)
        if default is MISSING:
            required.append(field.name)
        elif not is_dataclass(default):
            entry["default"] = list(default) if isinstance(default, tuple) else default
        properties[field.name] = entry
    schema = {
        "type": "object",
        "description": " ".join((section.__doc__ or "").split()),
        "additionalProperties": False,
        "properties": properties,
    }
    return schema | ({"required": required} if required else {})


def _type_schema(kind: Any) -> dict[str, Any]:
    kind, nullable = optional(kind)
    if nullable:
        return {"anyOf": [_type_schema(kind), {"type": "null"}]}
    if kind is Objective:
        return _objective_schema()
    if is_dataclass(kind) and isinstance(kind, type):
        return _section_schema(kind)
    if get_origin(kind) is Literal:
        return {"enum": list(get_args(kind))}
    if get_origin(kind) is tuple and get_origin(get_args(kind)[0]) is Literal:
        return {"type": "array", "items": _type_schema(get_args(kind)[0])}
    if get_origin(kind) is tuple and get_args(kind)[0] is Objective:
        return {"type": "array", "items": {"$ref": "#/properties/objective"}}
    if get_origin(kind) is tuple and get_args(kind)[0] is float:
        return {"type": "array", "items": {"type": "number"}}
    if get_origin(kind) is tuple:
        return {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}
    return {"type": {int: "integer", float: "number", bool: "boolean", str: "string"}[kind]}


def _objective_schema() -> dict[str, Any]:
    """One branch per loss_type, so that an editor refuses a setting of another objective."""
    branches = []
    for name, objective in OBJECTIVES.items():
        branch = _section_schema(objective)
        branch["properties"] = {"loss_type": {"enum": [name, *aliases_of(name)]}} | branch["properties"]
        branches.append(branch | {"required": ["loss_type"]})
    return {"type": "object", "anyOf": branches}
