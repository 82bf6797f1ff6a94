"""Qwen2 and 2.5 (biases on q, k, v) and Qwen3 (a norm on every query and key head), dense."""

from __future__ import annotations

from dataclasses import replace

from megadpo.convert.config_json import ConfigJson
from megadpo.convert.families.blocks import (
    ATTENTION_NORM,
    EMBEDDING,
    GATED_MLP,
    HEAD_NORMS,
    LLAMA_LAYERS,
    MLP_NORM,
    OUTPUT,
    PROJECTION,
    QKV,
)
from megadpo.convert.families.common import read_common, read_window
from megadpo.convert.rope_json import read_rope
from megadpo.convert.shape import ModelShape, Norms, Window
from megadpo.convert.tables import Family

WINDOW = ("sliding_window", "layer_types")


def qwen_window(config: ConfigJson, layers: int) -> Window | None:
    """`sliding_window` counts only with use_sliding_window, then for layers from max_window_layers on."""
    used = config.flag("use_sliding_window", default=False)
    first = config.integer("max_window_layers", default=28, least=0) if used else layers
    if used and config.get("sliding_window") is None:
        raise config.wrong("sliding_window", "a whole number, as use_sliding_window is true")
    window = read_window(config, layers, tuple(layer >= first for layer in range(layers)))
    if window and not used:
        raise config.wrong("layer_types", "full_attention for every layer, as use_sliding_window is not true")
    return window


def read_qwen2(config: ConfigJson) -> ModelShape:
    """The biases are not in config.json: Qwen2 always has them."""
    shape = read_common(config, "qwen2", read_rope(config, default_theta=10000.0), knows=WINDOW)
    return replace(shape, qkv_bias=True, window=qwen_window(config, shape.num_layers))


def read_qwen3(config: ConfigJson) -> ModelShape:
    shape = read_common(config, "qwen3", read_rope(config, default_theta=10000.0), knows=WINDOW, head_dim=128)
    bias = config.flag("attention_bias", default=False)
    return replace(
        shape,
        qkv_bias=bias,
        proj_bias=bias,
        norms=Norms(queries_keys="head"),
        window=qwen_window(config, shape.num_layers),
    )


QWEN2 = Family(
    name="qwen2",
    architecture="Qwen2ForCausalLM",
    read_shape=read_qwen2,
    weights=(*EMBEDDING, *LLAMA_LAYERS, *OUTPUT),
)
QWEN3 = Family(
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    read_shape=read_qwen3,
    weights=(
        *EMBEDDING,
        *(*ATTENTION_NORM, *QKV, *HEAD_NORMS, *PROJECTION, *MLP_NORM, *GATED_MLP),
        *OUTPUT,
    ),
)
