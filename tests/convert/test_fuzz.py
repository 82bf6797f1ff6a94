"""Seeded accidents with every kind of file of a model folder, imported as a user would: refused in one line that names
the place, or harmless, and then the weights are those of the undamaged folder. Never a traceback, never half a folder.
"""

import json
import random
import shutil
import struct
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families_table
import pytest
import torch
from llamas import write
from safetensors.torch import load_file, save_file
from test_quantised import CASES as QUANTISED
from test_round_trip import STORIES, weights
from test_to_checkpoint import as_bin, same

from megadpo.convert.exporter import export_hf
from megadpo.convert.hf_files import INDEX, WHOLE
from megadpo.convert.pickles import INDEX_BIN, WHOLE_BIN
from megadpo.convert.to_checkpoint import import_hf
from megadpo.errors import MegadpoError, ModelError

CASES = 260
WRONG: list[Any] = [
    None,
    -1,
    0,
    1,
    3,
    7.5,
    float("nan"),
    "x",
    "",
    [],
    {},
    [[]],
    True,
    False,
    10**30,
    "../../etc/passwd",
]


def edit_json(path: Path, edit: Callable[[dict], Any]) -> None:
    values = json.loads(path.read_text())
    path.write_text(json.dumps(edit(values) or values))


def some_place(rng: random.Random, values: Any) -> tuple[Any, Any]:
    """A container somewhere inside a JSON value, and one of its keys."""
    while True:
        key = rng.choice(sorted(values)) if isinstance(values, dict) else rng.randrange(len(values))
        inner = values[key]
        if not isinstance(inner, dict | list) or not inner or rng.random() < 0.3:
            return values, key
        values = inner


def of_json(rng: random.Random, path: Path) -> None:
    """A field removed, replaced, doubled or misspelt; or the text itself broken."""
    text = path.read_text()
    kind = rng.choice(["remove", "replace", "rename", "text", "cut", "list", "deep", "bytes"])
    if kind == "text":
        at = rng.randrange(len(text))
        path.write_text(text[:at] + rng.choice(["", "}", '"', "\x00", "9", "\u2028", ","]) + text[at + 1 :])
    elif kind == "cut":
        path.write_text(text[: rng.randrange(len(text))])
    elif kind == "list":
        path.write_text(rng.choice(["[]", "null", "3", '"x"', "{}"]))
    elif kind == "deep":
        path.write_text("[" * 100_000)
    elif kind == "bytes":
        path.write_bytes(b"\xff\xfe" + text.encode())
    else:
        values = json.loads(text)
        inside, key = some_place(rng, values)
        value = inside[key]
        if kind == "replace":
            inside[key] = rng.choice(WRONG)
        elif isinstance(inside, list):
            inside.append(value)
        else:
            del inside[key]
            if kind == "rename":
                inside[key.upper() + "_"] = value
        path.write_text(json.dumps(values))


FIELDS = {
    "reward": ["architectures", "id2label", "num_labels", "dtype"],
    "moe": ["num_experts", "num_experts_per_tok", "moe_intermediate_size", "mlp_only_layers", "layer_types"],
    "fp8": ["quantization_config", "n_group", "topk_group", "kv_lora_rank", "q_lora_rank", "num_nextn_predict_layers"],
    "mxfp4": ["quantization_config", "num_local_experts", "layer_types", "sliding_window", "swiglu_limit", "dtype"],
}
"""What these models have and others do not."""


def of_fields(rng: random.Random, path: Path) -> None:
    """A field of the family's own with a value of a wrong type or out of range."""

    def edit(config: dict) -> None:
        field = rng.choice(FIELDS[path.parent.name.rpartition("-")[2]])
        config[field] = rng.choice(WRONG)
        if field == "num_labels":
            del config["id2label"]  # which would come first

    edit_json(path, edit)


