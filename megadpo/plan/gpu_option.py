"""`--gpu`: a GPU by its name, or in numbers."""

from __future__ import annotations

import re
from dataclasses import replace
from difflib import get_close_matches
from typing import Any

from megadpo.errors import ConfigError
from megadpo.observe.gpus import GIB, GPUS, Gpu

UNITS = {"": 1, "gib": GIB, "gb": 10**9}
KEYS = {
    "memory": "memory",
    "bf16": "bf16_flops",
    "fp8": "fp8_flops",
    "bandwidth": "memory_bandwidth",
    "link": "link_bandwidth",
    "network": "network_bandwidth",
    "per_node": "per_node",
    "capability": "capability",
}
"""As written -> field of Gpu."""
REQUIRED = ("memory", "bf16")
BASE = GPUS["h100-80gb"]
"""Where the numbers come from that are not given."""


def parse_gpu(text: str) -> Gpu:
    """Raises ConfigError, with the nearest name or the key that is wrong."""
    if "=" in text:
        return _in_numbers(text)
    name = text.strip().lower()
    starts = [gpu for known, gpu in GPUS.items() if known.partition("-")[0] == name]
    if name in GPUS:
        return GPUS[name]
    if starts:
        return starts[0]
    close = get_close_matches(name, list(GPUS), 1, cutoff=0.3)
    meant = f"did you mean {close[0]}? " if close else ""
    raise ConfigError(
        f"--gpu {text}: is not known; {meant}There are {', '.join(GPUS)}; or give numbers, such as "
        "--gpu memory=80GiB,bf16=989e12,fp8=1979e12,bandwidth=3.35e12,link=450e9,network=50e9,per_node=8,capability=9.0"
    )


def _in_numbers(text: str) -> Gpu:
    given: dict[str, float] = {}
    for part in text.split(","):
        key, equals, value = part.strip().partition("=")
        if not equals or key not in KEYS:
            close = get_close_matches(key, KEYS, 1)
            meant = f"did you mean {close[0]}? " if close else ""
            raise ConfigError(f"--gpu {part.strip()}: {meant}Numbers are {', '.join(f'{name}=...' for name in KEYS)}")
        given[key] = _number(part.strip(), value)
    missing = [key for key in REQUIRED if key not in given]
    if missing:
        raise ConfigError(f"--gpu {text}: {' and '.join(missing)} missing (bytes as 80GiB or 80e9, FLOP/s as 989e12)")
    fields: dict[str, Any] = {KEYS[key]: value for key, value in given.items()}
    fields |= {name: int(fields[name]) for name in ("memory", "per_node") if name in fields}
    if "capability" in given:
        major, _, minor = f"{given['capability']:.1f}".partition(".")
        fields["capability"] = (int(major), int(minor))
    return replace(BASE, name="custom", **({"fp8_flops": None} | fields))


def assumed(text: str) -> list[str]:
    """What `--gpu` in numbers left out and where it is taken from."""
    if "=" not in text:
        return []
    said = {part.partition("=")[0].strip() for part in text.split(",")}
    left = [key for key in KEYS if key not in said and key not in ("fp8", "capability")]
    if "fp8" in said and "capability" not in said:  # decides about FP8 alone
        left.append("capability")
    return [f"{', '.join(left)} of the GPU as of {BASE.name}"] if left else []


def _number(part: str, value: str) -> float:
    found = re.fullmatch(r"([\d.]+(?:e[+-]?\d+)?)\s*(gib|gb)?", value.strip().lower())
    try:
        number = float(found.group(1)) * UNITS[found.group(2) or ""] if found else 0.0
    except ValueError:
        number = 0.0
    if not 0 < number < 1e21:
        raise ConfigError(f"--gpu {part}: must be a number over 0, such as 989e12 or 80GiB")
    if part.startswith("per_node") and number != int(number):
        raise ConfigError(f"--gpu {part}: must be a whole number of GPUs, such as 8")
    return number
