"""Llama 2, 3, 3.1, 3.2, 3.3 and what is built like them (LlamaForCausalLM)."""

from __future__ import annotations

from dataclasses import replace

from megadpo.convert.config_json import ConfigJson
from megadpo.convert.families.blocks import EMBEDDING, LLAMA_LAYERS, OUTPUT
from megadpo.convert.families.common import read_common
from megadpo.convert.rope_json import read_rope
from megadpo.convert.shape import ModelShape
from megadpo.convert.tables import Family

WEIGHTS = (*EMBEDDING, *LLAMA_LAYERS, *OUTPUT)


def read_shape(config: ConfigJson) -> ModelShape:
    """Defaults are those of LlamaConfig, and only for fields that published Llama folders leave out."""
    config.require("pretraining_tp", 1)
    config.require("partial_rotary_factor", 1)
    bias = config.flag("attention_bias", default=False)
    return replace(
        read_common(config, "llama", read_rope(config, default_theta=10000.0)),
        qkv_bias=bias,
        proj_bias=bias,
        mlp_bias=config.flag("mlp_bias", default=False),
    )


LLAMA = Family(
    name="llama",
    architecture="LlamaForCausalLM",
    read_shape=read_shape,
    weights=WEIGHTS,
    ignored=r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
)
