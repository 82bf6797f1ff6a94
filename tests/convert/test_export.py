"""Writing a folder: from every layout of a checkpoint, complete or not at all, and without running what a
file says.
"""

import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.checkpoint as dcp
from llamas import write
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata

from megadpo.convert import exporter
from megadpo.convert.exporter import export_hf
from megadpo.convert.hf_files import INDEX, WHOLE
from megadpo.convert.torch_dist import TorchDist
from megadpo.errors import CheckpointError, ModelError, StorageError

LAYERS = 5
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: write(name, root / name) for name in ("llama3", "tied", "biases")}


def weights(folder: Path) -> dict[str, Tensor]:
    return {name: x for file in folder.glob("*.safetensors") for name, x in load_file(file).items()}


def per_layer(hf: dict[str, Tensor], layer: int, groups: int) -> dict[str, Tensor]:
    """One layer's Megatron tensors, from Hugging Face's, by the definition of each."""
    source = {name.split(f"layers.{layer}.")[1]: x for name, x in hf.items() if f"layers.{layer}." in name}
    found = {
        "self_attention.linear_qkv.layer_norm_weight": source["input_layernorm.weight"],
        "mlp.linear_fc1.layer_norm_weight": source["post_attention_layernorm.weight"],
    }
    for kind in ("weight", "bias"):
        if f"self_attn.q_proj.{kind}" in source:
            parts = [source[f"self_attn.{x}_proj.{kind}"] for x in "qkv"]
            by_group = [x.view(groups, -1, *x.shape[1:]) for x in parts]
            found[f"self_attention.linear_qkv.{kind}"] = torch.cat(by_group, 1).flatten(0, 1)
            found[f"self_attention.linear_proj.{kind}"] = source[f"self_attn.o_proj.{kind}"]
        if f"mlp.up_proj.{kind}" in source:
            found[f"mlp.linear_fc1.{kind}_w"] = source[f"mlp.gate_proj.{kind}"]
            found[f"mlp.linear_fc1.{kind}_v"] = source[f"mlp.up_proj.{kind}"]
            found[f"mlp.linear_fc2.{kind}"] = source[f"mlp.down_proj.{kind}"]
    return found


def megatron(folder: Path, layout: str = "stacked", padding: int = 0) -> dict[str, Tensor]:
    """A model's tensors under the keys of one of Megatron-Core's layouts."""
    hf = weights(folder)
    layers = [per_layer(hf, layer, groups=2) for layer in range(LAYERS)]
    if layout != "singleton":  # gate and up are one tensor
        for layer in layers:
            for key in [key for key in layer if key.endswith("_w")]:
                layer[key[:-2]] = torch.cat([layer.pop(key), layer.pop(key[:-1] + "v")])
    if layout == "stacked":
        state = {f"decoder.layers.{key}": torch.stack([x[key] for x in layers]) for key in layers[0]}
    else:
        state = {f"decoder.layers.{i}.{key}": x for i, layer in enumerate(layers) for key, x in layer.items()}

    def padded(x: Tensor) -> Tensor:
        return torch.cat([x, torch.zeros(padding, x.shape[1])])

    state["decoder.final_layernorm.weight"] = hf["model.norm.weight"]
    state["embedding.word_embeddings.weight"] = padded(hf["model.embed_tokens.weight"])
    if "lm_head.weight" in hf:
        state["output_layer.weight"] = padded(hf["lm_head.weight"])
    return state


def save(state: dict[str, Tensor], folder: Path) -> Path:
    """A checkpoint folder with these tensors, and with an optimizer's and the trainer's beside them."""
    other = {"optimizer.exp_avg": torch.zeros(3), "rng_state": torch.zeros(3)}
    dcp.save(state | other, storage_writer=dcp.FileSystemWriter(folder), no_dist=True)
    return folder


@pytest.fixture
def llama3(models: dict[str, Path], tmp_path: Path) -> SimpleNamespace:
    """A source, its state (to be changed before `save`), and where to write."""
    source = Path(shutil.copytree(models["llama3"], tmp_path / "source"))
    return SimpleNamespace(source=source, state=megatron(source), checkpoint=tmp_path / "step", out=tmp_path / "out")


def refused(case: SimpleNamespace, kind: type[Exception] = CheckpointError, **options: object) -> str:
    """The one line of a failed export, after which nothing is left."""
    with pytest.raises(kind) as error:
        export_hf(case.checkpoint, case.source, case.out, **options)
    assert not case.out.exists()
    assert not list(case.out.parent.glob("*.partial"))
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("layout", ["stacked", "per layer", "singleton"])
@pytest.mark.parametrize("model", ["llama3", "tied", "biases"])
def test_every_layout_of_megatron(model: str, layout: str, models: dict[str, Path], tmp_path: Path) -> None:
    checkpoint = save(megatron(models[model], layout, padding=13), tmp_path / "step")
    export_hf(checkpoint, models[model], tmp_path / "out")
    before, after = weights(models[model]), weights(tmp_path / "out")
    assert after.keys() == before.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


