"""The rotary embedding of a config.json: transformers 5's rope_parameters, transformers 4's rope_theta,
rope_scaling.
"""

from __future__ import annotations

from typing import Any

from megadpo.convert.config_json import ConfigJson, positive
from megadpo.convert.shape import RopeScaling

NUMBERS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
"""Supported rope types and the numbers that each must give."""
UNUSED = {"original_max_position_embeddings"}
"""transformers writes it beside types that do not read it, too."""


def read_rope(config: ConfigJson, default_theta: float) -> tuple[float, RopeScaling | None]:
    """(theta, scaling; None for plain rotary embedding).

    `default_theta` is the family's published value. It stands in only where there is neither rope_theta nor
    rope_parameters, as in files that are older than the field; transformers 5 always writes rope_theta.
    """
    new, old = (_block(config, field) for field in ("rope_parameters", "rope_scaling"))
    if new and old and _without_theta(new) != _without_theta(old):
        raise config.wrong("rope_scaling", "what rope_parameters says, or only one of the two")
    field, block = ("rope_parameters", new) if new else ("rope_scaling", old)
    inside, outside = block.get("rope_theta"), config.get("rope_theta")
    if inside is not None and outside is not None and inside != outside:
        raise config.wrong("rope_theta", f"the value in {field}, or only one of the two")
    theta = outside if inside is None else inside
    if theta is None and not new:
        theta = default_theta
    if not positive(theta):
        raise config.wrong("rope_theta" if inside is None else field, "rope_theta as a positive number")
    return float(theta), _scaling(config, field, _without_theta(block))


def _block(config: ConfigJson, field: str) -> dict[str, Any]:
    """A copy of one of the two blocks with `type`, the old spelling, renamed to rope_type."""
    value = config.get(field)
    if value is not None and not isinstance(value, dict):
        raise config.wrong(field, "an object or null")
    block = {key: x for key, x in (value or {}).items() if x is not None}
    old = block.pop("type", None)
    if old is not None and block.setdefault("rope_type", old) != old:
        raise config.wrong(field, "one rope_type (type is its old spelling)")
    return block


def _without_theta(block: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in block.items() if key != "rope_theta"}


def _scaling(config: ConfigJson, field: str, block: dict[str, Any]) -> RopeScaling | None:
    kind = block.pop("rope_type", "default")
    if not isinstance(kind, str) or kind not in NUMBERS:
        raise config.wrong(field, f"rope_type {', '.join(NUMBERS)}")
    if block.pop("partial_rotary_factor", 1) != 1:
        raise config.wrong(field, "partial_rotary_factor 1.0")
    numbers = NUMBERS[kind]
    if block.keys() - set(numbers) - UNUSED:
        raise config.wrong(field, f"with rope_type {kind} only {', '.join(('rope_theta', *numbers))}")
    if not all(positive(block.get(number)) for number in numbers):
        raise config.wrong(field, f"rope_type {kind} with {', '.join(numbers)} as positive numbers")
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling(kind, float(block["factor"]))
    if block["high_freq_factor"] <= block["low_freq_factor"]:
        raise config.wrong(field, "a high_freq_factor greater than low_freq_factor")
    return RopeScaling(
        kind,
        float(block["factor"]),
        float(block["low_freq_factor"]),
        float(block["high_freq_factor"]),
        int(block["original_max_position_embeddings"]),
    )
