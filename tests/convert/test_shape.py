"""config.json: what is read from it, and what is refused because it would not be carried exactly."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from llamas import LLAMA3, MODELS, write
from transformers import AutoConfig

from megadpo.convert.families import megatron_tensors, read_shape
from megadpo.convert.families.llama import WEIGHTS
from megadpo.convert.hf_files import HFFiles
from megadpo.convert.shape import ModelShape, RopeScaling
from megadpo.convert.tables import hf_shapes
from megadpo.errors import ModelError

LLAMA_2 = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 172,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "vocab_size": 512,
}
"""What the oldest published folders give: everything else has the family's default."""
SCALING = {key: value for key, value in LLAMA3.items() if key != "rope_theta"}


def folder(path: Path, **fields: Any) -> Path:
    (path / "config.json").write_text(json.dumps(LLAMA_2 | fields))
    return path


def test_defaults_of_the_oldest_folders(tmp_path: Path) -> None:
    shape = read_shape(folder(tmp_path))
    assert (shape.num_query_groups, shape.kv_channels) == (8, 8)
    assert (shape.rotary_base, shape.rope_scaling) == (10000.0, None)
    assert not any((shape.tied, shape.qkv_bias, shape.proj_bias, shape.mlp_bias))
    assert shape.layernorm_epsilon == 1e-6


def test_grouped_queries_own_head_width_and_biases(tmp_path: Path) -> None:
    shape = read_shape(
        folder(
            tmp_path,
            num_key_value_heads=2,
            head_dim=12,
            attention_bias=True,
            mlp_bias=True,
            tie_word_embeddings=True,
        )
    )
    assert (shape.num_query_groups, shape.kv_channels) == (2, 12)
    assert all((shape.tied, shape.qkv_bias, shape.proj_bias, shape.mlp_bias))


@pytest.mark.parametrize(
    ("fields", "theta", "scaling"),
    [
        ({"rope_theta": 5e5}, 5e5, None),
        ({"rope_theta": 5e5, "rope_scaling": None}, 5e5, None),
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, 5e5, None),
        ({"rope_parameters": {"rope_type": "default"}, "rope_theta": 5e5}, 5e5, None),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, 1e4, RopeScaling("linear", 4.0)),
        (
            {"rope_theta": 7e4, "rope_scaling": {"rope_type": "linear", "factor": 2}},
            7e4,
            RopeScaling("linear", 2.0),
        ),
        ({"rope_theta": 5e5, "rope_scaling": SCALING}, 5e5, RopeScaling("llama3", 4.0, 1.5, 3.0, 16)),
        ({"rope_parameters": LLAMA3}, 5e5, RopeScaling("llama3", 4.0, 1.5, 3.0, 16)),
        ({"rope_parameters": LLAMA3, "rope_scaling": SCALING}, 5e5, RopeScaling("llama3", 4.0, 1.5, 3.0, 16)),
    ],
)
def test_both_spellings_of_rope(
    fields: dict[str, Any], theta: float, scaling: RopeScaling | None, tmp_path: Path
) -> None:
    shape = read_shape(folder(tmp_path, **fields))
    assert (shape.rotary_base, shape.rope_scaling) == (theta, scaling)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"architectures": ["GemmaForCausalLM"]},
            'architectures is ["GemmaForCausalLM"]; supported: one of DeepseekV2ForCausalLM, Deep',
        ),
        ({"architectures": None}, "architectures is missing"),
        ({"hidden_act": "gelu"}, 'hidden_act is "gelu"; supported: "silu"'),
        ({"pretraining_tp": 2}, "pretraining_tp is 2; supported: 1"),
        (
            {"quantization_config": {"quant_method": "awq"}},
            'quantization_config is {"quant_method": "awq"}; supported',
        ),
        ({"sliding_window": 4096}, "sliding_window is 4096; supported: only models without it"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5; supported: 1"),
        ({"auto_map": {"AutoModelForCausalLM": "x.Y"}}, "trust_remote_code is never used"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type default, linear, llama3"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, '"yarn"'),
        (
            {"rope_parameters": {"rope_type": ["default"], "rope_theta": 1e4}},
            "rope_type default, linear, llama3",
        ),
        ({"rope_parameters": {"rope_type": "default"}}, "rope_theta is missing"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor 1.0"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}, "rope_theta": 1e4}, "only rope_theta"),
        ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e6}}, "rope_theta is 10000.0"),
        ({"rope_theta": -1}, "rope_theta is -1; supported: rope_theta as a positive number"),
        ({"rope_scaling": {"type": "linear", "rope_type": "llama3", "factor": 2.0}}, "one rope_type"),
        ({"rope_scaling": {"type": "linear"}}, "linear with factor as positive numbers"),
        (
            {"rope_scaling": SCALING | {"factor": None}},
            "llama3 with factor, low_freq_factor, high_freq_factor",
        ),
        (
            {"rope_scaling": SCALING | {"low_freq_factor": 9.0}},
            "high_freq_factor greater than low_freq_factor",
        ),
        ({"rope_scaling": "linear"}, 'rope_scaling is "linear"; supported: an object or null'),
        (
            {"rope_parameters": LLAMA3, "rope_scaling": {"type": "linear", "factor": 2.0}},
            "what rope_parameters says",
        ),
        (
            {"num_key_value_heads": 3},
            "num_key_value_heads is 3; supported: a divisor of num_attention_heads (8)",
        ),
        ({"hidden_size": 60}, "hidden_size is 60; supported: a multiple of num_attention_heads (8)"),
        ({"head_dim": 7}, "head_dim is 7; supported: an even number"),
        ({"vocab_size": None}, "vocab_size is missing"),
        ({"vocab_size": "many"}, 'vocab_size is "many"; supported: a whole number'),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers is 1000000000000"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0; supported: a positive number"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is NaN"),
        ({"tie_word_embeddings": "yes"}, 'tie_word_embeddings is "yes"; supported: true or false'),
    ],
)
def test_refused_with_field_value_and_what_is_supported(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError) as error:
        read_shape(folder(tmp_path, **fields))
    assert message in str(error.value)
    assert str(tmp_path / "config.json") in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "holds a list; must be one JSON object"),
        ('{"vocab_size": 1, "vocab_size": 2}', "'vocab_size' stands there twice"),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_broken_config(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError, match=message):
        read_shape(tmp_path)


