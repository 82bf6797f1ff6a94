"""LoRA folders: PEFT's names, Megatron's fused names, both ways to the bit, and merging."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families_table
import pytest
import torch
from llamas import write
from safetensors.torch import load_file, save_file
from test_round_trip import weights

from megadpo.convert.adapters import (
    CONFIG,
    PREFIX,
    WEIGHTS,
    Fused,
    Peft,
    from_megatron,
    read_peft,
    to_megatron,
    write_peft,
)
from megadpo.convert.exporter import export_hf
from megadpo.convert.families import megatron_tensors, read_shape
from megadpo.convert.tables import hf_shapes
from megadpo.convert.to_checkpoint import import_hf
from megadpo.errors import ModelError

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write("llama3", tmp_path_factory.mktemp("models") / "llama3")


def adapter(folder: Path, model: Path, kinds: tuple[str, ...] = ALL, r: int = 3, **fields: Any) -> Path:
    """A random LoRA folder by PEFT's documented names. rank_pattern among the fields is followed by the matrices."""
    generator = torch.Generator().manual_seed(r)
    shapes = hf_shapes(*megatron_tensors(read_shape(model)).values())
    tensors = {}
    for name, dims in shapes.items():
        module = name.removesuffix(".weight")
        if module.rsplit(".", 1)[-1] in kinds:
            rank = next((x for key, x in fields.get("rank_pattern", {}).items() if module.endswith(key)), r)
            tensors[f"{PREFIX}{module}.lora_A.weight"] = torch.randn(rank, dims[1], generator=generator) * 0.1
            tensors[f"{PREFIX}{module}.lora_B.weight"] = torch.randn(dims[0], rank, generator=generator) * 0.1
    folder.mkdir()
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": r, "lora_alpha": 8, "bias": "none"}
    config |= {"target_modules": list(kinds), "lora_dropout": 0.1, "use_dora": False, "modules_to_save": None}
    (folder / CONFIG).write_text(json.dumps(config | {"base_model_name_or_path": "some/model"} | fields))
    return folder


def expected(model: Path, folder: Path, scale: Callable[[str, int], float]) -> dict[str, torch.Tensor]:
    """Merged weights by the definition, W + scale B A, in float64."""
    merged, lora = {n: x.double() for n, x in weights(model).items()}, load_file(folder / WEIGHTS)
    for name in list(lora):
        if ".lora_A." in name:
            A, B = lora[name].double(), lora[name.replace("lora_A", "lora_B")].double()
            module = name.removeprefix(PREFIX).removesuffix(".lora_A.weight")
            merged[f"{module}.weight"] = merged[f"{module}.weight"] + scale(module, A.shape[0]) * (B @ A)
    return merged


@pytest.mark.parametrize(
    ("fields", "scale"),
    [
        ({}, lambda module, rank: 8 / rank),
        ({"use_rslora": True}, lambda module, rank: 8 / math.sqrt(rank)),
        (
            {"rank_pattern": {"k_proj": 5, "layers.2.mlp.up_proj": 1}, "alpha_pattern": {"up_proj": 4}},
            lambda module, rank: (4 if module.endswith("up_proj") else 8) / rank,
        ),
    ],
)
def test_merging_at_import(fields: dict, scale: Callable[[str, int], float], model: Path, tmp_path: Path) -> None:
    """W + scale B A, rounded to float32 once: right to half a unit of the last place."""
    folder = adapter(tmp_path / "lora", model, **fields)
    import_hf(model, tmp_path / "in", adapter=folder)
    export_hf(tmp_path / "in", tmp_path / "in", tmp_path / "out")
    merged = expected(model, folder, scale)
    found = weights(tmp_path / "out")
    assert found.keys() == merged.keys()
    assert [name for name, x in merged.items() if not torch.equal(found[name], x.float())] == []
    changed = [n for n, x in weights(model).items() if not torch.equal(found[n], x)]
    assert len(changed) == 5 * len(ALL)
    assert json.loads((tmp_path / "in" / "import.json").read_text())["adapter"] == "lora"


