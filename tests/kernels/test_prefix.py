"""Duplication of prompts' keys and values, against float64."""

import pytest
import torch
from cases import GRADIENT, Place, relative
from megadpo_kernels.prefix import Copies, duplicate

HEADS, WIDTH = 3, 30


def stream() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Two groups: a prompt of 4 rows with three responses, one of 1 row with two; two rows of padding at the end."""
    generator = torch.Generator().manual_seed(0)
    sources, at = [], 0
    for prompt, responses in ((4, (3, 1, 2)), (1, (2, 2))):
        shared = list(range(at, at + prompt))
        sources += shared
        at += prompt
        for length in responses:
            sources += shared + list(range(at, at + length))
            at += length
    x = torch.randn(at + 2, HEADS, WIDTH, generator=generator)
    return x, torch.tensor(sources), torch.randn(len(sources), HEADS, WIDTH, generator=generator)


def run(place: Place, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The copies, and the gradient of the rows."""
    x, rows, upstream = stream()
    leaf = x.to(place.device, dtype).requires_grad_()
    result = duplicate(leaf, Copies.of(rows, len(x)).to(place.device), place.backend)
    result.backward(upstream.to(place.device, dtype))
    return result.detach().cpu(), leaf.grad.cpu()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_against_float64(place: Place, dtype: torch.dtype) -> None:
    x, rows, upstream = stream()
    want = torch.zeros_like(x, dtype=torch.float64).index_add_(0, rows, upstream.to(dtype).double())
    copies, gradient = run(place, dtype)
    assert torch.equal(copies, x.to(dtype)[rows])
    assert relative(gradient, want) <= GRADIENT[dtype]
    assert gradient[-2:].eq(0).all()
    if place.backend == "triton":
        torch.testing.assert_close(gradient, want.to(dtype), atol=1e-6, rtol=0)  # rounded once
