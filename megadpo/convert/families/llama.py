"""Llama 2, 3, 3.1, 3.2, 3.3 and what is built like them (LlamaForCausalLM)."""

from __future__ import annotations

from megadpo.convert.config_json import ConfigJson
from megadpo.convert.rope_json import read_rope
from megadpo.convert.shape import ModelShape
from megadpo.convert.tables import Family, Weight

LAYER = "decoder.layers.{layer}."
HF = "model.layers.{layer}."

WEIGHTS = (
    Weight("embedding.word_embeddings.weight", "model.embed_tokens.weight", "V D"),
    Weight(LAYER + "self_attention.linear_qkv.layer_norm_weight", HF + "input_layernorm.weight", "D"),
    Weight(LAYER + "self_attention.linear_qkv.weight", HF + "self_attn.{qkv}_proj.weight", "QKV D"),
    Weight(
        LAYER + "self_attention.linear_qkv.bias",
        HF + "self_attn.{qkv}_proj.bias",
        "QKV",
        lambda s: s.qkv_bias,
    ),
    Weight(LAYER + "self_attention.linear_proj.weight", HF + "self_attn.o_proj.weight", "D Q"),
    Weight(LAYER + "self_attention.linear_proj.bias", HF + "self_attn.o_proj.bias", "D", lambda s: s.proj_bias),
    Weight(LAYER + "mlp.linear_fc1.layer_norm_weight", HF + "post_attention_layernorm.weight", "D"),
    Weight(LAYER + "mlp.linear_fc1.weight_w", HF + "mlp.gate_proj.weight", "F D"),
    Weight(LAYER + "mlp.linear_fc1.weight_v", HF + "mlp.up_proj.weight", "F D"),
    Weight(LAYER + "mlp.linear_fc1.bias_w", HF + "mlp.gate_proj.bias", "F", lambda s: s.mlp_bias),
    Weight(LAYER + "mlp.linear_fc1.bias_v", HF + "mlp.up_proj.bias", "F", lambda s: s.mlp_bias),
    Weight(LAYER + "mlp.linear_fc2.weight", HF + "mlp.down_proj.weight", "D F"),
    Weight(LAYER + "mlp.linear_fc2.bias", HF + "mlp.down_proj.bias", "D", lambda s: s.mlp_bias),
    Weight("decoder.final_layernorm.weight", "model.norm.weight", "D"),
    Weight("output_layer.weight", "lm_head.weight", "V D", lambda s: not s.tied),
)


def read_shape(config: ConfigJson) -> ModelShape:
    """Defaults are those of LlamaConfig, and only for fields that published Llama folders leave out.

    Dropout and the like are not read: they belong to training, not to the model.
    """
    config.require("hidden_act", "silu")
    config.require("pretraining_tp", 1)
    config.require("partial_rotary_factor", 1)
    for field in (
        "quantization_config",
        "sliding_window",
        "attn_logit_softcapping",
        "final_logit_softcapping",
    ):
        config.require(field)
    config.refuse_custom_code()
    hidden, heads = config.integer("hidden_size"), config.integer("num_attention_heads", at_most=4096)
    groups = config.integer("num_key_value_heads", default=heads)
    if heads % groups:
        raise config.wrong("num_key_value_heads", f"a divisor of num_attention_heads ({heads})")
    if config.get("head_dim") is None and hidden % heads:
        raise config.wrong("hidden_size", f"a multiple of num_attention_heads ({heads}), or head_dim given")
    head = config.integer("head_dim", default=hidden // heads)
    if head % 2:
        raise config.wrong("head_dim", f"an even number (here it would be {head}): rotary embedding turns pairs")
    theta, scaling = read_rope(config, default_theta=10000.0)
    attention_bias = config.flag("attention_bias", default=False)
    return ModelShape(
        family="llama",
        num_layers=config.integer("num_hidden_layers", at_most=4096),
        hidden_size=hidden,
        ffn_hidden_size=config.integer("intermediate_size"),
        num_attention_heads=heads,
        num_query_groups=groups,
        kv_channels=head,
        vocab_size=config.integer("vocab_size"),
        max_position_embeddings=config.integer("max_position_embeddings"),
        layernorm_epsilon=config.number("rms_norm_eps"),
        rotary_base=theta,
        rope_scaling=scaling,
        tied=config.flag("tie_word_embeddings", default=False),
        qkv_bias=attention_bias,
        proj_bias=attention_bias,
        mlp_bias=config.flag("mlp_bias", default=False),
    )


LLAMA = Family(
    name="llama",
    architecture="LlamaForCausalLM",
    read_shape=read_shape,
    weights=WEIGHTS,
    ignored=r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
)