def test_files_index_and_progress(llama3: SimpleNamespace) -> None:
    seen: list[tuple[int, int]] = []
    save(llama3.state, llama3.checkpoint)
    export_hf(
        llama3.checkpoint,
        llama3.source,
        llama3.out,
        max_shard_bytes=100_000,
        progress=lambda done, total: seen.append((done, total)),
    )
    index = json.loads((llama3.out / INDEX).read_text())
    files = sorted(llama3.out.glob("*.safetensors"))
    assert [file.name for file in files] == [
        f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)
    ]
    where = {}
    for file in files:
        with safe_open(file, "pt") as tensors:
            assert tensors.metadata() == {"format": "pt"}
            size = sum(tensors.get_tensor(name).nbytes for name in tensors.keys())  # noqa: SIM118
            assert size <= 100_000
            where |= dict.fromkeys(tensors.keys(), file.name)
    assert index["weight_map"] == where
    total = sum(x.nbytes for x in weights(llama3.source).values())
    assert index["metadata"] == {"total_size": total}
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert len(seen) == len(where)
    assert seen[-1] == (total, total)


def test_one_file_needs_no_index(llama3: SimpleNamespace) -> None:
    save(llama3.state, llama3.checkpoint)
    export_hf(llama3.checkpoint, llama3.source, llama3.out)
    assert sorted(x.name for x in llama3.out.iterdir()) == ["config.json", "generation_config.json", WHOLE]


@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_file_modes_are_what_umask_says(umask: int, llama3: SimpleNamespace) -> None:
    save(llama3.state, llama3.checkpoint)
    before = os.umask(umask)
    try:
        export_hf(llama3.checkpoint, llama3.source, llama3.out, max_shard_bytes=100_000)
    finally:
        os.umask(before)
    assert {x.stat().st_mode & 0o777 for x in llama3.out.iterdir()} == {0o666 & ~umask}


def test_small_files_are_copied_byte_for_byte(llama3: SimpleNamespace) -> None:
    copied = {"tokenizer.json", "tokenizer.model", "chat_template.jinja", "LICENSE.txt", "added_tokens.json"}
    for name in (*copied, "pytorch_model.bin", "README.md", "training_args.json", "model-x.safetensors"):
        (llama3.source / name).write_bytes(b"\x00\xff " + name.encode())
    (llama3.source / "additional_chat_templates").mkdir()
    (llama3.source / "additional_chat_templates" / "tools.jinja").write_text("{{ x }}\r\n")
    (llama3.source / "model-x.safetensors").unlink()
    save(llama3.state, llama3.checkpoint)
    export_hf(llama3.checkpoint, llama3.source, llama3.out)
    files = {str(x.relative_to(llama3.out)) for x in llama3.out.rglob("*") if x.is_file()}
    expected = copied | {"additional_chat_templates/tools.jinja", "generation_config.json"}
    assert files == expected | {"config.json", WHOLE}
    for name in expected:
        assert (llama3.out / name).read_bytes() == (llama3.source / name).read_bytes()


@pytest.mark.parametrize("spelled", [("dtype",), ("torch_dtype",), ("dtype", "torch_dtype"), ()])
def test_dtype(spelled: tuple[str, ...], llama3: SimpleNamespace) -> None:
    """Only the dtype changes in config.json, in the spelling that it has, and only where it differs."""
    path = llama3.source / "config.json"
    config = json.loads(path.read_text())
    del config["dtype"]
    path.write_text(json.dumps(config | dict.fromkeys(spelled, "float32")))
    save(llama3.state, llama3.checkpoint)
    export_hf(llama3.checkpoint, llama3.source, llama3.out, dtype="bfloat16")
    assert {x.dtype for x in weights(llama3.out).values()} == {torch.bfloat16}
    written = json.loads((llama3.out / "config.json").read_text())
    assert written == config | dict.fromkeys(spelled or ("torch_dtype",), "bfloat16")
    before = weights(llama3.source)
    assert all(torch.equal(x, before[name].bfloat16()) for name, x in weights(llama3.out).items())


def test_dtype_of_the_source_where_none_is_asked_for(llama3: SimpleNamespace) -> None:
    path = llama3.source / "config.json"
    path.write_text(path.read_text().replace('"float32"', '"bfloat16"'))
    save(llama3.state, llama3.checkpoint)
    export_hf(llama3.checkpoint, llama3.source, llama3.out)
    assert {x.dtype for x in weights(llama3.out).values()} == {torch.bfloat16}
    assert (llama3.out / "config.json").read_bytes() == path.read_bytes()


