"""DeepSeek-V3, V3.1 and R1 (DeepseekV3ForCausalLM): V2 with a router of its own."""

from __future__ import annotations

from dataclasses import replace

from megadpo.convert.config_json import ConfigJson
from megadpo.convert.families.blocks import EMBEDDING, HF, MLP, OUTPUT
from megadpo.convert.families.deepseek_v2 import LAYERS, read_deepseek
from megadpo.convert.families.mixtures import grouped, has_experts
from megadpo.convert.quantised import check_method
from megadpo.convert.shape import ModelShape
from megadpo.convert.tables import Family, Weight

SELECTION_BIAS = Weight(
    MLP + "router.expert_bias",
    HF + "mlp.gate.e_score_correction_bias",
    "E",
    lambda s: s.experts is not None and s.experts.selection_bias,
    of_layer=has_experts,
    float32=True,
)


def read_shape(config: ConfigJson) -> ModelShape:
    """Its FP8 files are read (convert/quantised.py)."""
    config.require("scoring_func", "sigmoid")
    config.require("topk_method", "noaux_tc")
    check_method(config, "fp8")
    shape = read_deepseek(config, "deepseek_v3", ("quantization_config",))
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
        experts=grouped(config, experts, group_score=2),
        prediction_layers=config.integer(extra, default=0, at_most=64, least=0),
    )


DEEPSEEK_V3 = Family(
    name="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    read_shape=read_shape,
    weights=(*EMBEDDING, *LAYERS, SELECTION_BIAS, *OUTPUT),
)
