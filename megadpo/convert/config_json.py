"""config.json, read as JSON field by field. What a complaint says: the field, its value, what is supported.

transformers is not asked: its versions 4 and 5 spell some fields differently and read each other's files with
silent defaults. Both spellings are read here and in rope_json.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megadpo.errors import ModelError

LARGEST = 2**26
"""No count in a config.json is larger; a damaged file could say so and keep us counting for ever."""


DTYPES = ("bfloat16", "float16", "float32")
"""What a config.json may say that its weights are."""


def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For json's object_pairs_hook: a name that stands twice in one object is an error."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name!r} stands there twice")
        found[name] = value
    return found


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of a model folder."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=no_duplicates)
    except FileNotFoundError:
        raise ModelError(f"{path} is missing: give a Hugging Face model folder") from None
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ModelError(f"{path}: holds a {type(values).__name__}; must be one JSON object")
    return values


def positive(value: Any) -> bool:
    """Whether a JSON value is a number greater than 0 (and neither true, nor NaN, nor Infinity)."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e38


class ConfigJson:
    """The fields of one config.json (or another file `name`). Absent and null mean the same."""

    def __init__(self, folder: str | Path, name: str = "config.json") -> None:
        self.path = Path(folder).expanduser() / name
        self.values = read_json(self.path)

    def get(self, field: str) -> Any:
        return self.values.get(field)

    def wrong(self, field: str, supported: str) -> ModelError:
        """The exception for a field that is missing or says what cannot be carried."""
        value = self.get(field)
        given = "is missing" if value is None else f"is {json.dumps(value)[:200]}"
        return ModelError(f"{self.path}: {field} {given}; supported: {supported}")

    def integer(self, field: str, default: int | None = None, at_most: int = LARGEST, least: int = 1) -> int:
        """A whole number from `least` to `at_most`; `default` where the field is absent, an error where there is
        none.
        """
        value = self.get(field)
        if value is None and default is not None:
            return default
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= at_most:
            raise self.wrong(field, f"a whole number from {least} to {at_most}")
        return value

    def number_or_null(self, field: str, absent: float | None) -> float | None:
        """A positive number, or None where the field is null; `absent` where it is not there at all."""
        if field not in self.values:
            return absent
        return None if self.get(field) is None else self.number(field)

    def number(self, field: str, default: float | None = None) -> float:
        """A positive number; `default` where the field is absent, an error where there is none."""
        value = self.get(field)
        if value is None and default is not None:
            return default
        if not positive(value):
            raise self.wrong(field, "a positive number")
        return float(value)

    def flag(self, field: str, default: bool) -> bool:
        value = self.get(field)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.wrong(field, "true or false")
        return value

    def require(self, field: str, *allowed: str | float) -> None:
        """The field, where present, must have one of these values: others change what the model computes."""
        value = self.get(field)
        if value is not None and value not in allowed:
            raise self.wrong(field, ", ".join(json.dumps(x) for x in allowed) or "only models without it")

    def dtype(self) -> str | None:
        """What the weights are, by `dtype` (transformers 5) or `torch_dtype` (4); None where neither is there."""
        for field in ("dtype", "torch_dtype"):
            self.require(field, *DTYPES)
        return self.get("dtype") or self.get("torch_dtype")

    def refuse_custom_code(self) -> None:
        """A model that is defined by Python files of its own folder: they are never run."""
        auto_map = self.get("auto_map")
        if isinstance(auto_map, dict) and any(name.startswith("AutoModel") for name in auto_map):
            raise self.wrong("auto_map", "models without code of their own (trust_remote_code is never used)")
