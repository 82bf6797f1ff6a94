"""Which code runs a kernel."""

from __future__ import annotations

import importlib.util
import os
from typing import Literal, get_args

import torch

Backend = Literal["auto", "reference", "chunked", "triton"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)
"""reference: plain torch, all logits at once. chunked: torch, a few rows at a time. triton: the same with kernels.
auto: chunked. Triton has not run on a device yet, so it is taken only where it is asked for by name."""


def triton_problem(device: torch.device) -> str | None:
    """Why the triton back end cannot run on this device, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install triton, or choose chunked"
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return "Triton needs a GPU (or TRITON_INTERPRET=1 before Python starts, for tests): choose chunked"
    return None


def uses_triton(backend: Backend, device: torch.device) -> bool:
    """Whether `backend` means Triton here. Raises ValueError where it is asked for and cannot run."""
    if backend not in BACKENDS:
        raise ValueError(f"backend = {backend!r}: must be one of {', '.join(BACKENDS)}")
    if backend != "triton":
        return False
    problem = triton_problem(device)
    if problem:
        raise ValueError(f"backend = triton on {device.type}: {problem}")
    return True
