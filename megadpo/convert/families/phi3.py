"""Phi-3 and Phi-4 (Phi3ForCausalLM): Llama whose q, k, v are one tensor, and whose gate and up are one."""

from __future__ import annotations

from dataclasses import replace

from megadpo.convert.config_json import ConfigJson, positive
from megadpo.convert.families.blocks import (
    ATTENTION,
    ATTENTION_NORM,
    EMBEDDING,
    HF,
    MLP,
    MLP_NORM,
    OUTPUT,
    PROJECTION,
)
from megadpo.convert.families.common import read_common, window_everywhere
from megadpo.convert.rope_json import read_rope
from megadpo.convert.shape import ModelShape
from megadpo.convert.tables import Family, Weight

FUSED_QKV = (Weight(ATTENTION + "linear_qkv.weight", HF + "self_attn.qkv_proj.weight", "QKV D"),)
FUSED_MLP = (
    Weight(MLP + "linear_fc1.weight_w", HF + "mlp.gate_up_proj.weight", "F D"),
    Weight(MLP + "linear_fc1.weight_v", HF + "mlp.gate_up_proj.weight", "F D", start="F"),
    Weight(MLP + "linear_fc2.weight", HF + "mlp.down_proj.weight", "D F"),
)


def read_shape(config: ConfigJson) -> ModelShape:
    """longrope (the 128k models, Phi-3.5, Phi-4-mini) is refused: it takes other frequencies for a whole batch as soon
    as one sequence in it is long, so a token's numbers depend on what it is batched with."""
    for field in ("rope_parameters", "rope_scaling"):
        block = config.get(field) or {}
        if isinstance(block, dict) and (block.get("rope_type") or block.get("type") or "default") != "default":
            raise config.wrong(field, "rope_type default (longrope's frequencies depend on the batch)")
    rope = read_rope(config, default_theta=10000.0, partial=True)
    shape = read_common(config, "phi3", rope, knows=("sliding_window",))
    percent = (config.get("rope_parameters") or {}).get("partial_rotary_factor")
    field = "rope_parameters" if percent is not None else "partial_rotary_factor"
    percent = config.get("partial_rotary_factor") if percent is None else percent
    percent = 1.0 if percent is None else percent
    if not positive(percent) or percent > 1 or int(shape.kv_channels * percent) % 2:
        raise config.wrong(field, "a partial_rotary_factor over 0, at most 1, that gives an even number of channels")
    return replace(shape, rotary_percent=float(percent), window=window_everywhere(config, shape.num_layers))


PHI3 = Family(
    name="phi3",
    architecture="Phi3ForCausalLM",
    read_shape=read_shape,
    weights=(*EMBEDDING, *ATTENTION_NORM, *FUSED_QKV, *PROJECTION, *MLP_NORM, *FUSED_MLP, *OUTPUT),
)
