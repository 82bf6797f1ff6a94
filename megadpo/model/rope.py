"""Rotary frequencies, as the model families define them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megadpo.convert.shape import ModelShape, RopeScaling
from megadpo.errors import ModelError


def inverse_frequencies(shape: ModelShape) -> Tensor:
    """float32 [kv_channels / 2]: angle per position of every channel pair. Su et al. 2021, equation 15 (2104.09864)."""
    exponents = torch.arange(0, shape.kv_channels, 2, dtype=torch.float32) / shape.kv_channels
    plain = 1.0 / (shape.rotary_base**exponents)
    scaling = shape.rope_scaling
    if scaling is None:
        return plain
    if scaling.rope_type == "linear":
        return plain / scaling.factor
    if scaling.rope_type == "llama3":
        return _llama3(plain, scaling)
    raise ModelError(f"rope_type {scaling.rope_type!r} is not supported; supported: default, linear, llama3")


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