def test_dtype_of_the_checkpoint_where_config_is_silent(llama3: SimpleNamespace) -> None:
    path = llama3.source / "config.json"
    config = json.loads(path.read_text())
    del config["dtype"]
    path.write_text(json.dumps(config))
    save({key: x.bfloat16() for key, x in llama3.state.items()}, llama3.checkpoint)
    export_hf(llama3.checkpoint, llama3.source, llama3.out)
    assert {x.dtype for x in weights(llama3.out).values()} == {torch.bfloat16}


def test_unknown_dtype_in_config(llama3: SimpleNamespace) -> None:
    path = llama3.source / "config.json"
    path.write_text(path.read_text().replace('"float32"', '"float8_e4m3fn"'))
    save(llama3.state, llama3.checkpoint)
    assert 'dtype is "float8_e4m3fn"; supported: "bfloat16", "float16", "float32"' in refused(llama3, ModelError)


@pytest.mark.parametrize("key", ["decoder.layers.mlp.linear_fc2.weight", "output_layer.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity(key: str, value: float, llama3: SimpleNamespace) -> None:
    llama3.state[key].view(-1)[70] = value
    save(llama3.state, llama3.checkpoint)
    message = refused(llama3)
    assert ("lm_head.weight" if "output" in key else "model.layers.0.mlp.down_proj.weight") in message
    assert "has NaN or Inf" in message


def test_values_beyond_float16(llama3: SimpleNamespace) -> None:
    llama3.state["decoder.final_layernorm.weight"][3] = 1e6
    save(llama3.state, llama3.checkpoint)
    message = refused(llama3, dtype="float16")
    assert "model.norm.weight has NaN or Inf as F16, whose range is too small; use bfloat16" in message


def test_checkpoint_of_another_model(llama3: SimpleNamespace) -> None:
    del llama3.state["decoder.final_layernorm.weight"]
    llama3.state["decoder.layers.mlp.linear_fc2.bias"] = torch.zeros(LAYERS, 64)
    llama3.state["decoder.layers.mlp.linear_fc1.weight"] = torch.zeros(LAYERS, 200, 64)
    llama3.state["decoder.layers.self_attention.linear_proj.weight"] = torch.zeros(LAYERS + 1, 64, 64)
    llama3.state["embedding.word_embeddings.weight"] = torch.zeros(100, 64)
    save(llama3.state, llama3.checkpoint)
    message = refused(llama3)
    assert f"{llama3.checkpoint} does not fit the model in {llama3.source}" in message
    assert "missing: decoder.final_layernorm.weight" in message
    assert "not part of that model: decoder.layers.mlp.linear_fc2.bias" in message
    assert "of another shape or dtype: embedding.word_embeddings.weight (100 x 64, torch.float32), " in message
    assert "linear_proj.weight (6 x 64 x 64, torch.float32), " in message
    assert "mlp.linear_fc1.weight (5 x 200 x 64, torch.float32)" in message


@pytest.mark.parametrize(
    "tensor", [torch.ones(64, dtype=torch.int64), torch.ones(64).to(torch.float8_e4m3fn), torch.tensor(1.0)]
)
def test_stored_tensor_that_is_no_such_weight(tensor: Tensor, llama3: SimpleNamespace) -> None:
    llama3.state["decoder.final_layernorm.weight"] = tensor
    save(llama3.state, llama3.checkpoint)
    message = refused(llama3)
    assert "of another shape or dtype: decoder.final_layernorm.weight (" in message
    assert str(tensor.dtype) in message


def test_no_checkpoint(llama3: SimpleNamespace) -> None:
    assert "no checkpoint (no .metadata in it): give the folder of one finished step" in refused(llama3)


@pytest.mark.parametrize("data", [b"", b"\x80\x04", b"not a pickle", pickle.dumps({"a": 1})])
def test_broken_metadata(data: bytes, llama3: SimpleNamespace) -> None:
    save(llama3.state, llama3.checkpoint)
    (llama3.checkpoint / ".metadata").write_bytes(data)
    assert ".metadata" in refused(llama3)


@pytest.mark.parametrize("keep", [0, 1000, 200_000])
def test_truncated_chunk_file(keep: int, llama3: SimpleNamespace) -> None:
    file = next(save(llama3.state, llama3.checkpoint).glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:keep])
    assert f"{file}: " in refused(llama3)


def test_missing_chunk_file(llama3: SimpleNamespace) -> None:
    file = next(save(llama3.state, llama3.checkpoint).glob("*.distcp"))
    file.unlink()
    assert f"{file}: cannot be read: No such file" in refused(llama3)


class RunsCode:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.marker),)


