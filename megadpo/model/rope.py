"""Rotary frequencies, as the model families define them."""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor

from megadpo.convert.shape import ModelShape, RopeScaling
from megadpo.errors import ModelError


def inverse_frequencies(shape: ModelShape) -> Tensor:
    """float32 [rotated channels / 2]: angle per position of every channel pair. Su et al. 2021, equation 15
    (2104.09864)."""
    plain = _plain(shape, shape.rotary_base)
    scaling = shape.rope_scaling
    if scaling is None:
        return plain
    if scaling.rope_type == "linear":
        return plain / scaling.factor
    if scaling.rope_type == "llama3":
        return _llama3(plain, scaling)
    if scaling.rope_type == "yarn":
        return _yarn(plain, scaling, shape.rotary_base)
    raise ModelError(f"rope_type {scaling.rope_type!r} is not supported; supported: default, linear, llama3, yarn")


def local_frequencies(shape: ModelShape) -> Tensor | None:
    """Those of layers with a window, where they have a base of their own."""
    return None if shape.local_rotary_base is None else _plain(shape, shape.local_rotary_base)


def softmax_scale(shape: ModelShape) -> float | None:
    """What attention scores are multiplied by; None for 1 / sqrt(kv_channels).

    yarn enlarges rotated queries and keys by attention_factor each; on scores that is its square. In latent attention
    only a part of each head is rotated, so the part itself is enlarged (`cosines_and_sines`).
    """
    factor = shape.rope_scaling.attention_factor if shape.rope_scaling else None
    if factor is None or factor == 1 or shape.latent is not None:
        return shape.scores.scale
    assert shape.rotary_percent == 1, "channels that are not rotated are not enlarged"
    return factor**2 * (shape.scores.scale or shape.kv_channels**-0.5)


def angles(positions_T: Tensor, frequencies: Tensor) -> Tensor:
    """float32 [T, 1, 1, rotated channels], as Megatron-Core's attention takes them: both halves of a head alike."""
    half = positions_T[:, None].float() * frequencies
    return torch.cat([half, half], -1)[:, None, None]


def cosines_and_sines(positions_T: Tensor, frequencies: Tensor, shape: ModelShape) -> tuple[Tensor, Tensor]:
    """float32 [T, 1, 1, rotated channels / 2] each, enlarged by yarn's attention_factor: for latent attention."""
    factor = (shape.rope_scaling and shape.rope_scaling.attention_factor) or 1.0
    half = (positions_T[:, None].float() * frequencies)[:, None, None]
    return half.cos() * factor, half.sin() * factor


class TwoBaseAttention(SelfAttention):
    """Megatron-Core's self-attention where layers with a window rotate by other angles than those without: it is given
    the tables of both, [2, T, 1, 1, W], and takes its own."""

    def __init__(self, *args: Any, layers: tuple[bool, ...], **kwargs: Any) -> None:
        """layers: per layer over all pipeline stages, whether it takes the second."""
        super().__init__(*args, **kwargs)
        self.table = int(layers[self.layer_number - 1])

    def forward(self, *args: Any, rotary_pos_emb: Tensor, **kwargs: Any) -> Any:
        return super().forward(*args, rotary_pos_emb=rotary_pos_emb[self.table], **kwargs)


def _plain(shape: ModelShape, base: float) -> Tensor:
    rotated = shape.latent.rotary_width if shape.latent else int(shape.kv_channels * shape.rotary_percent)
    return 1.0 / base ** (torch.arange(0, rotated, 2, dtype=torch.float32) / rotated)


def _llama3(plain: Tensor, scaling: RopeScaling) -> Tensor:
    """Llama 3.1: long wavelengths are stretched by `factor`, short ones kept, those between blended.

    Llama 3.1's release code defines it; Megatron-Core's own switch fixes the four numbers that config.json gives.
    """
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    original = scaling.original_max_position_embeddings
    assert low is not None
    assert high is not None
    assert original is not None
    wavelength = 2 * math.pi / plain
    blend = ((original / wavelength - low) / (high - low)).clamp(0, 1)
    return blend * plain + (1 - blend) * plain / scaling.factor


def _yarn(plain: Tensor, scaling: RopeScaling, base: float) -> Tensor:
    """Pairs that turn more than beta_fast times in the original context are kept, those that turn less than beta_slow
    times are slowed down by `factor`, those between blended. Peng et al. 2023, section 3.2 (2309.00071)."""
    fast, slow, original = scaling.beta_fast, scaling.beta_slow, scaling.original_max_position_embeddings
    assert fast is not None
    assert slow is not None
    assert original is not None
    channels = 2 * len(plain)

    def channel(turns: float) -> float:
        """The channel pair that turns so many times in the original context."""
        return channels * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

    first, last = channel(fast), channel(slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, channels - 1)
    slowed = (torch.arange(len(plain), dtype=torch.float32) - first) / (last - first or 0.001)
    blend = slowed.clamp(0, 1)
    return plain / scaling.factor * blend + plain * (1 - blend)
