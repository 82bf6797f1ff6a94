"""Mixtral 8x7B and 8x22B (MixtralForCausalLM)."""

from __future__ import annotations

from dataclasses import replace

from megadpo.convert.config_json import ConfigJson
from megadpo.convert.families.blocks import ATTENTION_NORM, EMBEDDING, OUTPUT, PROJECTION, QKV
from megadpo.convert.families.common import read_common, window_everywhere
from megadpo.convert.families.mixtures import EXPERT_NORM, read_counts, routed, router
from megadpo.convert.rope_json import read_rope
from megadpo.convert.shape import Experts, ModelShape
from megadpo.convert.tables import Family

WEIGHTS = (
    *EMBEDDING,
    *ATTENTION_NORM,
    *QKV,
    *PROJECTION,
    *EXPERT_NORM,
    *router("block_sparse_moe.gate"),
    *routed("block_sparse_moe.", "w1", "w3", "w2"),
    *OUTPUT,
)


def read_shape(config: ConfigJson) -> ModelShape:
    """`router_jitter_noise` is not read: it is noise during training."""
    rope = read_rope(config, default_theta=1e6)
    shape = read_common(config, "mixtral", rope, knows=("sliding_window", "num_experts", "num_local_experts"))
    count, per_token = read_counts(config, "num_local_experts", "num_experts")
    layers = (True,) * shape.num_layers
    experts = Experts(count, per_token, shape.ffn_hidden_size, layers)
    return replace(shape, window=window_everywhere(config, shape.num_layers), experts=experts)


MIXTRAL = Family(
    name="mixtral",
    architecture="MixtralForCausalLM",
    read_shape=read_shape,
    weights=WEIGHTS,
    ignored=r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
)
