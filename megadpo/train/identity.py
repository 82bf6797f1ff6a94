"""Whose a run folder is: what must be the same for a run to go on in it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megadpo.config import Config
from megadpo.convert.hf_files import weights_digest
from megadpo.errors import CheckpointError
from megadpo.files import write_text

FILE = "identity.json"


def of_run(config: Config, data_digest: str) -> dict[str, Any]:
    """Settings that decide what the weights mean. Grid, logging and length may change between two starts."""
    identity = {
        "model.weights": weights_digest(Path(config.model.path).expanduser()),
        "model.dtype": config.model.dtype,
        "data": data_digest,
        "seed": config.seed,
        "train.shuffle": config.train.shuffle,
        "batch.global_batch_size": config.batch.global_batch_size,
        "objective": type(config.objective).__name__,
        **{f"objective.{name}": value for name, value in asdict(config.objective).items()},
    }
    if config.objective.needs_reference:
        identity["reference.weights"] = weights_digest(Path(config.reference.path or config.model.path).expanduser())
    return identity


def claim(run_dir: Path, identity: dict[str, Any]) -> None:
    """Write the identity into a new run folder; raise CheckpointError where the folder is another run's."""
    path = run_dir / FILE
    if path.is_file():
        there = json.loads(path.read_text())
        different = sorted(k for k in there.keys() | identity.keys() if there.get(k) != identity.get(k))
        if different:
            name = different[0]
            raise CheckpointError(
                f"run_dir = {run_dir}: belongs to another run: its {name} is {there.get(name)}, this run's is "
                f"{identity.get(name)}"
                + (f" (also: {', '.join(different[1:])})" if different[1:] else "")
                + "; give another run_dir, or restore the setting to go on"
            )
        return
    write_text(path, json.dumps(identity, indent=1))
