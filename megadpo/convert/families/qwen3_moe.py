"""Qwen3 with experts: 30B-A3B, 235B-A22B (Qwen3MoeForCausalLM)."""

from __future__ import annotations

from dataclasses import replace

from megadpo.convert.config_json import ConfigJson
from megadpo.convert.families.blocks import ATTENTION_NORM, EMBEDDING, HEAD_NORMS, OUTPUT, PROJECTION, QKV
from megadpo.convert.families.common import read_common
from megadpo.convert.families.mixtures import EXPERT_NORM, PLAIN_MLP, read_counts, routed, router
from megadpo.convert.rope_json import read_rope
from megadpo.convert.shape import Experts, ModelShape, Norms, Window
from megadpo.convert.tables import Family

WEIGHTS = (
    *EMBEDDING,
    *ATTENTION_NORM,
    *QKV,
    *HEAD_NORMS,
    *PROJECTION,
    *PLAIN_MLP,
    *EXPERT_NORM,
    *router("mlp.gate"),
    *routed("mlp."),
    *OUTPUT,
)


def read_shape(config: ConfigJson) -> ModelShape:
    """Experts stand in every `decoder_sparse_step`-th layer, except in those that `mlp_only_layers` names (from 0)."""
    rope = read_rope(config, default_theta=10000.0)
    shape = read_common(config, "qwen3_moe", rope, knows=("sliding_window", "num_experts", "num_local_experts"))
    count, per_token = read_counts(config, "num_experts", "num_local_experts")
    step, plain = config.integer("decoder_sparse_step", default=1), config.get("mlp_only_layers") or []
    if not isinstance(plain, list) or any(not isinstance(x, int) or isinstance(x, bool) for x in plain):
        raise config.wrong("mlp_only_layers", "a list of layer numbers")
    layers = tuple(layer not in plain and (layer + 1) % step == 0 for layer in range(shape.num_layers))
    bias = config.flag("attention_bias", default=False)
    window = None
    if config.flag("use_sliding_window", default=False):
        window = Window(config.integer("sliding_window", default=4096), (True,) * shape.num_layers)
    return replace(
        shape,
        qkv_bias=bias,
        proj_bias=bias,
        window=window,
        norms=Norms(queries_keys="head"),
        experts=Experts(
            count,
            per_token,
            config.integer("moe_intermediate_size"),
            layers,
            normalised=config.flag("norm_topk_prob", default=False),
        ),
    )


QWEN3_MOE = Family(name="qwen3_moe", architecture="Qwen3MoeForCausalLM", read_shape=read_shape, weights=WEIGHTS)
