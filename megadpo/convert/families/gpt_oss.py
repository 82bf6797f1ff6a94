"""gpt-oss 20B and 120B (GptOssForCausalLM)."""

from __future__ import annotations

from dataclasses import replace

from megadpo.convert.config_json import ConfigJson
from megadpo.convert.families.blocks import ATTENTION, ATTENTION_NORM, EMBEDDING, HF, MLP, OUTPUT, PROJECTION, QKV
from megadpo.convert.families.common import read_common, read_window
from megadpo.convert.families.mixtures import EXPERT, EXPERT_NORM, read_counts, router
from megadpo.convert.quantised import check_method
from megadpo.convert.rope_json import read_rope
from megadpo.convert.shape import Experts, ModelShape
from megadpo.convert.tables import Family, Stacked, Weight

EXPERTS = HF + "mlp.experts."
GATE, UP = Stacked(0, 2), Stacked(1, 2)
"""Columns of the joint tensor alternate between the two."""
WEIGHTS = (
    *EMBEDDING,
    *ATTENTION_NORM,
    *QKV,
    *PROJECTION,
    Weight(ATTENTION + "core_attention.softmax_offset", HF + "self_attn.sinks", "H"),
    *EXPERT_NORM,
    *router("mlp.router"),
    Weight(MLP + "router.bias", HF + "mlp.router.bias", "E"),
    Weight(EXPERT + "linear_fc1.weight_w", EXPERTS + "gate_up_proj", "X D", stacked=GATE),
    Weight(EXPERT + "linear_fc1.weight_v", EXPERTS + "gate_up_proj", "X D", stacked=UP),
    Weight(EXPERT + "linear_fc1.bias_w", EXPERTS + "gate_up_proj_bias", "X", stacked=GATE),
    Weight(EXPERT + "linear_fc1.bias_v", EXPERTS + "gate_up_proj_bias", "X", stacked=UP),
    Weight(EXPERT + "linear_fc2.weight", EXPERTS + "down_proj", "D X", stacked=Stacked()),
    Weight(EXPERT + "linear_fc2.bias", EXPERTS + "down_proj_bias", "D", stacked=Stacked()),
    *OUTPUT,
)


def read_shape(config: ConfigJson) -> ModelShape:
    """MXFP4 files are read (convert/quantised.py)."""
    config.require("attention_bias", True)
    config.require("swiglu_alpha", 1.702)
    check_method(config, "mxfp4")
    knows = ("quantization_config", "sliding_window", "layer_types", "num_experts", "num_local_experts")
    shape = read_common(config, "gpt_oss", read_rope(config, default_theta=150000.0), knows=knows, head_dim=64)
    count, per_token = read_counts(config, "num_local_experts", "num_experts")
    every = (True,) * shape.num_layers
    alternating = tuple(layer % 2 == 0 for layer in range(shape.num_layers))
    return replace(
        shape,
        window=read_window(config, shape.num_layers, usual=alternating),
        activation="quick_gelu",
        qkv_bias=True,
        proj_bias=True,
        sinks=True,
        experts=Experts(
            count,
            per_token,
            shape.ffn_hidden_size,
            every,
            bias=True,
            clamp=config.number("swiglu_limit", default=7.0),
        ),
    )


GPT_OSS = Family(name="gpt_oss", architecture="GptOssForCausalLM", read_shape=read_shape, weights=WEIGHTS)
