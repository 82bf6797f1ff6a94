"""Whose a run folder is: what must be the same for a run to go on in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megadpo.checkpoint.folder import STATE, checkpoints
from megadpo.config import Config, ModelConfig
from megadpo.convert.hf_files import weights_digest
from megadpo.errors import CheckpointError
from megadpo.files import write_text
from megadpo.objectives.names import as_settings

FILE = "identity.json"


def of_run(config: Config, data_digest: str) -> dict[str, Any]:
    """Settings that decide what the weights and checkpoints mean. Sizes of the grid, logging and length may change
    between two starts."""
    objective = as_settings(config.objective)
    del objective["loss_type"]
    identity = {
        "model.weights": weights_digest(Path(config.model.path).expanduser()),
        "model.dtype": config.model.dtype,
        "data": data_digest,
        "seed": config.seed,
        "train.shuffle": config.train.shuffle,
        "batch.global_batch_size": config.batch.global_batch_size,
        **_fp8(config.model),
        # without it, optimizer state has another layout in checkpoints
        "parallel.use_distributed_optimizer": config.parallel.use_distributed_optimizer,
        "objective": type(config.objective).__name__,
        **{f"objective.{name}": value for name, value in objective.items()},
    }
    if config.objective.needs_reference:
        identity["reference.weights"] = weights_digest(Path(config.reference.path or config.model.path).expanduser())
    return identity


def _fp8(model: ModelConfig) -> dict[str, Any]:
    """Format, recipe, layers in bf16 and whether weights are kept in FP8, which are part of what the weights mean;
    emulated or not is another machine's."""
    if model.fp8_format is None:
        return {}
    kept = (model.num_layers_at_start_in_bf16, model.num_layers_at_end_in_bf16)
    layers = f", {kept[0]} first and {kept[1]} last layers in bf16" if model.first_last_layers_bf16 else ""
    weights = ", fp8_param_gather" if model.fp8_param_gather else ""
    return {"model.fp8": f"{model.fp8_format} {model.fp8_recipe}{layers}{weights}"}


def claim(run_dir: Path, identity: dict[str, Any]) -> None:
    """Write the identity into a run folder that nothing was trained in yet; raise CheckpointError where the folder is
    another run's."""
    there = _read(run_dir)
    started = checkpoints(run_dir) or (run_dir / "metrics.jsonl").is_file()
    if there is not None and started:
        _compare(run_dir, there, identity, sorted(there.keys() | identity.keys()))
        return
    write_text(run_dir / FILE, json.dumps(identity, indent=1))


def check_models(checkpoint: Path, config: Config) -> None:
    """Raise CheckpointError where there is no checkpoint, or one trained from other models than the run file names."""
    if not (checkpoint / STATE).is_file():
        raise CheckpointError(f"{checkpoint}: is not a checkpoint; give a folder RUN_DIR/checkpoints/step-...")
    run_dir = checkpoint.resolve().parent.parent
    there = _read(run_dir)
    if there is not None:
        here = of_run(config, data_digest="")
        _compare(run_dir, there, here, [name for name in ("model.weights", "reference.weights") if name in here])


def _read(run_dir: Path) -> dict[str, Any] | None:
    path = run_dir / FILE
    if not path.is_file():
        return None
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error}), so it is not known whose folder this is; give another run_dir, or "
            "remove the file if you know that this run file is the folder's own"
        ) from error


def _compare(run_dir: Path, there: dict[str, Any], here: dict[str, Any], names: list[str]) -> None:
    different = [name for name in names if there.get(name) != here.get(name)]
    if different:
        first, *others = different
        raise CheckpointError(
            f"run_dir = {run_dir}: belongs to another run: its {first} is {there.get(first)}, this run's is "
            f"{here.get(first)}"
            + (f" (also: {', '.join(others)})" if others else "")
            + "; give another run_dir, or restore the setting to go on"
        )
