"""DeepSeek-V2 and V2-Lite (DeepseekV2ForCausalLM), DeepSeek-V3, V3.1 and R1 (DeepseekV3ForCausalLM)."""

from __future__ import annotations

from dataclasses import replace

from megadpo.convert.config_json import ConfigJson
from megadpo.convert.families.blocks import ATTENTION, EMBEDDING, HF, LAYER, MLP, OUTPUT, PROJECTION
from megadpo.convert.families.common import read_common
from megadpo.convert.families.mixtures import (
    EXPERT_NORM,
    PLAIN_MLP,
    SHARED,
    gated,
    has_experts,
    read_counts,
    routed,
    router,
)
from megadpo.convert.quantised import check_method
from megadpo.convert.rope_json import magnitude, read_rope
from megadpo.convert.shape import Experts, LatentAttention, ModelShape, Scores
from megadpo.convert.tables import Family, Weight


def _direct(shape: ModelShape) -> bool:
    return shape.latent is not None and shape.latent.query_rank is None


def _from_rank(shape: ModelShape) -> bool:
    return not _direct(shape)


LATENT_ATTENTION = (
    Weight(LAYER + "input_layernorm.weight", HF + "input_layernorm.weight", "D"),
    Weight(ATTENTION + "linear_q_proj.weight", HF + "self_attn.q_proj.weight", "QH D", _direct),
    Weight(ATTENTION + "linear_q_down_proj.weight", HF + "self_attn.q_a_proj.weight", "LQ D", _from_rank),
    Weight(ATTENTION + "linear_q_up_proj.layer_norm_weight", HF + "self_attn.q_a_layernorm.weight", "LQ", _from_rank),
    Weight(ATTENTION + "linear_q_up_proj.weight", HF + "self_attn.q_b_proj.weight", "QH LQ", _from_rank),
    Weight(ATTENTION + "linear_kv_down_proj.weight", HF + "self_attn.kv_a_proj_with_mqa.weight", "LKR D"),
    Weight(ATTENTION + "linear_kv_up_proj.layer_norm_weight", HF + "self_attn.kv_a_layernorm.weight", "LK"),
    Weight(ATTENTION + "linear_kv_up_proj.weight", HF + "self_attn.kv_b_proj.weight", "KVH LK"),
    *PROJECTION,
)
SHARED_EXPERTS = tuple(
    replace(row, when=lambda s: s.experts is not None and s.experts.shared_ffn_hidden_size > 0)
    for row in gated(SHARED, "mlp.shared_experts.", "S", "gate_proj", "up_proj", "down_proj")
)
SELECTION_BIAS = Weight(
    MLP + "router.expert_bias",
    HF + "mlp.gate.e_score_correction_bias",
    "E",
    lambda s: s.experts is not None and s.experts.selection_bias,
    of_layer=has_experts,
    float32=True,
)
WEIGHTS = (
    *EMBEDDING,
    *LATENT_ATTENTION,
    *PLAIN_MLP,
    *EXPERT_NORM,
    *router("mlp.gate"),
    SELECTION_BIAS,
    *routed("mlp."),
    *SHARED_EXPERTS,
    *OUTPUT,
)


def _read(config: ConfigJson, family: str, knows: tuple[str, ...]) -> ModelShape:
    """What both versions have; the layers of `experts` are the last ones, after `first_k_dense_replace`."""
    config.require("attention_bias", False)
    config.require("pretraining_tp", 1)
    config.require("moe_layer_freq", 1)
    config.require("ep_size", 1)
    config.require("rms_norm_eps", 1e-6)  # transformers has it fixed for the norms inside latent attention
    latent = LatentAttention(
        query_rank=None if config.get("q_lora_rank") is None else config.integer("q_lora_rank"),
        key_value_rank=config.integer("kv_lora_rank"),
        query_key_width=config.integer("qk_nope_head_dim"),
        rotary_width=config.integer("qk_rope_head_dim"),
        value_width=config.integer("v_head_dim"),
        interleaved=config.flag("rope_interleave", default=True),
    )
    if latent.rotary_width % 2:
        raise config.wrong("qk_rope_head_dim", "an even number: rotary embedding turns pairs")
    config.require("head_dim", latent.rotary_width)  # where transformers 5 writes it
    config.require("qk_head_dim", latent.query_key_width + latent.rotary_width)
    config.require("num_key_value_heads", config.integer("num_attention_heads", at_most=4096))
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
    return replace(
        shape, kv_channels=latent.value_width, latent=latent, experts=experts, scores=_scores(config, shape, latent)
    )


def _scores(config: ConfigJson, shape: ModelShape, latent: LatentAttention) -> Scores:
    """yarn with mscale_all_dim enlarges all of queries and keys, not only what is rotated."""
    block = config.get("rope_parameters") or config.get("rope_scaling") or {}
    factor, exponent = shape.rope_scaling.factor if shape.rope_scaling else 1.0, block.get("mscale_all_dim") or 0.0
    return Scores(scale=magnitude(factor, exponent) ** 2 * (latent.query_key_width + latent.rotary_width) ** -0.5)


def _grouped(config: ConfigJson, experts: Experts, group_score: int) -> Experts:
    """With the groups of experts that a token is limited to."""
    groups = config.integer("n_group", at_most=experts.count)
    used = config.integer("topk_group", at_most=groups)
    if experts.count % groups:
        raise config.wrong("n_group", f"a divisor of n_routed_experts ({experts.count})")
    size = experts.count // groups
    if size < group_score or size * used < experts.per_token:
        raise config.wrong(
            "n_group",
            f"groups of at least {group_score} experts, and num_experts_per_tok experts in topk_group of them",
        )
    return replace(experts, groups=groups, groups_per_token=used, group_score=group_score)


def read_v2(config: ConfigJson) -> ModelShape:
    """`norm_topk_prob` is refused: DeepSeek's own code and transformers differ in what it does."""
    config.require("norm_topk_prob", False)
    config.require("scoring_func", "softmax")
    config.require("mlp_bias", False)
    config.require("topk_method", "greedy", "group_limited_greedy")
    shape = _read(config, "deepseek_v2", ())
    assert shape.experts is not None
    experts = replace(shape.experts, normalised=False)
    if config.get("topk_method") == "group_limited_greedy":
        experts = _grouped(config, experts, group_score=1)
    return replace(shape, experts=experts)


def read_v3(config: ConfigJson) -> ModelShape:
    """Its FP8 files are read (convert/quantised.py)."""
    config.require("scoring_func", "sigmoid")
    config.require("topk_method", "noaux_tc")
    check_method(config, "fp8")
    shape = _read(config, "deepseek_v3", ("quantization_config",))
    assert shape.experts is not None
    extra = "num_mtp_layers" if config.get("num_nextn_predict_layers") is None else "num_nextn_predict_layers"
    experts = replace(
        shape.experts,
        score="sigmoid",
        normalised=config.flag("norm_topk_prob", default=True),
        selection_bias=True,
    )
    return replace(
        shape,
        experts=_grouped(config, experts, group_score=2),
        prediction_layers=config.integer(extra, default=0, at_most=64, least=0),
    )


DEEPSEEK_V2 = Family(name="deepseek_v2", architecture="DeepseekV2ForCausalLM", read_shape=read_v2, weights=WEIGHTS)
DEEPSEEK_V3 = Family(name="deepseek_v3", architecture="DeepseekV3ForCausalLM", read_shape=read_v3, weights=WEIGHTS)
