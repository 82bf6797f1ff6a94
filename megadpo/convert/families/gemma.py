"""Gemma 2 and the text models of Gemma 3: norms before and behind, 1 + weight in each, tanh-GELU, scaled embeddings,
windows on most layers; Gemma 2 with soft caps on scores and logits, Gemma 3 with q/k norms and two rotary bases."""

from __future__ import annotations

from dataclasses import replace

from megadpo.convert.config_json import ConfigJson
from megadpo.convert.families.blocks import (
    ATTENTION,
    ATTENTION_NORM,
    EMBEDDING,
    GATED_MLP,
    HEAD_NORMS,
    HF,
    MLP,
    OUTPUT,
    PROJECTION,
    QKV,
)
from megadpo.convert.families.common import read_common, read_window
from megadpo.convert.rope_json import read_rope, read_rope_by_layer
from megadpo.convert.shape import ModelShape, Norms, RopeScaling, Scores
from megadpo.convert.tables import Family, Weight

KNOWN = ("sliding_window", "layer_types", "attn_logit_softcapping", "final_logit_softcapping")
POST_ATTENTION = (
    Weight(ATTENTION + "linear_proj.norm_after.weight", HF + "post_attention_layernorm.weight", "D"),
    Weight(MLP + "linear_fc1.layer_norm_weight", HF + "pre_feedforward_layernorm.weight", "D"),
)
POST_MLP = (Weight(MLP + "linear_fc2.norm_after.weight", HF + "post_feedforward_layernorm.weight", "D"),)


def read_gemma(
    config: ConfigJson, family: str, rope: tuple[float, RopeScaling | None], caps: tuple[float | None, float | None]
) -> ModelShape:
    """What both have. caps: those of the scores and of the logits where config.json does not name them."""
    config.require("use_bidirectional_attention", False)
    activation = ("hidden_activation", "gelu_pytorch_tanh")
    shape = read_common(config, family, rope, knows=KNOWN, head_dim=256, tied=True, activation=activation)
    bias = config.flag("attention_bias", default=False)
    return replace(
        shape,
        qkv_bias=bias,
        proj_bias=bias,
        norms=Norms(after=True, zero_centred=True),
        scores=Scores(
            scale=config.number("query_pre_attn_scalar", default=256) ** -0.5,
            soft_cap=config.number_or_null("attn_logit_softcapping", caps[0]),
        ),
        embedding_scale=shape.hidden_size**0.5,
        logit_soft_cap=config.number_or_null("final_logit_softcapping", caps[1]),
    )


def read_gemma2(config: ConfigJson) -> ModelShape:
    """Where layer_types is absent, windows are on every second layer, from the first."""
    shape = read_gemma(config, "gemma2", read_rope(config, default_theta=10000.0), caps=(50.0, 30.0))
    usual = tuple(layer % 2 == 0 for layer in range(shape.num_layers))
    return replace(shape, window=read_window(config, shape.num_layers, usual))


def read_gemma3(config: ConfigJson) -> ModelShape:
    """Where layer_types is absent, every layer but each sixth (sliding_window_pattern) has a window.
    transformers writes _sliding_window_pattern beside layer_types and never reads it."""
    rope, (local_theta, local_scaling) = read_rope_by_layer(config, default_theta=(1_000_000.0, 10_000.0))
    if local_scaling:
        raise config.wrong("rope_parameters", "rope_type default for sliding_attention")
    shape = read_gemma(config, "gemma3_text", rope, caps=(None, None))
    if config.get("layer_types") is None and config.get("_sliding_window_pattern") is not None:
        raise config.wrong("_sliding_window_pattern", "sliding_window_pattern without _, or layer_types")
    config.require("attn_logit_softcapping")  # transformers keeps it and never uses it
    pattern = config.integer("sliding_window_pattern", default=6)
    usual = tuple((layer + 1) % pattern != 0 for layer in range(shape.num_layers))
    return replace(
        shape,
        norms=replace(shape.norms, queries_keys="head"),
        window=read_window(config, shape.num_layers, usual),
        local_rotary_base=local_theta,
    )


LAYERS = (*ATTENTION_NORM, *QKV, *PROJECTION, *POST_ATTENTION, *GATED_MLP, *POST_MLP)
GEMMA2 = Family("gemma2", "Gemma2ForCausalLM", read_gemma2, (*EMBEDDING, *LAYERS, *OUTPUT))
GEMMA3 = Family("gemma3_text", "Gemma3ForCausalLM", read_gemma3, (*EMBEDDING, *LAYERS, *HEAD_NORMS, *OUTPUT))
