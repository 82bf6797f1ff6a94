"""Ranks on a device, or beside it on the CPU, from a test process that may use CUDA itself."""

import os
from collections.abc import Callable
from typing import Any

import distributed
import pytest
import torch


def needs_gpus(count: int) -> None:
    """Skip where this machine has fewer."""
    if torch.cuda.device_count() < count:
        pytest.skip(
            f"needs {count} GPU(s), here are {torch.cuda.device_count()}: `make test-gpu` on a machine with them"
        )


def on(device: str, world: int, function: Callable[..., Any], *args: Any, timeout: float = 280) -> list[Any]:
    """`distributed.run_ranks` in spawned processes: on GPUs ("cuda"), or with none in sight ("cpu")."""
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
    before = {name: os.environ.get(name) for name in hidden}
    os.environ.update(hidden)
    try:
        return distributed.run_ranks(world, function, *args, timeout=timeout, method="spawn")
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
