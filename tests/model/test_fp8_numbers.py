"""Rounding to FP8 against a slow definition: every FP8 number is listed from its bits, and the nearest is looked up."""

import math
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from megadpo.model.fp8_emulation import (
    BLOCK,
    HISTORY,
    Operands,
    RoundedProduct,
    Rounding,
    mx_scale_of,
    round_blocks,
    round_tensor,
    scale_of,
    to_fp8,
)

KINDS = {"e4m3": (4, 3, 7), "e5m2": (5, 2, 15)}
"""Bits of the exponent, of the fraction, and the exponent's bias (2209.05433, table 1)."""


def finite_numbers(kind: str) -> list[Fraction]:
    """All of a format's numbers from 0 up, at the place of their code."""
    exponents, bits, bias = KINDS[kind]
    found = []
    for code in range(2 ** (exponents + bits)):
        exponent, fraction = divmod(code, 2**bits)
        if kind == "e5m2" and exponent == 31:  # infinity and NaN, as in IEEE 754
            break
        if kind == "e4m3" and code == 127:  # the only NaN
            break
        if exponent == 0:
            found.append(Fraction(fraction, 2**bits) * Fraction(2) ** (1 - bias))
        else:
            found.append((1 + Fraction(fraction, 2**bits)) * Fraction(2) ** (exponent - bias))
    return found


NUMBERS = {kind: finite_numbers(kind) for kind in KINDS}


def nearest(x: np.ndarray, kind: str) -> np.ndarray:
    """Float32: the number on whose side of the middles x is; in the middle of two, the one with the even code. All
    middles are float64 numbers."""
    numbers = np.array([float(number) for number in NUMBERS[kind]])
    middles = np.array([float((one + two) / 2) for one, two in pairwise(NUMBERS[kind])])
    size = np.abs(x.astype(np.float64))
    code = np.searchsorted(middles, size)  # how many middles are below
    tie = (code < len(middles)) & (middles[np.minimum(code, len(middles) - 1)] == size)
    found = np.copysign(numbers[code + (tie & (code % 2 == 1))], x)
    return np.where(np.isnan(x), np.nan, found).astype(np.float32)


def slow_rounded(x: np.ndarray, kind: str, scale: np.float32) -> np.ndarray:
    return nearest(x.astype(np.float32) * scale, kind) * (np.float32(1) / scale)


def slow_scale(amax: float, kind: str, recipe: str) -> np.float32:
    """Of a block, or a tensor, whose numbers are finite and of ordinary size."""
    if amax == 0:
        return np.float32(1)
    most = float(NUMBERS[kind][-1])
    if recipe == "mxfp8":  # the stored scale is the smallest power of two that leaves nothing over the largest number
        stored = float(np.float32(amax) * np.float32(1 / most))
        exponent = math.floor(math.log2(stored)) - 1
        while stored > 2.0**exponent:
            exponent += 1
        return np.float32(2.0**-exponent)
    scale = np.float32(most) / np.float32(amax)
    if recipe == "blockwise":
        return np.float32(2.0 ** math.floor(math.log2(float(scale))))
    return scale


def slow_blocks(x: np.ndarray, kind: str, recipe: str, high: int, wide: int) -> np.ndarray:
    out = np.empty(x.shape, dtype=np.float32)
    for row in range(0, x.shape[0], high):
        for column in range(0, x.shape[1], wide):
            here = np.s_[row : row + high, column : column + wide]
            out[here] = slow_rounded(x[here], kind, slow_scale(np.abs(x[here]).max(), kind, recipe))
    return out


def same(got: torch.Tensor, want: np.ndarray) -> None:
    """To the bit, the sign of zero included."""
    got_bits, want_bits = got.float().numpy().view(np.int32), want.view(np.int32)
    nans = np.isnan(want)
    assert np.array_equal(np.isnan(got.numpy()), nans)
    assert np.array_equal(got_bits[~nans], want_bits[~nans])


@pytest.mark.parametrize("kind", KINDS)
def test_every_number_and_what_lies_between(kind: Any) -> None:
    """Each number stays; between two of them, the middle goes to the even code and its neighbours to their side. The
    largest number takes all above it, infinity too; halves of the smallest become 0; NaN stays."""
    numbers = np.array([float(number) for number in NUMBERS[kind]], dtype=np.float32)
    assert numbers[-1] == {"e4m3": 448, "e5m2": 57344}[kind]
    assert numbers[1] == {"e4m3": 2.0**-9, "e5m2": 2.0**-16}[kind]
    middles = (numbers[1:] + numbers[:-1]) / 2
    infinity = np.float32(np.inf)
    beyond = np.array([numbers[-1] * 1.01, numbers[-1] * 1.08, 1e30, np.inf, np.nan, 1e-45, 1e-38], dtype=np.float32)
    x = np.concatenate([numbers, middles, np.nextafter(middles, infinity), np.nextafter(middles, -infinity), beyond])
    x = np.concatenate([x, -x])
    same(to_fp8(torch.from_numpy(x), kind), nearest(x, kind))
    assert to_fp8(torch.tensor([1e30, -torch.inf]), kind).tolist() == [numbers[-1], -numbers[-1]]


