"""config.json of the families beside Llama: as published folders have it (transformers 4), as transformers 5 writes it,
and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from megadpo.convert.families import read_shape
from megadpo.convert.shape import ModelShape, Norms, RopeScaling, Scores, Window
from megadpo.errors import ModelError

COMMON = {
    "hidden_size": 64,
    "intermediate_size": 172,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "vocab_size": 512,
    "rope_theta": 1e6,
}
GEMMA = {
    "architectures": ["Gemma2ForCausalLM"],
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "head_dim": 16,
    "query_pre_attn_scalar": 144,
    "sliding_window": 4096,
}
GEMMA3 = GEMMA | {"architectures": ["Gemma3ForCausalLM"], "rope_local_base_freq": 10000, "sliding_window_pattern": 3}
FAMILIES: dict[str, dict[str, Any]] = {
    "mistral": {"architectures": ["MistralForCausalLM"], "sliding_window": 4096},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": False, "sliding_window": 4096},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "head_dim": 128, "attention_bias": False, "sliding_window": None},
    "gemma2": GEMMA
    | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "cache_implementation": "hybrid"},
    "gemma3": GEMMA3,
    "olmo2": {"architectures": ["Olmo2ForCausalLM"], "attention_bias": False},
    "scored": {"architectures": ["Qwen2ForSequenceClassification"], "id2label": {"0": "reward"}},
    "phi3": {"architectures": ["Phi3ForCausalLM"], "sliding_window": 2047, "original_max_position_embeddings": 2048},
}


def shape_of(tmp_path: Path, family: str, **fields: Any) -> ModelShape:
    given = COMMON | FAMILIES[family] | fields
    (tmp_path / "config.json").write_text(json.dumps({k: x for k, x in given.items() if x != "absent"}))
    return read_shape(tmp_path)


EVERY, NONE = (True,) * 6, None
PLAIN: dict[str, Any] = {"norms": Norms(), "scores": Scores(), "embedding_scale": None, "logit_soft_cap": None}
READ: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("mistral", {}, PLAIN | {"window": Window(4096, EVERY), "kv_channels": 8, "rotary_base": 1e6, "qkv_bias": False}),
    ("mistral", {"sliding_window": None}, {"window": NONE}),
    ("qwen2", {}, PLAIN | {"window": NONE, "qkv_bias": True, "proj_bias": False, "mlp_bias": False, "tied": False}),
    (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 99, "max_window_layers": 4, "tie_word_embeddings": True},
        {"window": Window(99, (False,) * 4 + (True,) * 2), "tied": True},
    ),
    ("qwen2", {"use_sliding_window": True, "max_window_layers": 6}, {"window": NONE}),
    ("qwen2", {"use_sliding_window": True, "max_window_layers": 0}, {"window": Window(4096, EVERY)}),
    ("qwen2", {"layer_types": ["full_attention"] * 6}, {"window": NONE}),
    (
        "qwen2",
        {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}},
        {
            "rope_scaling": RopeScaling(
                "yarn",
                4.0,
                original_max_position_embeddings=512,
                beta_fast=32.0,
                beta_slow=1.0,
                attention_factor=1.138629436111989,
            )
        },
    ),
    ("qwen3", {}, {"norms": Norms(queries_keys="head"), "kv_channels": 128, "qkv_bias": False}),
    (
        "qwen3",
        {"head_dim": "absent", "attention_bias": True},
        {"kv_channels": 128, "qkv_bias": True, "proj_bias": True},
    ),
    (
        "gemma2",
        {},
        {
            "window": Window(4096, (True, False) * 3),
            "norms": Norms(after=True, zero_centred=True),
            "scores": Scores(1 / 12, 50.0),
            "logit_soft_cap": 30.0,
            "embedding_scale": 8.0,
            "activation": "gelu_tanh",
            "tied": True,
        },
    ),
    # the numbers of Gemma2Config where a folder leaves them out, and none where it says null
    (
        "gemma2",
        {"attn_logit_softcapping": "absent", "final_logit_softcapping": "absent", "query_pre_attn_scalar": "absent"},
        {"scores": Scores(1 / 16, 50.0), "logit_soft_cap": 30.0},
    ),
    ("gemma2", {"final_logit_softcapping": None}, {"scores": Scores(1 / 12, 50.0), "logit_soft_cap": None}),
    (
        "gemma3",
        {"rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        {
            "window": Window(4096, (True, True, False) * 2),
            "norms": Norms(after=True, zero_centred=True, queries_keys="head"),
            "scores": Scores(1 / 12, None),
            "logit_soft_cap": None,
            "rotary_base": 1e6,
            "rope_scaling": RopeScaling("linear", 8.0),
            "local_rotary_base": 1e4,
        },
    ),
    (
        "gemma3",
        {"rope_theta": "absent", "rope_local_base_freq": "absent"},
        {"rotary_base": 1e6, "local_rotary_base": 1e4},
    ),
    ("gemma3", {"sliding_window_pattern": "absent"}, {"window": Window(4096, (True,) * 5 + (False,))}),
    (
        "gemma3",
        {"_sliding_window_pattern": 6, "layer_types": ["full_attention"] * 5 + ["sliding_attention"]},
        {"window": Window(4096, (False,) * 5 + (True,))},
    ),
    (
        "olmo2",
        {},
        {"norms": Norms(before=False, after=True, queries_keys="projection"), "window": NONE, "qkv_bias": False},
    ),
    ("scored", {}, {"head": "scalar", "tied": False}),
    ("scored", {"id2label": "absent", "num_labels": 1}, {"head": "scalar"}),
    ("phi3", {}, PLAIN | {"window": Window(2047, EVERY), "rotary_percent": 1.0}),
    ("phi3", {"partial_rotary_factor": 0.75}, {"rotary_percent": 0.75}),
    (
        "phi3",
        {
            "rope_theta": "absent",
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25},
        },
        {"rotary_percent": 0.25, "rotary_base": 1e4},
    ),
]


@pytest.mark.parametrize(("family", "fields", "want"), READ)
def test_read(family: str, fields: dict[str, Any], want: dict[str, Any], tmp_path: Path) -> None:
    shape = shape_of(tmp_path, family, **fields)
    assert {name: getattr(shape, name) for name in want} == want


LONG = {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
BOTH = {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("mistral", {"sliding_window": "absent"}, "sliding_window is missing; supported: a whole number, or null"),
    ("mistral", {"sliding_window": 0}, "sliding_window is 0; supported: a whole number from 1"),
    ("mistral", {"layer_types": ["full_attention"] * 6}, "layer_types is ["),
    ("mistral", {"attn_logit_softcapping": 30.0}, "attn_logit_softcapping is 30.0; supported: only models without"),
    ("mistral", {"num_local_experts": 8}, "num_local_experts is 8"),
    ("mistral", {"hidden_act": "gelu"}, 'hidden_act is "gelu"; supported: "silu"'),
    ("qwen2", {"use_sliding_window": True, "sliding_window": None}, "sliding_window is missing"),
    ("qwen2", {"use_sliding_window": "no"}, 'use_sliding_window is "no"; supported: true or false'),
    ("qwen2", {"use_sliding_window": True, "max_window_layers": -1}, "max_window_layers is -1"),
    ("qwen2", {"layer_types": ["sliding_attention"] * 6}, "as use_sliding_window is not true"),
    ("qwen2", {"layer_types": ["full_attention"] * 5}, "for each of the 6 layers"),
    ("qwen2", {"layer_types": ["chunked_attention"] * 6}, "sliding_attention or full_attention for each"),
    ("qwen2", {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "yarn with factor, original_max_position_embeddings"),
    ("qwen2", {"rope_scaling": YARN | {"beta_slow": 40}}, "a beta_fast greater than beta_slow"),
    ("qwen2", {"rope_scaling": YARN | {"truncate": 1}}, "truncate true or false"),
    ("qwen2", {"rope_scaling": YARN | {"attention_factor": -1}}, "attention_factor as a positive number"),
    ("qwen2", {"rope_scaling": YARN | {"finetuned": True}}, "with rope_type yarn only rope_theta, factor"),
    ("qwen2", {"rope_scaling": YARN, "original_max_position_embeddings": 64}, "original_max_position_embeddings is 64"),
    ("qwen2", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type default, linear, llama3, yarn"),
    ("qwen3", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config is"),
    ("qwen3", {"num_experts": 64}, "num_experts is 64; supported: only models without it"),
    ("gemma2", {"hidden_activation": "gelu"}, 'hidden_activation is "gelu"; supported: "gelu_pytorch_tanh"'),
    ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention is true; supported: false"),
    ("gemma2", {"attn_logit_softcapping": 0}, "attn_logit_softcapping is 0; supported: a positive number"),
    ("gemma2", {"sliding_window": None}, "sliding_window is missing"),
    ("gemma2", {"query_pre_attn_scalar": "x"}, 'query_pre_attn_scalar is "x"'),
    ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0; supported: only models without"),
    ("gemma3", {"rope_parameters": {"rope_theta": 1e6}}, "an object with full_attention and sliding_attention"),
    ("gemma3", {"rope_parameters": BOTH, "rope_scaling": {"type": "linear", "factor": 2.0}}, "only rope_parameters"),
    (
        "gemma3",
        {"rope_parameters": BOTH | {"sliding_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}},
        "rope_type default for sliding_attention",
    ),
    ("gemma3", {"rope_parameters": BOTH | {"full_attention": {"rope_theta": 5e5}}}, "rope_theta is 1000000.0"),
    # which transformers never reads
    (
        "gemma3",
        {"_sliding_window_pattern": 2, "sliding_window_pattern": "absent"},
        "_sliding_window_pattern is 2; supported: sliding_window_pattern without _, or layer_types",
    ),
    ("scored", {"id2label": 5}, "id2label is 5; supported: one label"),
    ("scored", {"id2label": ["reward"]}, 'id2label is ["reward"]; supported: one label'),
    ("scored", {"id2label": {"0": "a", "1": "b"}}, "supported: one label"),
    ("scored", {"id2label": "absent"}, "num_labels is missing; supported: one label"),
    ("scored", {"id2label": "absent", "num_labels": "x"}, 'num_labels is "x"; supported: a whole number'),
    ("scored", {"id2label": "absent", "num_labels": True}, "num_labels is true; supported: a whole number"),
    # the export would say so, after the training
    ("qwen2", {"dtype": 5}, 'dtype is 5; supported: "bfloat16", "float16", "float32"'),
    ("qwen2", {"dtype": ["float32"]}, 'dtype is ["float32"]; supported: "bfloat16", "float16", "float32"'),
    ("qwen2", {"torch_dtype": "float64"}, 'torch_dtype is "float64"; supported: "bfloat16", "float16", "float32"'),
    ("olmo2", {"sliding_window": 512}, "sliding_window is 512"),
    ("olmo2", {"num_key_value_heads": 3}, "a divisor of num_attention_heads (8)"),
    ("phi3", {"rope_scaling": LONG}, "rope_type default (longrope's frequencies depend on the batch)"),
    ("phi3", {"rope_scaling": LONG | {"type": "su"}}, "rope_scaling is"),
    ("phi3", {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e6}}, "rope_parameters is"),
    ("phi3", {"partial_rotary_factor": 0.4}, "partial_rotary_factor is 0.4"),
    ("phi3", {"partial_rotary_factor": 1.5}, "at most 1"),
    ("phi3", {"partial_rotary_factor": True}, "partial_rotary_factor is true"),
    ("phi3", {"partial_rotary_factor": "half"}, 'partial_rotary_factor is "half"'),
]


@pytest.mark.parametrize(("family", "fields", "message"), REFUSED)
def test_refused_with_the_field(family: str, fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError) as error:
        shape_of(tmp_path, family, **fields)
    assert message in str(error.value)
    assert str(tmp_path / "config.json") in str(error.value)
    assert "\n" not in str(error.value)