@pytest.mark.parametrize("kinds", [ALL, ("q_proj", "v_proj"), ("up_proj",), ("k_proj", "gate_proj", "lm_head")])
def test_megatron_names_both_ways(kinds: tuple[str, ...], model: Path, tmp_path: Path) -> None:
    shape = read_shape(model)
    peft = read_peft(adapter(tmp_path / "lora", model, kinds, rank_pattern={"k_proj": 5}))
    fused = to_megatron(peft, shape)
    back = from_megatron(fused, shape)
    assert back.keys() == peft.pairs.keys()
    for name, pair in peft.pairs.items():
        assert torch.equal(back[name].A, pair.A)
        assert torch.equal(back[name].B, pair.B)
        assert back[name].scale == pair.scale
    write_peft(tmp_path / "again", back, "some/model")
    again, before = load_file(tmp_path / "again" / WEIGHTS), load_file(tmp_path / "lora" / WEIGHTS)
    assert again.keys() == before.keys()
    assert all(torch.equal(again[name], before[name]) for name in before)
    assert {n: x.scale for n, x in read_peft(tmp_path / "again").pairs.items()} == {
        n: x.scale for n, x in peft.pairs.items()
    }


def test_fused_update_is_the_modules_updates(model: Path, tmp_path: Path) -> None:
    """q, k and v, of different ranks, as one block-form pair: per group its query heads, its key, its value rows."""
    peft = read_peft(adapter(tmp_path / "lora", model, rank_pattern={"k_proj": 5}))
    fused = to_megatron(peft, read_shape(model))
    qkv = fused["decoder.layers.1.self_attention.linear_qkv"]
    assert [(name.rsplit(".", 1)[-1], rank) for name, rank, _ in qkv.blocks] == [
        ("q_proj", 3),
        ("k_proj", 5),
        ("v_proj", 3),
    ]
    updates = []
    for x in "qkv":
        pair = peft.pairs[f"model.layers.1.self_attn.{x}_proj"]
        updates.append(pair.scale * pair.B.double() @ pair.A.double())
    by_group = [x.view(2, -1, 64) for x in updates]
    assert (qkv.update() - torch.cat(by_group, 1).view(-1, 64)).abs().max() < 1e-14
    fc1 = fused["decoder.layers.1.mlp.linear_fc1"]
    gate, up = (peft.pairs[f"model.layers.1.mlp.{x}_proj"] for x in ("gate", "up"))
    assert torch.equal(fc1.linear_out[:96, :3], gate.B)
    assert torch.equal(fc1.linear_out[96:, 3:], up.B)
    assert not fc1.linear_out[:96, 3:].any()
    assert torch.equal(fc1.linear_in, torch.cat([gate.A, up.A]))


def test_one_pair_for_all_of_a_fused_module(model: Path) -> None:
    """What Megatron trains by itself: q, k and v share A. Each of them gets A, and its own rows of B."""
    shape = read_shape(model)
    A, B = torch.randn(4, 64), torch.randn(96, 4)
    pairs = from_megatron({"decoder.layers.0.self_attention.linear_qkv": Fused(A, B, (("", 4, 0.5),))}, shape)
    assert sorted(pairs) == [f"model.layers.0.self_attn.{x}_proj" for x in "kqv"]
    fused = to_megatron(Peft(Path(), pairs, {}), shape)["decoder.layers.0.self_attention.linear_qkv"]
    assert (fused.update() - 0.5 * B.double() @ A.double()).abs().max() < 1e-14


def test_adapters_of_some_layers_name_their_modules(model: Path, tmp_path: Path) -> None:
    pairs = dict(read_peft(adapter(tmp_path / "lora", model, ("q_proj", "o_proj"))).pairs)
    del pairs["model.layers.3.self_attn.q_proj"]
    write_peft(tmp_path / "out", pairs, None, rslora=True)
    config = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert config["target_modules"] == sorted(pairs)
    assert config["use_rslora"] is True
    again = read_peft(tmp_path / "out").pairs
    assert {n: x.scale for n, x in again.items()} == pytest.approx({n: x.scale for n, x in pairs.items()})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_dora", True),
        ("modules_to_save", ["lm_head"]),
        ("bias", "all"),
        ("lora_bias", True),
        ("fan_in_fan_out", True),
        ("init_lora_weights", "pissa"),
        ("target_parameters", ["experts.gate_up_proj"]),
        ("trainable_token_indices", [1]),
        ("alora_invocation_tokens", [5]),
        ("something_new", True),
        ("peft_type", "IA3"),
        ("r", 4),
        ("lora_alpha", -1),
        ("lora_alpha", None),
        ("rank_pattern", {"q_proj": 7}),
        ("rank_pattern", {"(a+)+$": 7}),
        ("alpha_pattern", {"q_proj": "x"}),
    ],
)
def test_what_cannot_be_carried_is_refused_by_its_field(field: str, value: Any, model: Path, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "lora", model)
    config = json.loads((folder / CONFIG).read_text()) | {field: value}
    (folder / CONFIG).write_text(json.dumps(config))
    with pytest.raises(ModelError) as error:
        import_hf(model, tmp_path / "out", adapter=folder)
    named = "r is" if field == "rank_pattern" and "q_proj" in value else field
    assert named in str(error.value)
    assert "; supported: " in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


