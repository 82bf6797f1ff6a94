"""Reading a folder: what can be wrong with its files, and that a rank gets what it asked for and nothing
else.
"""

import json
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from llamas import write
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from safetensors.torch import load_file, save_file

from megadpo.convert.families import megatron_tensors, read_shape
from megadpo.convert.hf_files import INDEX, WHOLE, HFFiles, weights_digest
from megadpo.convert.importer import check_hf, load_hf
from megadpo.errors import ModelError

Q, UP, EMBEDDING = (
    "model.layers.1.self_attn.q_proj.weight",
    "model.layers.1.mlp.up_proj.weight",
    "model.embed_tokens.weight",
)


class WholeModel:
    """Stands for a GPTModel on one rank: one parameter for every Megatron tensor, as `sharded_state_dict`
    names them.
    """

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32, padding: int = 0) -> None:
        self.tensors = {}
        for key, tensor in megatron_tensors(read_shape(folder)).items():
            rows = tensor.shape[0] + padding * tensor.padded
            self.tensors[key] = torch.full((rows, *tensor.shape[1:]), float("nan"), dtype=dtype)

    def sharded_state_dict(self, metadata: dict) -> dict[str, ShardedTensor]:
        assert metadata == {"singleton_local_shards": True}
        return {key: ShardedTensor.from_rank_offsets(key, x) for key, x in self.tensors.items()}

    def parameters(self) -> Any:
        return self.tensors.values()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: write(name, root / name) for name in ("llama3", "tied", "biases")}


@pytest.fixture
def whole(models: dict[str, Path], tmp_path: Path) -> Path:
    """A model in one file, to be damaged."""
    return Path(shutil.copytree(models["llama3"], tmp_path / "whole"))


@pytest.fixture
def sharded(models: dict[str, Path], tmp_path: Path) -> Path:
    """A model in several files, to be damaged."""
    return Path(shutil.copytree(models["biases"], tmp_path / "sharded"))


def refused(folder: Path) -> str:
    """The one line that both ways of reading a folder give."""
    with pytest.raises(ModelError) as checked:
        check_hf(read_shape(folder), folder)
    with pytest.raises(ModelError):
        load_hf([WholeModel(folder)], read_shape(folder), folder)
    assert "\n" not in str(checked.value)
    return str(checked.value)


def change(folder: Path, **changes: Callable[[torch.Tensor], torch.Tensor | None]) -> None:
    """Rewrite model.safetensors with some tensors (dots as __) changed; None removes one."""
    tensors = load_file(folder / WHOLE)
    for name, new in changes.items():
        key = name.replace("__", ".")
        changed = new(tensors.pop(key, torch.zeros(1)))
        if changed is not None:
            tensors[key] = changed
    save_file(tensors, folder / WHOLE)


def edit_index(folder: Path, edit: Callable[[dict], None]) -> None:
    index = json.loads((folder / INDEX).read_text())
    edit(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def test_values_dtype_and_padding(models: dict[str, Path]) -> None:
    folder = models["tied"]
    model = WholeModel(folder, torch.bfloat16, padding=5)
    load_hf([model], read_shape(folder), folder)
    assert all(torch.isfinite(x).all() for x in model.parameters())
    found = model.tensors["embedding.word_embeddings.weight"]
    assert torch.equal(found[:131], HFFiles(folder).slice(EMBEDDING)[:].bfloat16())
    assert torch.equal(found[131:], torch.zeros_like(found[131:]))


def test_query_key_value_rows(models: dict[str, Path]) -> None:
    """By definition: per query group its 4 query heads, its key head, its value head, of 12 rows."""
    folder = models["biases"]
    model, files = WholeModel(folder), HFFiles(folder)
    load_hf([model], read_shape(folder), folder)
    q, k, v = (files.slice(f"model.layers.2.self_attn.{x}_proj.weight")[:] for x in "qkv")
    expected = torch.cat([q.view(2, 4, 12, 64), k.view(2, 1, 12, 64), v.view(2, 1, 12, 64)], 1).view(-1, 64)
    assert torch.equal(model.tensors["decoder.layers.2.self_attention.linear_qkv.weight"], expected)


def test_missing_extra_misshapen_and_quantised_are_reported_together(whole: Path) -> None:
    change(
        whole,
        model__norm__weight=lambda x: None,
        model__layers__9__mlp__up_proj__weight=lambda x: x,
        model__layers__1__mlp__up_proj__weight=lambda x: x[:90].clone(),
        model__layers__1__self_attn__q_proj__weight=lambda x: x.to(torch.int8),
    )
    message = refused(whole)
    assert "missing: model.norm.weight" in message
    assert "not part of the model that config.json describes: model.layers.9.mlp.up_proj.weight" in message
    assert f"wrong shape: {UP} (90 x 64, not 96 x 64)" in message
    assert f"dtype other than F32, F16, BF16 (convert to bfloat16 first): {Q} (I8)" in message
    assert str(whole) in message


def test_long_lists_are_counted(whole: Path) -> None:
    config = json.loads((whole / "config.json").read_text())
    (whole / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 6}))
    assert "missing: " in refused(whole)
    assert "and 6 more" in refused(whole)


