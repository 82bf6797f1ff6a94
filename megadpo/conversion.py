"""The commands `megadpo import` and `megadpo export`: conversion, progress on the terminal, and verification."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from megadpo import checkpoint
from megadpo.config import Config, TrainConfig
from megadpo.config.decode import load_config
from megadpo.convert.exporter import DTYPES, Dtype, export_hf
from megadpo.convert.families import read_shape
from megadpo.convert.hf_files import HFFiles, is_imported
from megadpo.convert.small_files import small_files
from megadpo.convert.to_checkpoint import import_hf, open_files
from megadpo.convert.verify import TOKENS, TOLERANCE, compare, positions, text_ids, transformers_logits
from megadpo.errors import CheckpointError, DataError, MachineError, ModelError
from megadpo.observe.progress import Screen, Terminal
from megadpo.parallel.ranks import joined
from megadpo.parallel.watchdog import STACKS, Watchdog, stacks_on_signal
from megadpo.train.card import imported_card
from megadpo.train.export import export, watched_percent

DEFAULT = TrainConfig().hang_timeout
"""Where there is no run file."""


@dataclass(frozen=True)
class Verification:
    """What --verify was told. Nothing is verified unless `wanted`."""

    wanted: bool = False
    text: str | None = None
    """A file whose text is used."""
    tokens: int = TOKENS
    tolerance: float = TOLERANCE


def run_import(
    folder: Path, out: Path, dtype: Dtype | None, adapter: Path | None, processes: int, verify: Verification
) -> int:
    """0, or 1 where the converted model was found to differ."""
    _alone()
    screen = Screen(Terminal())
    text = _text(verify)
    with Watchdog(DEFAULT) as watch, stacks_on_signal(STACKS), screen.task("import: percent", 100) as task:
        progress = watched_percent(task.to, watch, f"importing {folder}")
        warnings = import_hf(folder, out, dtype, adapter, processes, progress)
    for warning in warnings:
        screen.line(warning)
    screen.line(f"{folder} imported to {out}")
    if not verify.wanted:
        return 0
    files = open_files(folder, adapter, read_shape(folder)) if adapter else None
    return _verify(screen, folder, out, text, verify, DTYPES[dtype] if dtype else None, files)


@dataclass(frozen=True)
class ExportOptions:
    """Of the command line; those of the run file count where they are None."""

    checkpoint: Path | None = None
    dtype: Dtype | None = None
    max_shard_size_gb: float | None = None
    processes: int = 1


def run_export(folder: Path, out: Path, options: ExportOptions, verify: Verification) -> int:
    """folder: a run folder, one of its checkpoints, or one that `megadpo import` wrote. 0, or 1 where the exported
    model was found to differ."""
    _alone()
    screen = Screen(Terminal())
    text = _text(verify)
    if is_imported(folder) and options.checkpoint is None:
        weights = folder
        with Watchdog(DEFAULT) as watch, stacks_on_signal(STACKS), screen.task("export: percent", 100) as task:
            export_hf(
                folder,
                folder,
                out,
                options.dtype,
                int((options.max_shard_size_gb or 5.0) * 1e9),
                watched_percent(task.to, watch, f"exporting to {out}"),
                processes=options.processes,
                files={**small_files(folder), "README.md": imported_card(folder)},
            )
        screen.line(f"{folder} exported to {out}")
    else:
        config, weights = _run(folder, options)
        with Watchdog(config.train.hang_timeout) as watch, stacks_on_signal(STACKS):
            export(config, weights, out, processes=options.processes, watch=watch)
    return _verify(screen, out, weights, text, verify, _written(out), None) if verify.wanted else 0


def _written(out: Path) -> torch.dtype:
    files = HFFiles(out)
    return files.dtype(next(iter(files.where)))


def _run(folder: Path, options: ExportOptions) -> tuple[Config, Path]:
    """The run's settings and the checkpoint to export."""
    chosen = options.checkpoint
    if not (folder / "run.yaml").is_file() and folder.resolve().parent.name == "checkpoints":
        folder, chosen = folder.resolve().parent.parent, chosen or folder
    if not (folder / "run.yaml").is_file():
        raise CheckpointError(
            f"{folder}: has no run.yaml; give the run_dir of a training run, one of its checkpoints, or a folder that "
            "megadpo import wrote"
        )
    config = replace(load_config(folder / "run.yaml", []), run_dir=str(folder))
    chosen = chosen or checkpoint.latest(folder)
    if chosen is None:
        raise CheckpointError(f"{folder}: has no complete checkpoint yet; train first")
    damaged = checkpoint.damage(chosen)
    if damaged:
        raise CheckpointError(f"{damaged[0]}; the checkpoint is damaged: give another one with --checkpoint")
    settings = config.export
    if options.dtype is not None:
        settings = replace(settings, dtype=options.dtype)
    if options.max_shard_size_gb is not None:
        settings = replace(settings, max_shard_size_gb=options.max_shard_size_gb)
    return replace(config, export=settings), chosen


def _verify(
    screen: Screen,
    hf: Path,
    weights: Path,
    text: str | None,
    verify: Verification,
    dtype: torch.dtype | None,
    merged: HFFiles | None,
) -> int:
    from megadpo.model.logits import folder_logits

    shape = read_shape(hf)
    if shape.head != "vocabulary":
        raise ModelError(f"{hf}: is a reward model; --verify compares language models, so leave it out")
    longest = shape.max_position_embeddings
    count = min(verify.tokens, longest)
    ids, where = text_ids(hf, shape.vocab_size, count, text), positions(count, longest)
    theirs = transformers_logits(hf, ids, where, dtype, merged)
    ours = folder_logits(shape, weights, ids, where, dtype)
    worst = 0.0
    for name, one, other, at in zip(("short", "long"), theirs, ours, where, strict=True):
        found = compare(one, other, at)
        worst = max(worst, found.logit)
        screen.line(
            f"verify     {name} positions ({at[0]} to {at[-1]}, {count} tokens): largest difference from transformers "
            f"{found.logit:.1e} in a logit (position {found.position}, token {found.token}), {found.nats:.1e} nats"
        )
    good = worst <= verify.tolerance
    verdict = "equal" if good else "NOT EQUAL"
    screen.line(f"verify     {verdict}: largest difference {worst:.1e}, tolerance {verify.tolerance:.0e}")
    return 0 if good else 1


def _text(verify: Verification) -> str | None:
    if not verify.wanted or verify.text is None:
        return None
    try:
        return Path(verify.text).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--verify-text {verify.text}: cannot be read as text ({error})") from error


def _alone() -> None:
    rank = joined(os.environ)
    if rank is not None and rank.world_size > 1:
        raise MachineError(
            f"import and export are one process that starts its own ({sys.argv[0]} runs as rank {rank.rank} of "
            f"{rank.world_size}): start them without torchrun or srun, with --processes N"
        )
