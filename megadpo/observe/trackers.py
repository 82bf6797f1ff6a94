"""TensorBoard and Weights & Biases, where the run file asks for them."""

from __future__ import annotations

import importlib.util
import math
import uuid
from pathlib import Path
from typing import Any, Protocol

from megadpo.config import LogConfig
from megadpo.errors import MachineError
from megadpo.files import write_text

INSTALL = "install it with: pip install 'megadpo[logging]'"


class Tracker(Protocol):
    def log(self, step: int, record: dict[str, float | int]) -> None: ...

    def close(self) -> None: ...


def check_trackers(log: LogConfig) -> None:
    """Raises MachineError where a package or a key is missing; nothing is written and no network is used."""
    if log.tensorboard and not _installed("tensorboard"):
        raise MachineError(f"log.tensorboard = true: the package tensorboard is missing; {INSTALL}, or leave it out")
    if log.wandb_project is None:
        return
    if not _installed("wandb"):
        raise MachineError(f"log.wandb_project: the package wandb is missing; {INSTALL}, or leave it out")
    if log.wandb_mode == "online":
        import wandb

        if not wandb.login(prompt=False, verify=False):
            raise MachineError(
                "log.wandb_project: this machine has no key for Weights & Biases; run `wandb login`, set "
                "WANDB_API_KEY, or set log.wandb_mode = offline"
            )


def _installed(package: str) -> bool:
    """A folder named `wandb` in the current directory (offline runs lie in such) is not the package."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None


def open_trackers(run_dir: Path, log: LogConfig, settings: dict[str, Any], first_step: int) -> list[Tracker]:
    """The trackers that `log` asks for. settings: the resolved run file, for W&B.

    Curves of a run that goes on are continued; what TensorBoard has from first_step on is struck out.
    """
    check_trackers(log)
    found: list[Tracker] = []
    if log.tensorboard:
        found.append(TensorBoard(run_dir / "tensorboard", first_step))
    if log.wandb_project is not None:
        found.append(WeightsAndBiases(run_dir, log, settings))
    return found


class TensorBoard:
    def __init__(self, folder: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=first_step)

    def log(self, step: int, record: dict[str, float | int]) -> None:
        for name, value in record.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """One W&B run per run folder, its id in wandb-id.txt. W&B itself ignores steps that it has already."""

    def __init__(self, run_dir: Path, log: LogConfig, settings: dict[str, Any]) -> None:
        import wandb

        file = run_dir / "wandb-id.txt"
        run_id = file.read_text().strip() if file.is_file() else uuid.uuid4().hex[:12]
        try:
            self._run = wandb.init(
                project=log.wandb_project,
                name=log.run_name,
                mode=log.wandb_mode,
                id=run_id,
                resume="allow",
                dir=str(run_dir),
                config=settings,
                settings=wandb.Settings(silent=True, console="off", disable_git=True, save_code=False),
            )
        except wandb.errors.Error as error:
            reason = " ".join(str(error).split())
            raise MachineError(
                f"log.wandb_project: Weights & Biases cannot be reached ({reason[:200]}); mend that or set "
                "log.wandb_mode = offline"
            ) from error
        write_text(file, run_id + "\n")

    def log(self, step: int, record: dict[str, float | int]) -> None:
        self._run.log({name: value for name, value in record.items() if math.isfinite(value)}, step=step)

    def close(self) -> None:
        self._run.finish()
