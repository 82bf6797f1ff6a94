"""Skips that name what is missing."""

import importlib.util

import pytest
import torch

from megadpo.observe.versions import WHEELS


def wheel(module: str) -> None:
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is missing: {WHEELS[module]}")


def gpus(count: int) -> None:
    if torch.cuda.device_count() < count:
        pytest.skip(f"needs {count} GPUs; here: {torch.cuda.device_count()}")
