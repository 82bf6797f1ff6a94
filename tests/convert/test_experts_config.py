"""config.json of the families with experts and latent attention, and the grids that their models fit."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families_table import ROWS, write
from safetensors.torch import load_file, save_file

from megadpo.config import ParallelConfig
from megadpo.convert.exporter import export_hf
from megadpo.convert.families import read_shape
from megadpo.convert.fit import misfits
from megadpo.convert.importer import check_hf
from megadpo.convert.shape import Experts, LatentAttention, ModelShape, Scores, Window
from megadpo.convert.to_checkpoint import import_hf
from megadpo.errors import ModelError
from megadpo.model.flops import group_cost

COMMON = {
    "hidden_size": 64,
    "intermediate_size": 172,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "vocab_size": 512,
    "rope_theta": 10000,
}
LATENT = {
    "num_key_value_heads": 8,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 4,
    "v_head_dim": 10,
    "n_routed_experts": 16,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "moe_intermediate_size": 20,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "aux_loss_alpha": 0.001,
}
GROUPS = {"n_group": 4, "topk_group": 3}
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {
        "architectures": ["MixtralForCausalLM"],
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "sliding_window": None,
        "router_aux_loss_coef": 0.02,
    },
    "qwen3_moe": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 20,
        "norm_topk_prob": True,
        "head_dim": 16,
        "mlp_only_layers": [],
        "use_sliding_window": False,
        "sliding_window": None,
    },
    "deepseek_v2": LATENT
    | GROUPS
    | {
        "architectures": ["DeepseekV2ForCausalLM"],
        "topk_method": "group_limited_greedy",
        "scoring_func": "softmax",
        "norm_topk_prob": False,
        "routed_scaling_factor": 16.0,
        "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV2Config"},
    },
    "deepseek_v3": LATENT
    | GROUPS
    | {
        "architectures": ["DeepseekV3ForCausalLM"],
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "num_nextn_predict_layers": 1,
    },
    "gpt_oss": {
        "architectures": ["GptOssForCausalLM"],
        "num_local_experts": 8,
        "num_experts_per_tok": 4,
        "experts_per_token": 4,
        "head_dim": 64,
        "attention_bias": True,
        "sliding_window": 128,
        "swiglu_limit": 7.0,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
}


def shape_of(tmp_path: Path, family: str, **fields: Any) -> ModelShape:
    given = COMMON | FAMILIES[family] | fields
    (tmp_path / "config.json").write_text(json.dumps({k: x for k, x in given.items() if x != "absent"}))
    return read_shape(tmp_path)


PUBLISHED_YARN = {
    "type": "yarn",
    "factor": 40,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
EVERY, LAST = (True,) * 4, (False, True, True, True)
V3 = Experts(16, 6, 20, LAST, "sigmoid", True, 2.5, 4, 3, 2, True, True, 40)
READ: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("mixtral", {}, {"experts": Experts(8, 2, 172, EVERY), "window": None, "latent": None}),
    ("mixtral", {"sliding_window": 99}, {"window": Window(99, EVERY)}),
    ("mixtral", {"num_local_experts": "absent", "num_experts": 4}, {"experts": Experts(4, 2, 172, EVERY)}),
    ("qwen3_moe", {}, {"experts": Experts(8, 2, 20, EVERY), "kv_channels": 16, "window": None}),
    ("qwen3_moe", {"head_dim": "absent", "num_experts": "absent", "num_local_experts": 4}, {"kv_channels": 8}),
    (
        "qwen3_moe",
        {"mlp_only_layers": [3], "decoder_sparse_step": 2, "norm_topk_prob": "absent"},
        {"experts": Experts(8, 2, 20, (False, True, False, False), normalised=False)},
    ),
    (
        "deepseek_v2",
        {},
        {
            "experts": Experts(16, 6, 20, LAST, "softmax", False, 16.0, 4, 3, 1, False, True, 40),
            "latent": LatentAttention(24, 16, 12, 4, 10),
            "scores": Scores(0.25),
            "kv_channels": 10,
        },
    ),
    (
        "deepseek_v2",
        {"topk_method": "greedy", "n_group": 1, "topk_group": 1, "q_lora_rank": None, "n_shared_experts": None},
        {
            "experts": Experts(16, 6, 20, LAST, normalised=False, scaling=16.0, router_float32=True),
            "latent": LatentAttention(None, 16, 12, 4, 10),
        },
    ),
    ("deepseek_v3", {}, {"experts": V3, "prediction_layers": 1}),
    ("deepseek_v3", {"num_nextn_predict_layers": "absent", "num_mtp_layers": 2}, {"prediction_layers": 2}),
    ("deepseek_v3", {"num_nextn_predict_layers": "absent"}, {"prediction_layers": 0}),
    (  # as published
        "deepseek_v3",
        {
            "auto_map": {"AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM"},
            "rope_scaling": PUBLISHED_YARN,
            "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
            "seq_aux": True,
            "ep_size": 1,
        },
        {"experts": V3, "scores": Scores((0.1 * math.log(40) + 1) ** 2 / 4)},
    ),
    ("deepseek_v3", {"norm_topk_prob": False}, {"experts": replace(V3, normalised=False)}),
    (
        "gpt_oss",
        {},
        {
            "experts": Experts(8, 4, 172, EVERY, bias=True, clamp=7.0),
            "window": Window(128, (True, False) * 2),
            "sinks": True,
            "activation": "quick_gelu",
        },
    ),
    ("gpt_oss", {"layer_types": "absent"}, {"window": Window(128, (True, False) * 2)}),
]


@pytest.mark.parametrize(("family", "fields", "want"), READ)
def test_read(family: str, fields: dict[str, Any], want: dict[str, Any], tmp_path: Path) -> None:
    shape = shape_of(tmp_path, family, **fields)
    assert {name: getattr(shape, name) for name in want} == want


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("mixtral", {"num_local_experts": "absent"}, "num_local_experts is missing; supported: a whole number"),
    ("mixtral", {"num_experts": 4}, "num_local_experts is 8; supported: the value of num_experts, or only one"),
    ("mixtral", {"num_experts_per_tok": 9}, "num_experts_per_tok is 9; supported: a whole number from 1 to 8"),
    ("mixtral", {"n_routed_experts": 4}, "n_routed_experts is 4; supported: only models without it"),
    # transformers looks at sliding_window alone
    ("mixtral", {"sliding_window": 9, "layer_types": ["full_attention"] * 4}, "layer_types is ["),
    ("mixtral", {"layer_types": ["sliding_attention"] * 4}, "layer_types is ["),
    ("mixtral", {"sliding_window": 0}, "sliding_window is 0; supported: a whole number from 1"),
    ("qwen3_moe", {"mlp_only_layers": ["0"]}, "mlp_only_layers is"),
    ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step is 0"),
    ("deepseek_v2", {"topk_method": "noaux_tc"}, 'supported: "greedy", "group_limited_greedy"'),
    ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob is true; supported: false"),
    ("deepseek_v2", {"scoring_func": "sigmoid"}, 'scoring_func is "sigmoid"; supported: "softmax"'),
    ("deepseek_v2", {"moe_layer_freq": 2}, "moe_layer_freq is 2; supported: 1"),
    ("deepseek_v2", {"rms_norm_eps": 1e-5}, "rms_norm_eps is 1e-05; supported: 1e-06"),
    ("deepseek_v2", {"num_key_value_heads": 4}, "num_key_value_heads is 4; supported: 8"),
    ("deepseek_v2", {"attention_bias": True}, "attention_bias is true; supported: false"),
    ("deepseek_v3", {"topk_method": "greedy"}, 'topk_method is "greedy"; supported: "noaux_tc"'),
    ("deepseek_v3", {"n_group": 3}, "n_group is 3; supported: a divisor of n_routed_experts (16)"),
    ("deepseek_v3", {"n_group": 16}, "n_group is 16; supported: groups of at least 2 experts"),
    ("deepseek_v3", {"topk_group": 1}, "n_group is 4; supported: groups of at least 2 experts, and num_experts_per"),
    ("deepseek_v3", {"topk_group": 5}, "topk_group is 5; supported: a whole number from 1 to 4"),
    ("deepseek_v3", {"qk_rope_head_dim": 5}, "qk_rope_head_dim is 5; supported: an even number"),
    ("deepseek_v3", {"first_k_dense_replace": 5}, "first_k_dense_replace is 5; supported: a whole number from 0 to 4"),
    ("deepseek_v3", {"v_head_dim": None}, "v_head_dim is missing"),
    ("mixtral", {"auto_map": {"AutoModel": "x.Y"}}, "trust_remote_code is never used"),
    ("gpt_oss", {"swiglu_alpha": 1.5}, "swiglu_alpha is 1.5; supported: 1.702"),
    ("gpt_oss", {"attention_bias": False}, "attention_bias is false; supported: true"),
    ("gpt_oss", {"swiglu_limit": -1}, "swiglu_limit is -1; supported: a positive number"),
]


@pytest.mark.parametrize(("family", "fields", "message"), REFUSED)
def test_refused_with_the_field(family: str, fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError) as error:
        shape_of(tmp_path, family, **fields)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


FIT: list[tuple[str, ParallelConfig, list[str]]] = [
    ("mixtral", ParallelConfig(2, expert_model_parallel_size=4, sequence_parallel=True), []),
    ("gpt_oss", ParallelConfig(2, expert_model_parallel_size=2, sequence_parallel=True), []),
    ("deepseek_v3", ParallelConfig(4, sequence_parallel=True), []),
    (
        "mixtral",
        ParallelConfig(expert_model_parallel_size=3),
        ["parallel.expert_model_parallel_size = 3: must divide the model's 8 experts; sizes that fit: 1, 2, 4, 8"],
    ),
    (
        "mixtral",
        ParallelConfig(2),
        [
            "parallel.sequence_parallel = false: models with experts need it where "
            "parallel.tensor_model_parallel_size is over 1 (here 2); set it to true"
        ],
    ),
    (
        "qwen3_moe",
        ParallelConfig(8, sequence_parallel=True),
        [
            "parallel.tensor_model_parallel_size = 8: must divide the experts' size of 20; change it, or set "
            "parallel.expert_model_parallel_size over 1, which leaves experts whole"
        ],
    ),
    (
        "gpt_oss",
        ParallelConfig(2, sequence_parallel=True),
        [
            "parallel.expert_model_parallel_size = 1: experts with biases cannot be split over tensor-parallel ranks; "
            "set it to 2, or parallel.tensor_model_parallel_size to 1"
        ],
    ),
    (
        "deepseek_v2",
        ParallelConfig(16, expert_model_parallel_size=16, sequence_parallel=True),
        [
            "parallel.tensor_model_parallel_size = 16: must divide the shared experts' size of 40",
            "parallel.tensor_model_parallel_size = 16: must divide the model's q_lora_rank (24)",
            "parallel.tensor_model_parallel_size = 16: must divide the model's kv_lora_rank + qk_rope_head_dim (20)",
        ],
    ),
]


@pytest.mark.parametrize(("family", "parallel", "want"), FIT)
def test_grids(family: str, parallel: ParallelConfig, want: list[str], tmp_path: Path) -> None:
    assert misfits(shape_of(tmp_path, family), parallel) == want


def test_a_model_without_experts_has_none_to_deal(tmp_path: Path) -> None:
    shape = replace(shape_of(tmp_path, "mixtral"), experts=None)
    assert misfits(shape, ParallelConfig(2)) == []
    [line] = misfits(shape, ParallelConfig(expert_model_parallel_size=2))
    assert line == "parallel.expert_model_parallel_size = 2: this model has no experts; leave it out"


def test_cost_counts_what_a_token_meets(tmp_path: Path) -> None:
    """Multiplications by hand: 8 heads of 8 on 4 groups, hidden 64, 2 of 8 experts of 172."""
    linear = 2 * 64 * 8 * 8 + 2 * 64 * 4 * 8 + 2 * 3 * 64 * 172 + 64 * 8
    assert group_cost(shape_of(tmp_path, "mixtral")).pair == pytest.approx(2 * 8 * 8 / linear)
    attention = 64 * 24 + 24 * 8 * 16 + 64 * 20 + 16 * 8 * 22 + 8 * 10 * 64
    mlp = (3 * 64 * 172 + 3 * (3 * 64 * (6 * 20 + 40) + 64 * 16)) / 4
    cost = group_cost(shape_of(tmp_path, "deepseek_v2")).pair
    assert cost == pytest.approx((8 * 16 + 8 * 10) / (attention + mlp))


def test_layers_for_further_tokens_are_left_alone(tmp_path: Path) -> None:
    """DeepSeek-V3's files have one behind the last layer: it is not read, and the export says that it is gone."""
    folder = write("deepseek_v3", tmp_path / "source")
    tensors = load_file(folder / "model.safetensors")
    layers = ROWS["deepseek_v3"].fields.get("num_hidden_layers", 4)
    extra = f"model.layers.{layers}.eh_proj.weight"
    save_file(tensors | {extra: torch.ones(2, 4)}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=f"not part of the model that config.json describes: {extra}"):
        check_hf(read_shape(folder), folder)
    given = json.loads((folder / "config.json").read_text())
    field = "num_nextn_predict_layers" if "num_nextn_predict_layers" in given else "num_mtp_layers"
    (folder / "config.json").write_text(json.dumps(given | {field: 1}))
    check_hf(read_shape(folder), folder)
    import_hf(folder, tmp_path / "in")
    export_hf(tmp_path / "in", tmp_path / "in", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == given | {field: 0}
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert after.keys() == tensors.keys()
    assert all(torch.equal(after[name], tensors[name]) for name in tensors)