def ragged(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Numbers over many binades, with zeros and a block of nothing else."""
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((rows, columns)) * 2.0 ** rng.integers(-20, 12, (rows, columns))).astype(np.float32)
    x[:, : columns // 3] *= np.float32(1e-6)
    x[rows // 2 :, -3:] = 0
    return x


@pytest.mark.parametrize("kind", KINDS)
def test_recipes(kind: Any) -> None:
    """Bit for bit, for sizes that blocks do and do not divide."""
    for rows, columns in ((4, 256), (131, 40), (3, 1)):
        x = ragged(rows, columns)
        tensor = torch.from_numpy(x)
        scale = scale_of(tensor.abs().amax(), kind)
        same(round_tensor(tensor, kind, scale), slow_rounded(x, kind, slow_scale(np.abs(x).max(), kind, "tensorwise")))
        for recipe, size in BLOCK.items():
            for high, wide in ((1, size), (size, 1), (size, size)):
                got = round_blocks(tensor, kind, recipe, (high, wide))  # type: ignore[arg-type]
                same(got, slow_blocks(x, kind, recipe, high, wide))


@pytest.mark.parametrize("kind", KINDS)
def test_scales_are_nearest_quotients(kind: Any) -> None:
    """Over many largest numbers, alone too: the float32 nearest to the quotient, as numpy divides. A reciprocal times
    the format's largest number is off by one place for a quarter of them."""
    rng = np.random.default_rng(0)
    amax = (rng.uniform(1, 2, 100_000) * 2.0 ** rng.integers(-100, 120, 100_000)).astype(np.float32)
    most = np.float32(float(NUMBERS[kind][-1]))
    for some in (amax, torch.from_numpy(amax).bfloat16().float().numpy()):
        assert np.array_equal(scale_of(torch.from_numpy(some), kind).numpy(), most / some)
        for one in some[:200]:
            assert scale_of(torch.tensor(one), kind).item() == most / one
    reciprocal = most * (np.float32(1) / amax)
    assert (reciprocal != most / amax).mean() > 0.1, "these numbers would not show it"


def test_extremes_of_scales() -> None:
    """What Transformer Engine's compute_scale_from_amax and float_to_e8m0 do at the ends."""
    most = torch.finfo(torch.float32).max
    amax = torch.tensor([0.0, torch.inf, torch.nan, 1e-40, 448.0, 3.0e38])
    assert scale_of(amax, "e4m3").tolist() == [1, 1, 1, most, 1, pytest.approx(448 / 3.0e38)]
    # 448 x 2^-127: what an exponent of 8 bits can just not say; twice that: the smallest scale that it can
    small = 448 * 2.0**-127
    got = mx_scale_of(torch.tensor([0.0, small, 2 * small, 448.0, 449.0, torch.inf]), "e4m3").tolist()
    assert got == [1, 1, 2.0**126, 1, 0.5, 2.0**-127]
    assert mx_scale_of(torch.tensor([torch.nan]), "e4m3").isnan().all()
    assert not round_blocks(torch.zeros(3, 40), "e4m3", "mxfp8", (1, 32)).any()
    assert not round_blocks(torch.full((1, 32), 1e-40), "e4m3", "mxfp8", (1, 32)).any()
    assert round_blocks(torch.zeros(0, 40), "e4m3", "blockwise", (128, 1)).shape == (0, 40)


@pytest.mark.parametrize("recipe", BLOCK)
def test_one_bad_number_stays_in_its_block(recipe: Any) -> None:
    x = torch.from_numpy(ragged(2, 256))
    bad = x.clone()
    bad[0, 3] = torch.nan
    size = BLOCK[recipe]
    got, want = (round_blocks(t, "e4m3", recipe, (1, size)) for t in (bad, x))
    assert got[0, 3].isnan()
    assert torch.equal(got[0, size:], want[0, size:])
    assert torch.equal(got[1], want[1])


class Alone:
    """A process group of this process."""

    def size(self) -> int:
        return 1


def operands(recipe: Any, gradients: Any = "e5m2") -> Operands:
    return Operands(Rounding(recipe, gradients), Alone(), torch.device("cpu"))


def product(dtype: torch.dtype, numbers: Operands, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """x [T, 1, I], w [O, I], dy, and the results y, dx, dw."""
    rng = torch.Generator().manual_seed(seed)
    x = (torch.randn(150, 1, 140, generator=rng) * torch.logspace(-2, 1, 140)).to(dtype).requires_grad_()
    w = (torch.randn(136, 140, generator=rng) * 0.02).to(dtype).requires_grad_()
    dy = (torch.randn(150, 1, 136, generator=rng) * 1e-4).to(dtype)
    y = RoundedProduct.apply(x, w, numbers)
    dx, dw = torch.autograd.grad(y, [x, w], dy)
    return x.detach(), w.detach(), dy, y.detach(), dx, dw


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gradients", KINDS)
@pytest.mark.parametrize("recipe", ["tensorwise", "delayed", "blockwise", "mxfp8"])
def test_products_are_those_of_the_rounded_operands(recipe: Any, gradients: Any, dtype: torch.dtype) -> None:
    """y = x w', dx = dy w and dw = dy' x, each in float64 from operands that the slow definition rounds along the axis
    that the product adds up. Only the sum in float32 and the rounding to dtype lie between."""
    x, w, dy, y, dx, dw = product(dtype, operands(recipe, gradients))
    a, b, d = (t.float().flatten(0, -2).numpy() for t in (x, w, dy))

    def both_ways(values: np.ndarray, kind: str, squares: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Rounded for a sum over rows, and for one over columns."""
        if recipe in ("tensorwise", "delayed"):
            whole = slow_rounded(values, kind, slow_scale(np.abs(values).max(), kind, recipe))
            return whole.astype(np.float64), whole.astype(np.float64)
        size = BLOCK[recipe]
        blocks = ((size, size), (size, size)) if squares else ((size, 1), (1, size))
        down, along = (slow_blocks(values, kind, recipe, *block).astype(np.float64) for block in blocks)
        return down, along

    (x_down, x_along), (d_down, d_along) = both_ways(a, "e4m3"), both_ways(d, gradients)
    w_down, w_along = both_ways(b, "e4m3", squares=recipe == "blockwise")
    wanted = {"y": x_along @ w_along.T, "dx": d_along @ w_down, "dw": d_down.T @ x_down}
    plain = {"y": a @ b.T, "dx": d @ b, "dw": d.T @ a}
    close = 2e-6 if dtype == torch.float32 else 4e-3  # half a unit of bfloat16's last place is 2^-9
    for name, got in {"y": y, "dx": dx, "dw": dw}.items():
        assert got.dtype == dtype
        value = got.double().flatten(0, -2).numpy()
        size = np.abs(wanted[name]).max()
        assert np.abs(value - wanted[name]).max() < close * size, name
        assert np.abs(value - plain[name]).max() > 8e-3 * size, name  # and not those of the operands as they were


def test_frozen_weight_and_nothing_at_all() -> None:
    """A reference's weight gets no gradient; an expert may get no token."""
    numbers = operands("blockwise")
    w = torch.randn(8, 16)
    x = torch.randn(0, 1, 16, requires_grad=True)
    y = RoundedProduct.apply(x, w, numbers)
    assert y.shape == (0, 1, 8)
    y.sum().backward()
    assert x.grad is not None
    y = RoundedProduct.apply(torch.randn(0, 1, 16), w, operands("tensorwise"))
    assert y.shape == (0, 1, 8)


def test_delayed_scaling_looks_back() -> None:
    """It scales by the largest number of the steps in its window, not by the running step's, which saturates."""
    numbers = operands("delayed")
    x, w = torch.tensor([[1.0, 0.5]]), torch.eye(2)

    def passed(values: torch.Tensor) -> list[float]:
        return RoundedProduct.apply(values, w, numbers)[0].tolist()

    assert passed(x * 100) == [100, 50]  # nothing is known: as tensorwise
    assert not numbers.history_HP.any()
    numbers.step(torch.tensor([1.0, 1.0, 0.0]))
    assert passed(x) == [1, 0.5]
    assert passed(x * 100) == [1, 1]  # over the largest number of before
    numbers.step(torch.tensor([torch.inf, 1.0, 0.0]))  # an overflow is nothing to go by
    assert passed(x * 100) == [1, 1]
    numbers.step(torch.tensor([100.0, 1.0, 0.0]))
    assert passed(x * 100) == [100, 50]
    for _ in range(HISTORY - 1):
        numbers.step(torch.tensor([2.0, 1.0, 0.0]))
    assert passed(x * 100) == [100, 50]  # just within the window
    numbers.step(torch.tensor([2.0, 1.0, 0.0]))
    assert passed(x * 100) == [2, 2]
