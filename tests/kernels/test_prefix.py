"""Rotary embedding with duplication of prompts, against float64; and its agreement with Megatron-Core's rotary."""

import pytest
import torch
from cases import GRADIENT, Place, relative
from megadpo_kernels.prefix import Duplication, rotate, rotate_and_duplicate

HEADS, WIDTH = 3, 16


def stream(seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Two groups: a prompt of 4 rows with three responses, one of 1 row with two; two rows of padding at the end."""
    generator = torch.Generator().manual_seed(seed)
    sources, positions, at = [], [], 0
    for prompt, responses in ((4, (3, 1, 2)), (1, (2, 2))):
        shared = list(range(at, at + prompt))
        sources += shared
        positions += range(prompt)
        at += prompt
        for length in responses:
            sources += shared + list(range(at, at + length))
            positions += range(prompt, prompt + length)
            at += length
    key, value = (torch.randn(at + 2, HEADS, WIDTH, generator=generator) for _ in range(2))
    inverse = 10000.0 ** (-torch.arange(0, WIDTH, 2) / WIDTH)
    angles = torch.tensor([*positions, 0, 0])[:, None] * inverse
    rows = torch.tensor(sources)
    upstream = torch.randn(2, len(rows), HEADS, WIDTH, generator=generator)
    return key, value, angles, rows, upstream


def run(place: Place, dtype: torch.dtype) -> list[torch.Tensor]:
    """Keys, values, and the gradients of both."""
    key, value, angles, rows, upstream = stream()
    k, v = (x.to(place.device, dtype).requires_grad_() for x in (key, value))
    cos, sin = angles.cos().to(place.device), angles.sin().to(place.device)
    way = Duplication.of(rows, len(key)).to(place.device)
    new_k, new_v = rotate_and_duplicate(k, v, cos, sin, way, place.backend)
    torch.autograd.backward([new_k, new_v], list(upstream.to(place.device, dtype)))
    return [x.detach().cpu() for x in (new_k, new_v, k.grad, v.grad)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_against_float64(place: Place, dtype: torch.dtype) -> None:
    key, value, angles, rows, upstream = stream()
    k, v = (x.to(dtype).double().requires_grad_() for x in (key, value))
    turn = torch.polar(torch.ones_like(angles), angles).to(torch.complex128)[:, None]
    turned = torch.complex(k[..., : WIDTH // 2], k[..., WIDTH // 2 :]) * turn
    want_k = torch.cat([turned.real, turned.imag], -1)[rows]
    want_v = v[rows]
    torch.autograd.backward([want_k, want_v], list(upstream.to(dtype).double()))
    for got, want in zip(run(place, dtype), (want_k, want_v, k.grad, v.grad), strict=True):
        assert got.dtype == dtype
        assert relative(got, want.detach()) <= (3e-7 if dtype == torch.float32 else GRADIENT[dtype])


def test_rows_without_a_copy_get_no_gradient(place: Place) -> None:
    for gradient in run(place, torch.float32)[2:]:
        assert gradient[-2:].eq(0).all()
        assert gradient[:-2].ne(0).any(-1).all()


def test_the_rotation_is_megatrons() -> None:
    from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd

    key, _, angles, _, _ = stream()
    theirs = _apply_rotary_pos_emb_bshd(key[:, None], torch.cat([angles, angles], -1)[:, None, None])[:, 0]
    torch.testing.assert_close(rotate(key, angles.cos(), angles.sin()), theirs, atol=1e-6, rtol=0)


def test_wrong_shapes() -> None:
    key, value, angles, rows, _ = stream()
    with pytest.raises(ValueError, match="W / 2"):
        rotate_and_duplicate(key[..., :-2], value, angles.cos(), angles.sin(), Duplication.of(rows, len(key)))