def test_vocabulary_larger_than_config_says(whole: Path) -> None:
    change(whole, model__embed_tokens__weight=lambda x: torch.cat([x, x[:3]]))
    assert f"{EMBEDDING} (131 x 64, not 128 x 64)" in refused(whole)


def test_untied_without_an_output_layer(whole: Path) -> None:
    change(whole, lm_head__weight=lambda x: None)
    assert "missing: lm_head.weight" in refused(whole)


def test_bias_that_config_does_not_announce(whole: Path) -> None:
    change(whole, model__layers__0__self_attn__q_proj__bias=lambda x: torch.zeros(64))
    assert "config.json describes: model.layers.0.self_attn.q_proj.bias" in refused(whole)


def test_rotary_buffers_of_old_folders_are_ignored(whole: Path) -> None:
    change(whole, model__layers__0__self_attn__rotary_emb__inv_freq=lambda x: torch.ones(4))
    check_hf(read_shape(whole), whole)
    load_hf([WholeModel(whole)], read_shape(whole), whole)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity_name_the_tensor(value: float, whole: Path) -> None:
    def damage(weight: torch.Tensor) -> torch.Tensor:
        weight[-1, -1] = value
        return weight

    change(whole, model__layers__1__mlp__up_proj__weight=damage)
    with pytest.raises(ModelError, match=rf"{UP} has NaN or Inf"):
        load_hf([WholeModel(whole)], read_shape(whole), whole)


def test_tied_folder_with_an_output_layer(models: dict[str, Path], tmp_path: Path) -> None:
    """The same tensor again does no harm; another one would be lost."""
    folder = tmp_path / "tied"
    folder.mkdir()
    shutil.copy(models["tied"] / "config.json", folder)
    tensors = {name: x for file in models["tied"].glob("*.safetensors") for name, x in load_file(file).items()}
    save_file(tensors | {"lm_head.weight": tensors[EMBEDDING].clone()}, folder / WHOLE)
    check_hf(read_shape(folder), folder)
    load_hf([WholeModel(folder)], read_shape(folder), folder)
    for other in (tensors[EMBEDDING] * 1.001, tensors[EMBEDDING][:100].clone()):
        save_file(tensors | {"lm_head.weight": other}, folder / WHOLE)
        with pytest.raises(ModelError, match=r"tie_word_embeddings, but lm_head\.weight differs"):
            load_hf([WholeModel(folder)], read_shape(folder), folder)


def test_model_of_another_shape_is_a_defect(models: dict[str, Path]) -> None:
    """A chunk that was not built from this folder's shape is our mistake, not the user's: no ModelError."""
    model = WholeModel(models["biases"])
    with pytest.raises(KeyError, match="no row for the parameters"):
        load_hf([model], read_shape(models["llama3"]), models["llama3"])
    model = WholeModel(models["llama3"])
    model.tensors["decoder.final_layernorm.weight"] = torch.zeros(65)
    with pytest.raises(ValueError, match=r"final_layernorm\.weight was built as \(65,\), its table says \(64,\)"):
        load_hf([model], read_shape(models["llama3"]), models["llama3"])


def test_missing_file(sharded: Path) -> None:
    (sharded / "model-00002-of-00011.safetensors").unlink()
    assert "model-00002-of-00011.safetensors is missing" in refused(sharded)


@pytest.mark.parametrize("keep", [0, 5, 8, 1000, -1])
def test_truncated_file(keep: int, whole: Path) -> None:
    data = (whole / WHOLE).read_bytes()
    (whole / WHOLE).write_bytes(data[:keep])
    message = refused(whole)
    assert str(whole / WHOLE) in message
    assert "cut off" in message


def test_file_that_is_too_long(whole: Path) -> None:
    (whole / WHOLE).write_bytes((whole / WHOLE).read_bytes() + b"x")
    assert "the file is cut off or damaged" in refused(whole)