def test_hostile_metadata_is_refused_and_runs_nothing(llama3: SimpleNamespace, tmp_path: Path) -> None:
    save(llama3.state, llama3.checkpoint)
    path, marker = llama3.checkpoint / ".metadata", tmp_path / "code was run"
    metadata = pickle.loads(path.read_bytes())
    metadata.planner_data = RunsCode(marker)
    path.write_bytes(pickle.dumps(metadata))
    message = refused(llama3)
    assert "posix.mkdir, which no checkpoint needs" in message
    assert not marker.exists()
    pickle.loads(path.read_bytes())
    assert marker.exists()  # the file does what it says to those who let it


@pytest.mark.parametrize("protocol", [0, 2, 5])
@pytest.mark.parametrize("name", ["builtins eval", "os system", "torch load", "builtins getattr", "pathlib Path.touch"])
def test_metadata_may_name_nothing_but_its_own_classes(name: str, protocol: int, tmp_path: Path) -> None:
    module, attribute = name.split()
    if protocol == 5:
        data = b"\x80\x05" + b"".join(b"\x8c" + bytes([len(x)]) + x.encode() for x in (module, attribute)) + b"\x93."
    else:
        data = f"c{module}\n{attribute}\n.".encode()
    (tmp_path / ".metadata").write_bytes(data)
    with pytest.raises(CheckpointError, match=f"it names {module}.{attribute}"):
        TorchDist(tmp_path)


def test_hostile_chunk_is_refused_and_runs_nothing(llama3: SimpleNamespace, tmp_path: Path) -> None:
    marker = tmp_path / "code was run"
    save(llama3.state, llama3.checkpoint)
    metadata = pickle.loads((llama3.checkpoint / ".metadata").read_bytes())
    hostile = llama3.checkpoint / "hostile.distcp"
    torch.save(RunsCode(marker), hostile)
    for place in metadata.storage_data.values():
        place.relative_path, place.offset, place.length = hostile.name, 0, hostile.stat().st_size
    (llama3.checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    assert f"{hostile}: embedding.word_embeddings.weight: the file is cut off or damaged" in refused(llama3)
    assert not marker.exists()


def edit_metadata(folder: Path) -> Iterator[Metadata]:
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    yield metadata
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def test_metadata_that_points_outside_its_folder(llama3: SimpleNamespace) -> None:
    for metadata in edit_metadata(save(llama3.state, llama3.checkpoint)):
        for place in metadata.storage_data.values():
            place.relative_path = "../step/" + place.relative_path
    assert ".metadata does not say where embedding.word_embeddings.weight" in refused(llama3)


def test_incomplete_checkpoint(llama3: SimpleNamespace) -> None:
    for metadata in edit_metadata(save(llama3.state, llama3.checkpoint)):
        metadata.state_dict_metadata["decoder.final_layernorm.weight"].chunks.clear()
    assert "decoder.final_layernorm.weight is incomplete: 0 of 64 values are there" in refused(llama3)


def test_output_that_exists(llama3: SimpleNamespace) -> None:
    save(llama3.state, llama3.checkpoint)
    llama3.out.mkdir()
    (llama3.out / "mine.txt").write_text("keep")
    with pytest.raises(StorageError, match=r"out exists and is not an empty folder"):
        export_hf(llama3.checkpoint, llama3.source, llama3.out)
    assert [x.name for x in llama3.out.iterdir()] == ["mine.txt"]
    with pytest.raises(StorageError, match=r"mine\.txt exists and is not an empty folder"):
        export_hf(llama3.checkpoint, llama3.source, llama3.out / "mine.txt")
    (llama3.out / "mine.txt").unlink()
    export_hf(llama3.checkpoint, llama3.source, llama3.out)
    assert (llama3.out / WHOLE).exists()


def test_rest_of_a_killed_export_is_replaced(llama3: SimpleNamespace) -> None:
    save(llama3.state, llama3.checkpoint)
    partial = llama3.out.with_name("out.partial")
    partial.mkdir()
    (partial / "model-00009-of-00009.safetensors").write_text("half")
    export_hf(llama3.checkpoint, llama3.source, llama3.out)
    assert not partial.exists()
    assert [x.name for x in llama3.out.glob("*.safetensors")] == [WHOLE]


def test_too_little_space_is_seen_before_writing(llama3: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    save(llama3.state, llama3.checkpoint)
    monkeypatch.setattr(exporter.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    needed = sum(x.nbytes for x in weights(llama3.source).values())
    needed += (llama3.source / "generation_config.json").stat().st_size
    assert f"the export needs {needed} bytes, 1000 are free" in refused(llama3, StorageError)


def test_export_needs_no_megatron() -> None:
    code = "import sys, megadpo.convert.exporter; sys.exit(any(x.startswith('megatron') for x in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_disk_that_fails_while_writing(llama3: SimpleNamespace) -> None:
    save(llama3.state, llama3.checkpoint)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        message = refused(llama3, StorageError)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert "File too large; the export was not written" in message