Q = f"{PREFIX}model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda x: x.pop(f"{Q}.lora_A.weight"), "q_proj has lora_B without the other half"),
        (
            lambda x: x.update({f"{Q}.lora_A.weight": torch.zeros(3, 63)}),
            "wrong shape: model.layers.0.self_attn.q_proj",
        ),
        (lambda x: x.update({f"{Q}.lora_A.weight": torch.zeros(2, 64)}), "must be rank x in and out x rank"),
        (lambda x: x.update({f"{Q}.lora_A.weight": torch.full((3, 64), float("nan"))}), "has NaN or Inf"),
        (lambda x: x.update({f"{Q}.lora_magnitude_vector": torch.zeros(64)}), "not a LoRA matrix of a linear layer"),
        (
            lambda x: x.update({f"{PREFIX}model.embed_tokens.lora_embedding_A": torch.zeros(3, 128)}),
            "not a LoRA matrix",
        ),
        (
            lambda x: x.update(
                {
                    f"{PREFIX}model.layers.7.mlp.up_proj.lora_A.weight": torch.zeros(3, 64),
                    f"{PREFIX}model.layers.7.mlp.up_proj.lora_B.weight": torch.zeros(96, 3),
                }
            ),
            "not linear layers of the model: model.layers.7.mlp.up_proj",
        ),
        (lambda x: x.clear(), "holds no tensors"),
    ],
)
def test_bad_adapter_weights(edit: Callable[[dict], Any], message: str, model: Path, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "lora", model)
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(ModelError) as error:
        import_hf(model, tmp_path / "out", adapter=folder)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_adapter_in_a_pickle(model: Path, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "lora", model)
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    with pytest.raises(ModelError, match=r"has only adapter_model\.bin, a pickle"):
        read_peft(folder)


def test_peft_itself_agrees(model: Path, tmp_path: Path) -> None:
    """PEFT loads what we write, merges to what we merge, and writes what we read."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder = adapter(tmp_path / "lora", model, rank_pattern={"k_proj": 5}, alpha_pattern={"up_proj": 4})
    write_peft(tmp_path / "ours", read_peft(folder).pairs, str(model))
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(base, tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    assert load_file(tmp_path / "theirs" / WEIGHTS).keys() == load_file(folder / WEIGHTS).keys()
    read_peft(tmp_path / "theirs")
    merged = theirs.merge_and_unload().state_dict()
    import_hf(model, tmp_path / "in", adapter=folder)
    export_hf(tmp_path / "in", tmp_path / "in", tmp_path / "out")
    assert max(float((merged[n] - x).abs().max()) for n, x in weights(tmp_path / "out").items()) < 1e-6


def test_family_whose_layers_are_fused_on_both_sides(tmp_path: Path) -> None:
    """Phi-3 has one qkv_proj and one gate_up_proj: other rows, the same bits back, and the right merge."""
    phi3 = families_table.write("phi3", tmp_path / "phi3")
    shape = read_shape(phi3)
    folder = adapter(tmp_path / "lora", phi3, ("qkv_proj", "gate_up_proj"))
    peft = read_peft(folder)
    back = from_megatron(to_megatron(peft, shape), shape)
    assert back.keys() == peft.pairs.keys()
    assert all(torch.equal(back[name].A, x.A) and torch.equal(back[name].B, x.B) for name, x in peft.pairs.items())
    import_hf(phi3, tmp_path / "in", adapter=folder)
    export_hf(tmp_path / "in", tmp_path / "in", tmp_path / "out")
    merged, found = expected(phi3, folder, lambda module, rank: 8 / rank), weights(tmp_path / "out")
    assert [name for name, x in merged.items() if not torch.equal(found[name], x.float())] == []
