"""DeepSeek-V2 and V2-Lite (DeepseekV2ForCausalLM), and what DeepSeek-V3 has in common with them."""

from __future__ import annotations

from dataclasses import replace

from megadpo.convert.config_json import ConfigJson
from megadpo.convert.families.blocks import EMBEDDING, OUTPUT
from megadpo.convert.families.common import read_common
from megadpo.convert.families.latent import LATENT_ATTENTION, latent_scores, read_latent
from megadpo.convert.families.mixtures import (
    EXPERT_NORM,
    PLAIN_MLP,
    SHARED_EXPERTS,
    grouped,
    read_counts,
    routed,
    router,
)
from megadpo.convert.rope_json import read_rope
from megadpo.convert.shape import Experts, ModelShape
from megadpo.convert.tables import Family

LAYERS = (
    *LATENT_ATTENTION,
    *PLAIN_MLP,
    *EXPERT_NORM,
    *router("mlp.gate"),
    *routed("mlp."),
    *SHARED_EXPERTS,
)


def read_deepseek(config: ConfigJson, family: str, knows: tuple[str, ...]) -> ModelShape:
    """What both versions have; the layers of `experts` are the last ones, after `first_k_dense_replace`."""
    config.require("attention_bias", False)
    config.require("pretraining_tp", 1)
    config.require("moe_layer_freq", 1)
    config.require("ep_size", 1)
    config.require("rms_norm_eps", 1e-6)  # transformers has it fixed for the norms inside latent attention
    latent = read_latent(config)
    shape = read_common(
        config,
        family,
        read_rope(config, default_theta=10000.0),
        knows=("auto_map", "n_routed_experts", "num_experts", "num_local_experts", *knows),
        head_dim=latent.value_width,
    )
    count, per_token = read_counts(config, "n_routed_experts", "num_experts", "num_local_experts")
    width = config.integer("moe_intermediate_size")
    plain = config.integer("first_k_dense_replace", default=0, at_most=shape.num_layers, least=0)
    shared = config.integer("n_shared_experts", default=0, least=0)
    experts = Experts(
        count,
        per_token,
        width,
        (False,) * plain + (True,) * (shape.num_layers - plain),
        scaling=config.number("routed_scaling_factor", default=1.0),
        router_float32=True,
        shared_ffn_hidden_size=shared * width,
    )
    scores = latent_scores(config, shape, latent)
    return replace(shape, kv_channels=latent.value_width, latent=latent, experts=experts, scores=scores)


def read_shape(config: ConfigJson) -> ModelShape:
    """`norm_topk_prob` is refused: DeepSeek's own code and transformers differ in what it does."""
    config.require("norm_topk_prob", False)
    config.require("scoring_func", "softmax")
    config.require("mlp_bias", False)
    config.require("topk_method", "greedy", "group_limited_greedy")
    shape = read_deepseek(config, "deepseek_v2", ())
    assert shape.experts is not None
    experts = replace(shape.experts, normalised=False)
    if config.get("topk_method") == "group_limited_greedy":
        experts = grouped(config, experts, group_score=1)
    return replace(shape, experts=experts)


DEEPSEEK_V2 = Family(
    name="deepseek_v2",
    architecture="DeepseekV2ForCausalLM",
    read_shape=read_shape,
    weights=(*EMBEDDING, *LAYERS, *OUTPUT),
)
