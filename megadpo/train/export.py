"""From a checkpoint to a Hugging Face folder that is ready to use: weights, tokenizer, the template trained with."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from megadpo import checkpoint
from megadpo.config import Config
from megadpo.convert.exporter import Reward, export_hf
from megadpo.convert.small_files import small_files
from megadpo.data.tokenizer import load_tokenizer, padding_id, tokenizer_files
from megadpo.errors import StorageError, TokenizerError
from megadpo.files import storage_errors, write_text
from megadpo.observe.progress import Screen, Terminal
from megadpo.parallel.watchdog import UNWATCHED, Watchdog
from megadpo.train.card import run_card

TEMPLATE = "chat_template.jinja"
OF_THE_MODEL = (TEMPLATE, "tokenizer_config.json")
"""Sources of a chat template that a copy of the model's files brings along by itself."""


def export_target(config: Config) -> Path:
    return Path(config.export.path or Path(config.run_dir) / "export").expanduser()


def check_target(config: Config) -> None:
    """Before any time is spent: the folder to export to can be made, is free, and is nobody else's place.

    RUN_DIR/export is the run's own and is replaced; a folder that the user names must be empty or not there.
    """
    if not config.export.enabled:
        return
    target, run_dir = export_target(config).resolve(), Path(config.run_dir).expanduser().resolve()
    started = checkpoint.latest(run_dir) is not None
    if target.is_dir() and any(target.iterdir()) and (config.export.path or not started):
        raise StorageError(
            f"export.path = {target}: is not empty; give a new folder, empty it, or set export.enabled: false"
        )
    taken = (run_dir, run_dir / "checkpoints", run_dir / "logs", Path(config.data.cache_dir).expanduser().resolve())
    if config.export.path and (target in taken or run_dir / "checkpoints" in target.parents):
        raise StorageError(f"export.path = {target}: the run keeps other things there; give a folder of its own")
    with storage_errors(target, "export.path"):
        target.parent.mkdir(parents=True, exist_ok=True)
        probe = target.parent / f".{target.name}.probe"
        probe.touch()
        probe.unlink()


def keep_template(config: Config, source: str) -> None:
    """Keep the chat template in the run folder where conversations were rendered with another one than the model's own.

    source: where the template came from, as the data's report says ("none" where no conversation was rendered).
    """
    if source != "none" and (config.data.chat_template or source not in OF_THE_MODEL):
        tokenizer = load_tokenizer(config.data.tokenizer or config.model.path, config.data.chat_template)
        write_text(Path(config.run_dir).expanduser() / TEMPLATE, tokenizer.chat_template)


def export(
    config: Config,
    source: Path,
    out: Path,
    replace: bool = False,
    processes: int = 1,
    watch: Watchdog = UNWATCHED,
) -> None:
    """Write checkpoint `source` as the Hugging Face folder `out`; no process group, `processes` writers.

    The tokenizer is the one that was trained with, the model's own or data.tokenizer. replace: an older `out` goes once
    the new one is whole; else a folder that is not empty is a StorageError.
    """
    fresh = out.with_name(out.name + ".new") if replace else out
    reward = None
    if config.objective.head == "scalar":
        tokenizer = load_tokenizer(config.data.tokenizer or config.model.path, config.data.chat_template)
        reward = Reward(padding_id(tokenizer))
    screen = Screen(Terminal(sys.__stdout__))
    with screen.task("export: percent", 100) as task, storage_errors(out, "export.path"):
        if replace:
            shutil.rmtree(fresh, ignore_errors=True)
        export_hf(
            source,
            Path(config.model.path).expanduser(),
            fresh,
            config.export.dtype,
            int(config.export.max_shard_size_gb * 1e9),
            watched_percent(task.to, watch, f"exporting to {out}"),
            reward,
            processes,
            beside_the_weights(config, source),
        )
        if replace:
            shutil.rmtree(out, ignore_errors=True)
            fresh.replace(out)
    screen.line(f"{source} exported to {out}")


def watched_percent(to: Callable[[int], None], watch: Watchdog, doing: str) -> Callable[[int, int], None]:
    """For a conversion to call with (bytes done, bytes in all): shows the percentage, and is a sign of progress
    whenever there are more bytes than before. One tensor may take long, so each gets the time of what is slow."""
    watch.slowly(doing)
    before = 0

    def progress(done: int, total: int) -> None:
        nonlocal before
        to(100 * done // max(total, 1))
        if done > before:
            before = done
            watch.slowly(doing)

    return progress


def beside_the_weights(config: Config, source: Path) -> dict[str, Path | str]:
    """The files of an export beside weights and config.json: the model's own, the tokenizer and template trained with,
    and the model card."""
    files: dict[str, Path | str] = {**small_files(config.model.path)}
    if config.data.tokenizer:
        own = {file.name for file in tokenizer_files_of(Path(config.model.path).expanduser())}
        files = {name: file for name, file in files.items() if name not in own}
        for file in tokenizer_files(Path(config.data.tokenizer).expanduser()):
            files["tokenizer.model" if file.suffix == ".model" else file.name] = file
    template = Path(config.run_dir).expanduser() / TEMPLATE
    if template.is_file():
        files[TEMPLATE] = template
    return files | {"README.md": run_card(config, source)}


def tokenizer_files_of(folder: Path) -> list[Path]:
    """The tokenizer's files of a model folder, which need not have one."""
    try:
        return tokenizer_files(folder)
    except TokenizerError:
        return []
