"""OLMo 2 (Olmo2ForCausalLM): norms only behind attention and MLP, and over all query and all key heads together."""

from __future__ import annotations

from dataclasses import replace

from megadpo.convert.config_json import ConfigJson
from megadpo.convert.families.blocks import ATTENTION, EMBEDDING, GATED_MLP, HF, MLP, OUTPUT, PROJECTION, QKV
from megadpo.convert.families.common import read_common
from megadpo.convert.rope_json import read_rope
from megadpo.convert.shape import ModelShape, Norms
from megadpo.convert.tables import Family, Weight

NORMS = (
    Weight(ATTENTION + "q_layernorm.weight", HF + "self_attn.q_norm.weight", "Q"),
    Weight(ATTENTION + "k_layernorm.weight", HF + "self_attn.k_norm.weight", "K"),
    Weight(ATTENTION + "linear_proj.norm_after.weight", HF + "post_attention_layernorm.weight", "D"),
    Weight(MLP + "linear_fc2.norm_after.weight", HF + "post_feedforward_layernorm.weight", "D"),
)


def read_shape(config: ConfigJson) -> ModelShape:
    bias = config.flag("attention_bias", default=False)
    return replace(
        read_common(config, "olmo2", read_rope(config, default_theta=10000.0)),
        qkv_bias=bias,
        proj_bias=bias,
        norms=Norms(before=False, after=True, queries_keys="projection"),
    )


OLMO2 = Family(
    name="olmo2",
    architecture="Olmo2ForCausalLM",
    read_shape=read_shape,
    weights=(*EMBEDDING, *QKV, *PROJECTION, *GATED_MLP, *NORMS, *OUTPUT),
)
