"""The rotary embedding of a config.json: transformers 5's rope_parameters, transformers 4's rope_theta,
rope_scaling.
"""

from __future__ import annotations

import math
from typing import Any

from megadpo.convert.config_json import ConfigJson, positive
from megadpo.convert.shape import RopeScaling

NUMBERS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
}
"""Supported rope types and the numbers that each must give."""
OPTIONAL = {"yarn": ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate")}
UNUSED = {"original_max_position_embeddings"}
"""transformers writes it beside types that do not read it, too."""
PARTIAL = "partial_rotary_factor"

Rope = tuple[float, RopeScaling | None]
"""Base (theta) and scaling; None for plain rotary embedding."""


def read_rope(config: ConfigJson, default_theta: float, *, partial: bool = False) -> Rope:
    """The rotary embedding of a model that has one for all layers.

    `default_theta` is the family's published value. It stands in only where there is neither rope_theta nor
    rope_parameters, as in files that are older than the field; transformers 5 always writes rope_theta.
    partial: the family reads partial_rotary_factor itself; elsewhere it must be 1.
    """
    new, old = (_block(config, field, config.get(field)) for field in ("rope_parameters", "rope_scaling"))
    if partial:
        new.pop(PARTIAL, None)
    if new and old and _without_theta(new) != _without_theta(old):
        raise config.wrong("rope_scaling", "what rope_parameters says, or only one of the two")
    field, block = ("rope_parameters", new) if new else ("rope_scaling", old)
    return _rope(config, field, block, "rope_theta", None if new else default_theta)


def read_rope_by_layer(config: ConfigJson, default_theta: tuple[float, float]) -> tuple[Rope, Rope]:
    """(rotary embedding of layers without a window, of layers with one), as Gemma 3 writes them: an object for each in
    rope_parameters, or rope_theta with rope_scaling and rope_local_base_freq."""
    kinds = ("full_attention", "sliding_attention")
    new = config.get("rope_parameters")
    if new is None:
        old = _block(config, "rope_scaling", config.get("rope_scaling"))
        everywhere = _rope(config, "rope_scaling", old, "rope_theta", default_theta[0])
        return everywhere, _rope(config, "", {}, "rope_local_base_freq", default_theta[1])
    if config.get("rope_scaling") is not None:
        raise config.wrong("rope_scaling", "only rope_parameters, or none of the two")
    if not isinstance(new, dict) or new.keys() != set(kinds):
        raise config.wrong("rope_parameters", f"an object with {' and '.join(kinds)}")
    field = "rope_parameters"
    everywhere, local = (
        _rope(config, field, _block(config, field, new[kind]), theta, None)
        for kind, theta in zip(kinds, ("rope_theta", "rope_local_base_freq"), strict=True)
    )
    return everywhere, local


def _rope(config: ConfigJson, field: str, block: dict[str, Any], outer: str, default: float | None) -> Rope:
    """Of one block of `field`. outer: the field of config.json that may give theta instead; default: where none does,
    an error where it is None."""
    inside, outside = block.get("rope_theta"), config.get(outer)
    if inside is not None and outside is not None and inside != outside:
        raise config.wrong(outer, f"the value in {field}, or only one of the two")
    theta = outside if inside is None else inside
    if theta is None:
        theta = default
    if not positive(theta):
        raise config.wrong(outer if inside is None else field, "rope_theta as a positive number")
    return float(theta), _scaling(config, field, _without_theta(block))


def _block(config: ConfigJson, field: str, value: Any) -> dict[str, Any]:
    """A copy of `value`, which stands in `field`, with `type`, the old spelling, renamed to rope_type."""
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
    if block.pop(PARTIAL, 1) != 1:
        raise config.wrong(field, "partial_rotary_factor 1.0")
    numbers, optional = NUMBERS[kind], OPTIONAL.get(kind, ())
    if block.keys() - set(numbers) - set(optional) - UNUSED:
        raise config.wrong(field, f"with rope_type {kind} only {', '.join(('rope_theta', *numbers, *optional))}")
    if not all(positive(block.get(number)) for number in numbers):
        raise config.wrong(field, f"rope_type {kind} with {', '.join(numbers)} as positive numbers")
    length = "original_max_position_embeddings"
    if length in numbers and config.get(length) not in (None, block[length]):
        raise config.wrong(length, f"the value in {field}, or only one of the two")
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling(kind, float(block["factor"]))
    if kind == "yarn":
        return _yarn(config, field, block)
    if block["high_freq_factor"] <= block["low_freq_factor"]:
        raise config.wrong(field, "a high_freq_factor greater than low_freq_factor")
    return RopeScaling(
        kind,
        float(block["factor"]),
        float(block["low_freq_factor"]),
        float(block["high_freq_factor"]),
        int(block["original_max_position_embeddings"]),
    )


def _yarn(config: ConfigJson, field: str, block: dict[str, Any]) -> RopeScaling:
    """Peng et al. 2023 (2309.00071), section 3.4 for attention_factor, with the defaults that transformers has."""
    numbers = {"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 0.0, "mscale_all_dim": 0.0, "attention_factor": 0.0}
    truncate = block.get("truncate", True)
    for name in numbers:
        if name in block and not positive(block[name]):
            raise config.wrong(field, f"{name} as a positive number")
        numbers[name] = float(block.get(name, numbers[name]))
    if not isinstance(truncate, bool):
        raise config.wrong(field, "truncate true or false")
    if numbers["beta_fast"] <= numbers["beta_slow"]:
        raise config.wrong(field, "a beta_fast greater than beta_slow")
    factor, both = float(block["factor"]), numbers["mscale"] and numbers["mscale_all_dim"]
    usual = (
        magnitude(factor, numbers["mscale"]) / magnitude(factor, numbers["mscale_all_dim"])
        if both
        else magnitude(factor, 1.0)
    )
    return RopeScaling(
        "yarn",
        factor,
        original_max_position_embeddings=int(block["original_max_position_embeddings"]),
        beta_fast=numbers["beta_fast"],
        beta_slow=numbers["beta_slow"],
        attention_factor=numbers["attention_factor"] or usual,
        truncate=truncate,
    )


def magnitude(factor: float, mscale: float) -> float:
    """By how much yarn enlarges queries and keys for contexts `factor` times as long."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0
