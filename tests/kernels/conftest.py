"""Where kernels are tested: each back end on the CPU (Triton in its interpreter), and on a GPU where there is one."""

import sys
from pathlib import Path

import pytest
import torch
from cases import Place
from megadpo_kernels import triton_problem

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

if triton_problem(torch.device("cpu")) is None:
    import interpreter

    interpreter.round_to_nearest()

PLACES = [(device, backend) for device in ("cpu", "cuda") for backend in ("reference", "chunked", "triton")]


def place_of(device: str, backend: str) -> Place:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU here: `make test-gpu` on a machine with one runs it")
    problem = triton_problem(torch.device(device)) if backend == "triton" else None
    if problem:
        pytest.skip(problem)
    return Place(torch.device(device), backend)


def parameters(*, reference: bool) -> list:
    return [
        pytest.param((device, backend), id=f"{backend}-{device}", marks=[pytest.mark.gpu] if device == "cuda" else [])
        for device, backend in PLACES
        if reference or backend != "reference"
    ]


@pytest.fixture(params=parameters(reference=True))
def place(request: pytest.FixtureRequest) -> Place:
    """A back end on a device."""
    return place_of(*request.param)


@pytest.fixture(params=parameters(reference=False))
def lean(request: pytest.FixtureRequest) -> Place:
    """A back end that works chunk by chunk, on a device."""
    return place_of(*request.param)