def test_no_folder_and_no_config(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is not a folder"):
        read_shape(tmp_path / "nowhere")
    with pytest.raises(ModelError, match=r"config\.json is missing"):
        read_shape(tmp_path)


@pytest.mark.parametrize("name", MODELS)
def test_table_names_exactly_what_transformers_writes(name: str, tmp_path: Path) -> None:
    files = HFFiles(write(name, tmp_path))
    named: dict[str, tuple[int, ...]] = {}
    for tensor in megatron_tensors(read_shape(tmp_path)).values():
        assert not named.keys() & hf_shapes(tensor).keys()
        named |= hf_shapes(tensor)
    assert named == {tensor: files.stored(tensor).shape for tensor in files.where}


def test_every_row_of_the_table_is_used() -> None:
    """Together the test models have every weight that the family knows; a row none of them has would be
    untested.
    """
    unused = {weight.megatron for weight in WEIGHTS}
    for model in MODELS.values():
        tied, bias = bool(model.get("tie_word_embeddings")), bool(model.get("attention_bias"))
        shape = SimpleNamespace(tied=tied, qkv_bias=bias, proj_bias=bias, mlp_bias=bool(model.get("mlp_bias")))
        unused -= {weight.megatron for weight in WEIGHTS if weight.when(shape)}
    assert unused == set()


def test_real_folder(shared: Path) -> None:
    folder = shared / "models" / "stories260k"
    shape, config = read_shape(folder), AutoConfig.from_pretrained(folder)
    assert shape == ModelShape(
        family="llama",
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.intermediate_size,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.num_key_value_heads,
        kv_channels=config.head_dim,
        vocab_size=config.vocab_size,
        max_position_embeddings=config.max_position_embeddings,
        layernorm_epsilon=config.rms_norm_eps,
        rotary_base=config.rope_parameters["rope_theta"],
        rope_scaling=None,
        tied=True,
        qkv_bias=False,
        proj_bias=False,
        mlp_bias=False,
    )
