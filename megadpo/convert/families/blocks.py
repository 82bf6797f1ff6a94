"""Table rows that many families share; a family's table is a few of these blocks and what it has of its own."""

from __future__ import annotations

from megadpo.convert.tables import Weight

LAYER = "decoder.layers.{layer}."
HF = "model.layers.{layer}."
ATTENTION, MLP = LAYER + "self_attention.", LAYER + "mlp."

EMBEDDING = (Weight("embedding.word_embeddings.weight", "model.embed_tokens.weight", "V D"),)
OUTPUT = (
    Weight("decoder.final_layernorm.weight", "model.norm.weight", "D"),
    Weight("output_layer.weight", "lm_head.weight", "V D", lambda s: not s.tied),
)

ATTENTION_NORM = (Weight(ATTENTION + "linear_qkv.layer_norm_weight", HF + "input_layernorm.weight", "D"),)
MLP_NORM = (Weight(MLP + "linear_fc1.layer_norm_weight", HF + "post_attention_layernorm.weight", "D"),)
"""The norms in front of the two halves of a layer, as Llama names them."""

PROJECTION = (
    Weight(ATTENTION + "linear_proj.weight", HF + "self_attn.o_proj.weight", "D Q"),
    Weight(ATTENTION + "linear_proj.bias", HF + "self_attn.o_proj.bias", "D", lambda s: s.proj_bias),
)
QKV = (
    Weight(ATTENTION + "linear_qkv.weight", HF + "self_attn.{qkv}_proj.weight", "QKV D"),
    Weight(ATTENTION + "linear_qkv.bias", HF + "self_attn.{qkv}_proj.bias", "QKV", lambda s: s.qkv_bias),
)
HEAD_NORMS = (
    Weight(ATTENTION + "q_layernorm.weight", HF + "self_attn.q_norm.weight", "W"),
    Weight(ATTENTION + "k_layernorm.weight", HF + "self_attn.k_norm.weight", "W"),
)

GATED_MLP = (
    Weight(MLP + "linear_fc1.weight_w", HF + "mlp.gate_proj.weight", "F D"),
    Weight(MLP + "linear_fc1.weight_v", HF + "mlp.up_proj.weight", "F D"),
    Weight(MLP + "linear_fc1.bias_w", HF + "mlp.gate_proj.bias", "F", lambda s: s.mlp_bias),
    Weight(MLP + "linear_fc1.bias_v", HF + "mlp.up_proj.bias", "F", lambda s: s.mlp_bias),
    Weight(MLP + "linear_fc2.weight", HF + "mlp.down_proj.weight", "D F"),
    Weight(MLP + "linear_fc2.bias", HF + "mlp.down_proj.bias", "D", lambda s: s.mlp_bias),
)

LLAMA_LAYERS = (*ATTENTION_NORM, *QKV, *PROJECTION, *MLP_NORM, *GATED_MLP)