def rewrite_header(path: Path, edit: Callable[[dict], Any]) -> None:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    text = json.dumps(edit(header) or header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


@pytest.mark.parametrize(
    "edit",
    [
        lambda header: header[UP].update(shape=[96, 65]),
        lambda header: header[UP].update(data_offsets=[0, 24576]),
        lambda header: header[UP].update(data_offsets="all"),
        lambda header: header[UP].update(shape=[-1, 64]),
        lambda header: header[UP].pop("dtype"),
        lambda header: header.update({UP: None}),
        lambda header: [header],
    ],
)
def test_broken_header(edit: Callable[[dict], Any], whole: Path) -> None:
    rewrite_header(whole / WHOLE, edit)
    assert f"{whole / WHOLE}: broken safetensors header" in refused(whole)


@pytest.mark.parametrize("file", ["../whole/model.safetensors", "/etc/passwd", "sub/x.safetensors", 7, "x.bin"])
def test_index_that_points_elsewhere(file: str | int, sharded: Path) -> None:
    edit_index(sharded, lambda where: where.update({Q: file}))
    message = refused(sharded)
    assert f"{INDEX}: {Q} is said to be in {str(file)!r}" in message
    assert "in the same folder" in message


def test_index_that_names_what_is_not_there(sharded: Path) -> None:
    edit_index(sharded, lambda where: where.update({Q: "model-00001-of-00011.safetensors"}))
    message = refused(sharded)
    assert Q in message
    assert "does not hold it" in message or "says it is in model-00001-of-00011.safetensors" in message


def test_tensor_that_stands_in_two_files(sharded: Path) -> None:
    path = sharded / "model-00003-of-00011.safetensors"
    save_file(load_file(path) | {EMBEDDING: torch.zeros(131, 64)}, path)
    with pytest.raises(ModelError, match=r"holds model\.embed_tokens\.weight, but .* says it is in model-00001"):
        check_hf(read_shape(sharded), sharded)


@pytest.mark.parametrize("text", ["{}", '{"weight_map": []}', "{", '{"weight_map": {"a": "b", "a": "c"}}'])
def test_broken_index(text: str, sharded: Path) -> None:
    (sharded / INDEX).write_text(text)
    assert INDEX in refused(sharded)


def test_no_weights_at_all(whole: Path) -> None:
    (whole / WHOLE).unlink()
    assert f"has neither {WHOLE} nor {INDEX}" in refused(whole)


def test_digest_sees_every_kind_of_change(sharded: Path) -> None:
    """Same files, same digest; another byte in any tensor's middle, another name, another config: another
    one.
    """
    seen = {weights_digest(sharded)}
    assert weights_digest(sharded) in seen
    for name in ("model.norm.weight", Q, EMBEDDING):
        file = sharded / HFFiles(sharded).where[name]
        tensors = load_file(file)
        tensors[name].view(-1)[tensors[name].numel() // 2] += 1
        save_file(tensors, file, metadata={"format": "pt"})
        seen.add(weights_digest(sharded))
    with (sharded / "config.json").open("a") as config:
        config.write(" ")
    seen.add(weights_digest(sharded))
    rewrite_header(sharded / "model-00004-of-00011.safetensors", lambda header: {"__metadata__": {}} | header)
    seen.add(weights_digest(sharded))
    assert len(seen) == 6


def test_digest_of_a_folder_without_config(whole: Path) -> None:
    (whole / "config.json").unlink()
    with pytest.raises(ModelError, match=r"config\.json: cannot be read"):
        weights_digest(whole)


def test_damaged_folders_end_in_one_line(models: dict[str, Path], tmp_path: Path) -> None:
    """150 seeded accidents with bytes and fields: refused in one line or harmless, never a traceback or a
    NaN.
    """
    rng = random.Random(0)
    refusals = []
    for number in range(150):
        folder = Path(shutil.copytree(models[rng.choice(["llama3", "biases"])], tmp_path / str(number)))
        damage(folder, rng)
        try:
            shape = read_shape(folder)
            check_hf(shape, folder)
            model = WholeModel(folder)
            load_hf([model], shape, folder)
            assert all(torch.isfinite(x).all() for x in model.parameters())
        except ModelError as error:
            refusals.append(str(error))
        shutil.rmtree(folder)
    assert len(refusals) > 100
    assert [text for text in refusals if "\n" in text] == []


def damage(folder: Path, rng: random.Random) -> None:
    file = rng.choice(sorted(folder.glob("*.safetensors")))
    data = bytearray(file.read_bytes())
    kind = rng.choice(["cut", "flip", "swap", "config", "remove", "json"])
    if kind == "cut":
        file.write_bytes(data[: rng.randrange(len(data))])
    elif kind == "flip":  # in the header
        data[rng.randrange(int.from_bytes(data[:8], "little") + 8)] ^= 1 << rng.randrange(8)
        file.write_bytes(data)
    elif kind == "swap":
        other = rng.choice(sorted(folder.glob("*.json")))
        file.write_bytes(other.read_bytes())
    elif kind == "remove":
        rng.choice(sorted(x for x in folder.iterdir() if x.name != "generation_config.json")).unlink()
    elif kind == "config":
        config = json.loads((folder / "config.json").read_text())
        field = rng.choice(sorted(config))
        config[field] = rng.choice([None, -1, 0, 3, 7.5, "x", [], {}, True, 10**30])
        (folder / "config.json").write_text(json.dumps(config))
    else:
        path = rng.choice(sorted(x for x in folder.glob("*.json") if x.name != "generation_config.json"))
        text = path.read_text()
        at = rng.randrange(len(text))
        path.write_text(text[:at] + rng.choice(["", "}", '"', "\x00", "9"]) + text[at + 1 :])
