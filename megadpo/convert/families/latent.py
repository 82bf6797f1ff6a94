"""Latent attention as DeepSeek's models name it: table rows and fields."""

from __future__ import annotations

from megadpo.convert.config_json import ConfigJson
from megadpo.convert.families.blocks import ATTENTION, HF, LAYER, PROJECTION
from megadpo.convert.rope_json import magnitude
from megadpo.convert.shape import LatentAttention, ModelShape, Scores
from megadpo.convert.tables import Weight


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


def read_latent(config: ConfigJson) -> LatentAttention:
    """The widths, which all layers share. ModelError names the field."""
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
    return latent


def latent_scores(config: ConfigJson, shape: ModelShape, latent: LatentAttention) -> Scores:
    """yarn with mscale_all_dim enlarges all of queries and keys, not only what is rotated."""
    block = config.get("rope_parameters") or config.get("rope_scaling") or {}
    factor, exponent = shape.rope_scaling.factor if shape.rope_scaling else 1.0, block.get("mscale_all_dim") or 0.0
    return Scores(scale=magnitude(factor, exponent) ** 2 * (latent.query_key_width + latent.rotary_width) ** -0.5)