def of_header(rng: random.Random, path: Path) -> None:
    """A safetensors header that says something else than is there."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    name = rng.choice([x for x in header if x != "__metadata__"])
    kind = rng.choice(["shape", "dtype", "offsets", "remove", "rename", "twice", "length", "not json", "metadata"])
    if kind == "shape":
        header[name]["shape"] = rng.choice([[], [-1, 64], [2**62, 4], [1.5], "x", [1] * 200, None])
    elif kind == "dtype":
        header[name]["dtype"] = rng.choice(["F64", "I8", "F8_E4M3", "x", 3, None, "BOOL", "F16"])
    elif kind == "offsets":
        header[name]["data_offsets"] = rng.choice([[0, 0], [5, 1], [0, 2**63], [-4, 0], [0], "x", [0, 1.5], None])
    elif kind == "remove":
        del header[name]
    elif kind == "rename":
        header[rng.choice(["", "x" * 10_000, "model.layers.99999999999.x", name + "\n", "../x"])] = header.pop(name)
    elif kind == "metadata":
        header["__metadata__"] = rng.choice([{}, [], {"a": 3}, None, {"format": "mlx"}])
    text = json.dumps(header).encode()
    if kind == "twice":
        text = text[:-1] + b"," + json.dumps({name: header[name]}).encode()[1:]
    if kind == "not json":
        text = rng.choice([b"", b"{", b"\x00" * 50, b"[]", text[:-1]])
    said = rng.choice([0, 7, 2**63, len(text) + 1, len(data) * 2]) if kind == "length" else len(text)
    path.write_bytes(struct.pack("<Q", said) + text + data[8 + length :])


def of_bytes(rng: random.Random, path: Path) -> None:
    """A file cut short, made longer, emptied, removed, replaced, or unreadable."""
    data = path.read_bytes()
    kind = rng.choice(["cut", "insert", "empty", "remove", "zeros", "folder", "pointer", "dangling"])
    path.unlink()
    if kind == "cut":
        path.write_bytes(data[: rng.randrange(len(data))])
    elif kind == "insert":
        at = rng.randrange(len(data))
        path.write_bytes(data[:at] + rng.randbytes(rng.randrange(1, 9)) + data[at:])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "zeros":
        path.write_bytes(bytes(len(data)))
    elif kind == "folder":
        path.mkdir()
    elif kind == "pointer":
        path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 10\n")
    elif kind == "dangling":
        path.symlink_to("nowhere")


def of_tensors(rng: random.Random, path: Path) -> None:
    """A tensor missing, extra, of another shape, dtype, or with NaN."""
    tensors = load_file(path)
    kind = rng.choice(["missing", "extra", "shape", "dtype", "nan", "empty", "flat"])
    name = rng.choice(sorted(x for x in tensors if kind != "nan" or tensors[x].is_floating_point()))
    values = tensors[name].clone()
    if kind == "missing":
        del tensors[name]
    elif kind == "extra":
        tensors["model.layers.77.mlp.up_proj.weight"] = values
    elif kind == "shape":
        tensors[name] = values[:-1].clone() if len(values) > 1 else torch.zeros(7)
    elif kind == "dtype":
        tensors[name] = values.to(rng.choice([torch.int8, torch.float64, torch.float8_e4m3fn, torch.bool]))
    elif kind == "nan":
        values.view(-1)[rng.randrange(values.numel())] = rng.choice([float("nan"), float("inf")])
        tensors[name] = values
    elif kind == "empty":
        tensors = {}
    else:
        tensors[name] = values.reshape(-1, 1).clone()
    save_file(tensors, path)


def of_index(rng: random.Random, path: Path) -> None:
    """An index that points elsewhere."""
    other = rng.choice(
        ["../x.safetensors", "/etc/passwd", "", ".", "config.json", 3, None, ["a"], "nowhere.safetensors"]
    )

    def edit(index: dict) -> None:
        index["weight_map"][rng.choice(sorted(index["weight_map"]))] = other

    edit_json(path, edit)


def of_bin(rng: random.Random, path: Path) -> None:
    """Bytes of a .bin file changed where it is not values, or the file cut."""
    data = bytearray(path.read_bytes())
    if rng.random() < 0.3:
        path.write_bytes(data[: rng.randrange(len(data))])
        return
    start = data.find(b"data.pkl")
    for _ in range(rng.randrange(1, 4)):  # in the pickle, or in the zip's directory at the end
        at = rng.choice([start + rng.randrange(3000), len(data) - 1 - rng.randrange(2000)])
        data[at] = rng.randrange(256)
    path.write_bytes(data)


def as_reward_model(folder: Path) -> None:
    tensors = load_file(folder / WHOLE)
    tensors["score.weight"] = tensors.pop("lm_head.weight")[:1].clone()
    save_file(tensors, folder / WHOLE)
    label = {"id2label": {"0": "reward"}, "label2id": {"reward": 0}}
    edit_json(folder / "config.json", lambda x: x | label | {"architectures": ["LlamaForSequenceClassification"]})


Models = dict[str, tuple[Path, dict[str, torch.Tensor]]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, shared: Path) -> Models:
    """One file, several files with an index, .bin, .bin with an index, a model with its tokenizer, a reward model, one
    with experts, one in FP8, one in MXFP4; and the tensors of each, decoded."""
    root = tmp_path_factory.mktemp("models")
    made = {"whole": write("llama3", root / "whole"), "index": write("biases", root / "index")}
    for name, source, files in (("bin", "whole", 1), ("bins", "index", 3)):
        made[name] = Path(shutil.copytree(made[source], root / name))
        as_bin(made[name], files)
    made["reward"] = Path(shutil.copytree(made["whole"], root / "reward"))
    as_reward_model(made["reward"])
    made["moe"] = families_table.write("qwen3_moe", root / "moe")
    meaning = {"bin": weights(made["whole"]), "bins": weights(made["index"])}
    for name, family in (("fp8", "deepseek_v3"), ("mxfp4", "gpt_oss")):
        quantise, changes = QUANTISED[family]
        made[name] = families_table.write(family, root / name, **changes)
        meaning[name] = quantise(made[name])
    made["tokenizer"] = shared / "models" / STORIES
    return {name: (folder, meaning.get(name) or weights(folder)) for name, folder in made.items()}


def damage(name: str, folder: Path, rng: random.Random) -> str:
    """Do one thing to the folder; what it was."""
    files = {
        "whole": {of_json: ["config.json"], of_header: [WHOLE], of_bytes: [WHOLE, "config.json"], of_tensors: [WHOLE]},
        "index": {
            of_json: ["config.json", INDEX],
            of_header: ["model-00002-of-00011.safetensors"],
            of_bytes: [INDEX, "model-00003-of-00011.safetensors"],
            of_tensors: ["model-00004-of-00011.safetensors"],
            of_index: [INDEX],
        },
        "bin": {of_bin: [WHOLE_BIN], of_bytes: [WHOLE_BIN]},
        "bins": {of_json: [INDEX_BIN], of_bin: ["pytorch_model-00002-of-00003.bin"], of_bytes: [INDEX_BIN]},
        "tokenizer": {
            of_json: ["tokenizer.json", "tokenizer_config.json", "generation_config.json"],
            of_bytes: ["tokenizer.json", "tokenizer_config.json", "tokenizer.model"],
        },
        **{
            name: {of_json: ["config.json"], of_fields: ["config.json"], of_header: [WHOLE], of_tensors: [WHOLE]}
            for name in FIELDS
        },
    }[name]
    kind = rng.choice(list(files))
    file = rng.choice(files[kind])
    kind(rng, folder / file)
    return f"{kind.__name__} {file}"


def test_a_tensors_endless_name_is_cut(folders: Models, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders["index"][0], tmp_path / "model"))
    file = folder / "model-00002-of-00011.safetensors"
    save_file(load_file(file) | {"x" * 10_000 + "\n": torch.zeros(1)}, file)
    with pytest.raises(ModelError, match="does not name it") as error:
        import_hf(folder, tmp_path / "out")
    assert len(str(error.value)) < 1000
    assert "\n" not in str(error.value)


def test_accidents(folders: Models, tmp_path: Path) -> None:
    """All that do harm are refused, of every kind of folder some, at least 100 in all."""
    refused, wrong = Counter[str](), []
    for seed in range(CASES):
        rng = random.Random(seed)
        name = rng.choice(sorted(folders))
        source, whole = folders[name]
        folder, out = tmp_path / f"{seed}-{name}", tmp_path / f"{seed}-out"
        shutil.copytree(source, folder)
        for file in [folder, *folder.iterdir()]:
            file.chmod(0o755)
        case = f"{seed}: {name}: {damage(name, folder, rng)}"
        try:
            import_hf(folder, out)
            export_hf(out, out, tmp_path / f"{seed}-hf")
            if not same(weights(tmp_path / f"{seed}-hf"), whole):
                wrong.append(f"{case}: imported with other weights")
        except MegadpoError as error:
            refused[name] += 1
            if "\n" in str(error) or len(str(error)) > 1000 or str(folder) not in str(error):
                wrong.append(f"{case}: {error!r}")
        except BaseException as error:
            wrong.append(f"{case}: {type(error).__name__}: {error}")
        left = {x.name.removeprefix(str(seed)) for x in tmp_path.iterdir()}
        if left not in ({f"-{name}"}, {f"-{name}", "-out", "-hf"}):
            wrong.append(f"{case}: left {left}")
        for used in tmp_path.iterdir():
            shutil.rmtree(used)
    assert wrong == []
    assert refused.keys() == folders.keys()
    assert 100 <= refused.total() < CASES  # some accidents do no harm
