"""`megadpo bench --sweep`: every combination of some settings, each measured in processes of its own."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megadpo.errors import ConfigError

SAID = "megadpo: error: "
"""How the command line begins the one line of a mistake."""


@dataclass(frozen=True)
class Combination:
    """Settings as key=value, and what measuring them gave."""

    settings: tuple[str, ...]
    found: dict[str, Any] | None
    """What `megadpo bench --json` printed; None where it failed."""
    reason: str = ""
    """Why it failed, in one line."""


def combinations(sweep: Sequence[str]) -> list[tuple[str, ...]]:
    """["a=1,2", "b=x,y"] -> (a=1, b=x), (a=1, b=y), ... Raises ConfigError for what is no such list."""
    lists = []
    for text in sweep:
        key, equals, values = text.partition("=")
        if not key or not equals or not all(values.split(",")):
            raise ConfigError(
                f"--sweep {text}: must be a setting and its values, as parallel.sequence_parallel=true,false"
            )
        lists.append([f"{key}={value}" for value in values.split(",")])
    return list(itertools.product(*lists))


def swept(arguments: Sequence[str], sweep: Sequence[str]) -> Iterator[Combination]:
    """Measure every combination, one after the other. arguments: of `megadpo bench`, without --sweep and --json."""
    for settings in combinations(sweep):
        command = [sys.executable, "-m", "megadpo.cli", "bench", *arguments, *settings, "--json"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)
        if done.returncode == -signal.SIGINT or done.returncode == 128 + signal.SIGINT:
            raise KeyboardInterrupt
        lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
        if done.returncode == 0 and lines:
            yield Combination(settings, json.loads(lines[-1]))
        else:
            yield Combination(settings, None, reason(done.stderr, done.returncode))


def reason(said: str, exit_code: int) -> str:
    """Why a combination failed, from its standard error."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    if any("OutOfMemoryError" in line or "out of memory" in line.lower() for line in lines):
        exact = next((line for line in lines if "OutOfMemoryError" in line and ":" in line), "")
        return f"out of memory {exact.partition(':')[2].strip()}".strip()[:200]
    told = [line.removeprefix(SAID) for line in lines if line.startswith(SAID)]
    return (told or lines or [f"exit code {exit_code}, no word"])[-1][:300]


HEAD = (
    "settings",
    "s per step",
    "tokens/s",
    "scored/s",
    "pairs/s",
    "TFLOP/s",
    "MFU",
    "peak GiB",
    "padding",
    "what ran",
)


def cells(one: Combination) -> list[str]:
    """A row under HEAD; a failed one has its reason behind the settings."""
    settings, found = " ".join(one.settings), one.found
    if found is None:
        return [settings, f"failed: {one.reason}"]
    return [
        settings,
        f"{found['seconds']:.4f}",
        *(f"{found[rate]:.4g}" for rate in ("tokens_per_second", "scored_tokens_per_second", "pairs_per_second")),
        f"{found['perf/tflops_per_gpu']:.3g}",
        f"{found['perf/mfu']:.1%}" if "perf/mfu" in found else "-",
        f"{found['perf/peak_memory_gib']:.2f}",
        f"{found['padding_fraction']:.1%}",
        found["what"],
    ]
