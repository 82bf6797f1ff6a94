"""`megadpo import` and back: bit-equal, from any grid, streaming, and complete or not there at all."""

import json
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from distributed import run_ranks
from llamas import MODELS, write
from safetensors.torch import load_file, save_file
from test_round_trip import GRIDS, NAMES, STORIES, every_token, forward, judge, tokens, weights
from tiny import write_llama

from megadpo.config import ModelConfig, ParallelConfig
from megadpo.convert import out_folder
from megadpo.convert.exporter import export_hf
from megadpo.convert.families import read_shape
from megadpo.convert.hf_files import INDEX, WHOLE, HFFiles, weights_digest, weights_warnings
from megadpo.convert.importer import check_hf, load_hf
from megadpo.convert.pickles import INDEX_BIN, WHOLE_BIN
from megadpo.convert.small_files import small_files
from megadpo.convert.to_checkpoint import import_hf
from megadpo.errors import CheckpointError, MegadpoError, ModelError, StorageError, TokenizerError

MB = 2**20


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, shared: Path) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: write(name, root / name) for name in MODELS} | {STORIES: shared / "models" / STORIES}


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory, folders: dict[str, Path]) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("imported")
    for name, folder in folders.items():
        import_hf(folder, root / name)
    return {name: root / name for name in folders}


@pytest.fixture
def source(folders: dict[str, Path], tmp_path: Path) -> Path:
    """A model in one file, to be changed."""
    return Path(shutil.copytree(folders["llama3"], tmp_path / "source"))


def refused(folder: Path, out: Path, kind: type[MegadpoError] = ModelError, **options: Any) -> str:
    """The one line of an import that was refused, after which nothing is left."""
    with pytest.raises(kind) as error:
        import_hf(folder, out, **options)
    assert not out.exists()
    assert not out.with_name(out.name + ".partial").exists()
    assert "\n" not in str(error.value)
    return str(error.value)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


# ---- both ways


@pytest.mark.parametrize("model", NAMES)
def test_import_and_export_give_the_folder_back(
    model: str, folders: dict[str, Path], imported: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    export_hf(imported[model], imported[model], out, max_shard_bytes=90_000)
    assert same(weights(out), weights(folders[model]))
    for file in folders[model].iterdir():
        if file.suffix != ".safetensors" and file.name != INDEX:
            assert (out / file.name).read_bytes() == file.read_bytes()


@torch.no_grad()
def load_on_grids(device: torch.device, folders: dict[str, Path], grids: list[str]) -> dict[tuple, Any]:
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    from megadpo.model.build import build_chunks
    from megadpo.parallel.context import grid

    results: dict[tuple, Any] = {}
    for name in grids:
        parallel = GRIDS[name]
        with grid(parallel, device, seed=0) as context:
            for model, folder in folders.items():
                shape = read_shape(folder)
                batch = every_token(tokens(shape.vocab_size), shape.vocab_size)
                chunks = build_chunks(shape, parallel, context, ModelConfig("", "float32"))
                for chunk in chunks:
                    for p in chunk.parameters():
                        p.fill_(float("nan"))
                load_hf(chunks, shape, folder)
                # Megatron-Core reads the folder itself, and finds the same values.
                mine = [{key: p.clone() for key, p in chunk.named_parameters()} for chunk in chunks]
                metadata = dist_checkpointing.load_content_metadata(str(folder))
                state = {
                    f"model{i}": {
                        key: entry
                        for key, entry in chunk.sharded_state_dict(metadata=metadata).items()
                        if not isinstance(entry, ShardedObject)  # _extra_state of FP8, which no import has
                    }
                    for i, chunk in enumerate(chunks)
                }
                for chunk in chunks:
                    for p in chunk.parameters():
                        p.fill_(float("nan"))
                read = dist_checkpointing.load(state, str(folder))
                for i, chunk in enumerate(chunks):
                    chunk.load_state_dict(read[f"model{i}"], strict=False)
                theirs = [dict(chunk.named_parameters()) for chunk in chunks]
                results[model, name] = {
                    "logprobs": forward(chunks, context, batch, shape.vocab_size),
                    "different": [
                        k for a, b in zip(mine, theirs, strict=True) for k in a if not torch.equal(a[k], b[k])
                    ],
                }
    return results


def test_any_grid_starts_from_an_imported_folder(folders: dict[str, Path], imported: dict[str, Path]) -> None:
    """Through our reader (slices) and through Megatron-Core's: the same parameters, and transformers' numbers."""
    chosen = {name: imported[name] for name in ("llama3", "tied", "biases")}
    judged = {name: judge(folders[name]) for name in chosen}
    for world in (1, 4):
        names = ["TP1"] if world == 1 else ["TP2 PP2", "TP4"]
        for rank in run_ranks(world, load_on_grids, chosen, names):
            for (model, _), found in rank.items():
                assert found["different"] == []
                if found["logprobs"] is not None:
                    assert (found["logprobs"] - judged[model]).abs().max() < 1e-4


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dtype_of_import_and_export(dtype: str, folders: dict[str, Path], tmp_path: Path) -> None:
    import_hf(folders["llama3"], tmp_path / "in", dtype=dtype)
    export_hf(tmp_path / "in", tmp_path / "in", tmp_path / "out", dtype=dtype)
    kind = getattr(torch, dtype)
    assert same(weights(tmp_path / "out"), {n: x.to(kind) for n, x in weights(folders["llama3"]).items()})
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype


def test_values_beyond_float16(source: Path, tmp_path: Path) -> None:
    tensors = load_file(source / WHOLE)
    tensors["model.norm.weight"][3] = 1e6
    save_file(tensors, source / WHOLE)
    message = refused(source, tmp_path / "out", dtype="float16")
    assert (
        "decoder.final_layernorm.weight has values beyond the range of torch.float16; use --dtype bfloat16" in message
    )


def test_several_processes_write_the_same(folders: dict[str, Path], tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    import_hf(folders["biases"], tmp_path / "in", processes=2, progress=lambda done, total: seen.append((done, total)))
    assert len(list((tmp_path / "in").glob("*.distcp"))) == 2
    assert seen[-1][0] == seen[-1][1] > 0
    export_hf(tmp_path / "in", tmp_path / "in", tmp_path / "out")
    assert same(weights(tmp_path / "out"), weights(folders["biases"]))


@pytest.mark.slow
def test_several_processes_export_the_same_and_stop_together(
    folders: dict[str, Path], imported: dict[str, Path], source: Path, tmp_path: Path
) -> None:
    folder, seen = imported["biases"], []
    export_hf(
        folder, folder, tmp_path / "out", None, 90_000, lambda done, total: seen.append((done, total)), processes=2
    )
    assert seen[-1][0] == seen[-1][1] > 0
    assert same(weights(tmp_path / "out"), weights(folders["biases"]))
    tensors = load_file(source / WHOLE)
    tensors["lm_head.weight"][3] = float("nan")
    save_file(tensors, source / WHOLE)
    assert "lm_head.weight has NaN or Inf" in refused(source, tmp_path / "bad", processes=2)


def test_a_large_tensor_is_cut_into_chunks(folders: dict[str, Path], tmp_path: Path, monkeypatch: Any) -> None:
    from megadpo.convert import imported as format_
    from megadpo.convert.torch_dist import TorchDist

    monkeypatch.setattr(format_, "CHUNK_BYTES", 4000)
    import_hf(folders["tied"], tmp_path / "in")
    assert len(TorchDist(tmp_path / "in").tensors["embedding.word_embeddings.weight"].chunks) == 9  # 131 rows by 15
    export_hf(tmp_path / "in", tmp_path / "in", tmp_path / "out")
    assert same(weights(tmp_path / "out"), weights(folders["tied"]))


# ---- memory


@contextmanager
def anonymous_peak() -> Iterator[SimpleNamespace]:
    """Bytes of anonymous memory of this process over what it had at first, at most, looked at every millisecond.
    Pages of mapped files are the page cache's and do not count."""

    def now() -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.split("RssAnon:")[1].split()[0]) * 1024

    before, found, done = now(), SimpleNamespace(peak=0), threading.Event()

    def watch() -> None:
        while not done.wait(0.001):
            found.peak = max(found.peak, now() - before)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
        found.peak = max(found.peak, now() - before)
    finally:
        done.set()
        thread.join()


@torch.no_grad()
def measure_load(device: torch.device, folders: list[Path]) -> list[tuple[int, int]]:
    """(peak bytes, bytes of this rank's parameters) of filling this rank's half, for each folder."""
    from megadpo.model.build import build_chunks
    from megadpo.parallel.context import grid

    found = []
    with grid(ParallelConfig(2), device, seed=0) as context:
        for folder in folders:
            shape = read_shape(folder)
            with anonymous_peak() as memory:
                chunks = build_chunks(shape, ParallelConfig(2), context, ModelConfig("", "float32"))
                load_hf(chunks, shape, folder)
            found.append((memory.peak, sum(p.nbytes for p in chunks[0].parameters())))
            del chunks
    return found


def measure_conversion(device: torch.device, folder: Path, out: Path) -> tuple[int, int]:
    with anonymous_peak() as importing:
        import_hf(folder, out / "in")
    with anonymous_peak() as exporting:
        export_hf(out / "in", out / "in", out / "out")
    return importing.peak, exporting.peak


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc to see a process's memory")
def test_a_rank_needs_its_shard_and_one_tensor(tmp_path: Path) -> None:
    """A model of 130 MB whose largest tensor has 33: its ranks at tensor 2 stay under half of it + one tensor, from
    safetensors, from .bin and from an imported folder; import and export themselves never hold a shard of it."""
    folder = write_llama(tmp_path / "hf", layers=4, hidden=512, ffn=2048, heads=8, groups=8, vocab=16000)
    pickled = tmp_path / "bin"
    pickled.mkdir()
    shutil.copy(folder / "config.json", pickled)
    torch.save(load_file(folder / WHOLE), pickled / WHOLE_BIN)
    tensor = 16000 * 512 * 4
    [(importing, exporting)] = run_ranks(1, measure_conversion, folder, tmp_path)
    slack = 12 * MB  # Python, allocator, code that is first used here
    assert importing < 2 * 32 * MB + slack  # one chunk as read, and as written
    assert exporting < 2 * tensor + slack  # one tensor as stored, and as written
    for rank in run_ranks(2, measure_load, [folder, pickled, tmp_path / "in"]):
        for peak, shard in rank:
            assert shard > 60 * MB
            assert peak < shard + tensor + slack
            assert shard + tensor + slack < (folder / WHOLE).stat().st_size  # so that reading it whole would fail


# ---- .bin


def as_bin(folder: Path, files: int = 1) -> dict[str, torch.Tensor]:
    """Turn a folder's safetensors into .bin files; gives the tensors."""
    tensors = weights(folder)
    for file in [*folder.glob("*.safetensors"), *folder.glob("*.index.json")]:
        file.unlink()
    names = [f"pytorch_model-{i + 1:05d}-of-{files:05d}.bin" for i in range(files)] if files > 1 else [WHOLE_BIN]
    where = {name: names[i % files] for i, name in enumerate(tensors)}
    for file in names:
        torch.save({name: x for name, x in tensors.items() if where[name] == file}, folder / file)
    if files > 1:
        (folder / INDEX_BIN).write_text(json.dumps({"weight_map": where}))
    return tensors


@pytest.mark.parametrize("files", [1, 3])
def test_bin_files_are_read_and_warned_of(files: int, source: Path, tmp_path: Path) -> None:
    digest = weights_digest(source)
    tensors = as_bin(source, files)
    [warning, _] = import_hf(source, tmp_path / "in")
    assert "has no safetensors, so its .bin files are read (weights only, no code is run)" in warning
    assert weights_warnings(tmp_path / "in") == []
    export_hf(tmp_path / "in", tmp_path / "in", tmp_path / "out")
    assert same(weights(tmp_path / "out"), tensors)
    before = weights_digest(source)
    assert before != digest
    tensors["model.norm.weight"][32] += 1
    if files == 1:
        torch.save(tensors, source / WHOLE_BIN)
        assert weights_digest(source) != before


def test_safetensors_come_before_bin(source: Path) -> None:
    torch.save({"other": torch.zeros(1)}, source / WHOLE_BIN)
    assert HFFiles(source).source == WHOLE
    assert weights_warnings(source) == []
    check_hf(read_shape(source), source)


class RunsCode:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.marker),)


def test_unsafe_pickle_is_refused_and_runs_nothing(source: Path, tmp_path: Path) -> None:
    tensors, marker = as_bin(source), tmp_path / "code was run"
    torch.save(tensors | {"x": RunsCode(marker)}, source / WHOLE_BIN)
    message = refused(source, tmp_path / "out")
    assert (
        f"{source / WHOLE_BIN}: names posix.mkdir, which no weights need and which could run code: refused" in message
    )
    assert not marker.exists()
    torch.load(source / WHOLE_BIN, weights_only=False)
    assert marker.exists()  # the file does what it says to those who let it


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ([torch.zeros(1)], "holds a list, not weights by name"),
        ({}, "holds a dict, not weights by name"),
        ({"model": {"a": torch.zeros(1)}}, "'model' is no tensor"),
        ({"a": "sparse"}, "a is sparse or quantised"),
        ({"model.norm.weight": torch.zeros(64, dtype=torch.int8)}, "missing: lm_head.weight"),
    ],
)
@pytest.mark.filterwarnings("ignore:Sparse")
def test_bin_files_that_are_no_weights(content: Any, expected: str, source: Path, tmp_path: Path) -> None:
    as_bin(source)
    if content == {"a": "sparse"}:
        content = {"a": torch.eye(3).to_sparse()}
    torch.save(content, source / WHOLE_BIN)
    assert expected in refused(source, tmp_path / "out")


@pytest.mark.parametrize("keep", [0, 100, 50_000, -10])
def test_truncated_bin(keep: int, source: Path, tmp_path: Path) -> None:
    as_bin(source)
    (source / WHOLE_BIN).write_bytes((source / WHOLE_BIN).read_bytes()[:keep])
    message = refused(source, tmp_path / "out")
    assert f"{source / WHOLE_BIN}: is " in message
    assert "damaged" in message


def test_bin_of_the_old_format(source: Path, tmp_path: Path) -> None:
    torch.save(as_bin(source), source / WHOLE_BIN, _use_new_zipfile_serialization=False)
    assert "is no zip archive, as torch has written since 1.6" in refused(source, tmp_path / "out")


@pytest.mark.parametrize("file", ["../x.bin", "/etc/passwd", "x.safetensors"])
def test_bin_index_that_points_elsewhere(file: str, source: Path, tmp_path: Path) -> None:
    as_bin(source, 2)
    index = json.loads((source / INDEX_BIN).read_text())
    index["weight_map"]["model.norm.weight"] = file
    (source / INDEX_BIN).write_text(json.dumps(index))
    message = refused(source, tmp_path / "out")
    assert f"model.norm.weight is said to be in {file!r}; must be the name of a .bin file in the same folder" in message


# ---- what stands beside the weights


def test_folder_of_the_hub_cache(source: Path, tmp_path: Path) -> None:
    """snapshots/REVISION holds links to blobs beside it; they are read, and copied as files."""
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (source / "LICENSE").write_text("free")
    for number, file in enumerate(sorted(source.iterdir())):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    import_hf(snapshot, tmp_path / "in")
    assert (tmp_path / "in" / "LICENSE").read_text() == "free"
    assert [x for x in (tmp_path / "in").iterdir() if x.is_symlink()] == []


def test_link_out_of_the_folder_is_not_followed(source: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("of this machine")
    (source / "LICENSE").symlink_to(tmp_path / "secret")
    message = refused(source, tmp_path / "out")
    assert f"{source / 'LICENSE'}: is a link to {tmp_path / 'secret'}, outside the folder" in message


def test_weights_may_lie_elsewhere(source: Path, tmp_path: Path) -> None:
    (source / WHOLE).rename(tmp_path / "weights")
    (source / WHOLE).symlink_to(tmp_path / "weights")
    import_hf(source, tmp_path / "in")


def test_python_files_only_where_an_auto_map_names_them(source: Path) -> None:
    for name in ("modeling_x.py", "tokenization_x.py", "setup.py"):
        (source / name).write_text("raise SystemExit")
    assert [name for name in small_files(source) if name.endswith(".py")] == []
    config = {"auto_map": {"AutoTokenizer": ["tokenization_x.XTokenizer", None], "Other": "repo--modeling_x.X"}}
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    assert [name for name in small_files(source) if name.endswith(".py")] == ["tokenization_x.py"]


def test_model_that_is_defined_by_its_own_code(source: Path, tmp_path: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_x.X"}
    (source / "config.json").write_text(json.dumps(config))
    (source / "modeling_x.py").write_text(f"open({str(tmp_path / 'code was run')!r}, 'w')")
    assert "trust_remote_code is never used" in refused(source, tmp_path / "out")
    assert not (tmp_path / "code was run").exists()


def test_tokenizer_larger_than_the_vocabulary(source: Path, shared: Path, tmp_path: Path) -> None:
    shutil.copyfile(shared / "models" / STORIES / "tokenizer.model", source / "tokenizer.model")
    message = refused(source, tmp_path / "out", TokenizerError)
    assert "the tokenizer has ids up to 511, but the model's vocabulary has only 128" in message


def test_broken_tokenizer(source: Path, tmp_path: Path) -> None:
    (source / "tokenizer.json").write_text("{}")
    refused(source, tmp_path / "out", TokenizerError)


def test_unknown_architecture_names_the_known(source: Path, tmp_path: Path) -> None:
    path = source / "config.json"
    path.write_text(path.read_text().replace("LlamaForCausalLM", "MambaForCausalLM"))
    message = refused(source, tmp_path / "out")
    assert '["MambaForCausalLM"]; supported: one of ' in message
    assert "LlamaForCausalLM" in message


# ---- the folder that is written


def test_output_that_is_not_empty(folders: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("keep")
    with pytest.raises(StorageError, match="out exists and is not an empty folder: give a new path for the import"):
        import_hf(folders["llama3"], out)
    assert [x.name for x in out.iterdir()] == ["mine"]
    (out / "mine").unlink()
    import_hf(folders["llama3"], out)


def test_too_little_space_is_seen_before_writing(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(out_folder.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    needed = sum(x.nbytes for x in weights(folders["llama3"]).values())
    message = refused(folders["llama3"], tmp_path / "out", StorageError)
    found = int(message.split("the import needs ")[1].split()[0])
    assert needed < found < needed + 5000  # and config.json
    assert "1000 are free there" in message


def test_killed_halfway_it_leaves_only_partial(folders: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"

    def die(done: int, total: int) -> None:
        if done * 2 > total:
            os.kill(os.getpid(), signal.SIGKILL)

    for action in (
        lambda: import_hf(folders["llama3"], out, progress=die),
        lambda: export_hf(tmp_path / "in", tmp_path / "in", out, progress=die),
    ):
        child = os.fork()
        if child == 0:
            action()
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        assert not out.exists()
        assert (tmp_path / "out.partial").is_dir()
        if not (tmp_path / "in").exists():
            import_hf(folders["llama3"], tmp_path / "in")
    export_hf(tmp_path / "in", tmp_path / "in", out)
    assert not (tmp_path / "out.partial").exists()


def test_modes_are_what_umask_says(folders: dict[str, Path], tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        import_hf(folders["llama3"], tmp_path / "in")
    finally:
        os.umask(before)
    assert {x.stat().st_mode & 0o777 for x in (tmp_path / "in").iterdir()} == {0o640}


def test_imported_folder_is_not_imported_again(imported: dict[str, Path], tmp_path: Path) -> None:
    assert "was written by megadpo import already" in refused(imported["llama3"], tmp_path / "out")


def test_damaged_imported_folder(imported: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(imported["llama3"], tmp_path / "in"))
    digest = weights_digest(folder)
    file = folder / "__0_0.distcp"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert weights_digest(folder) != digest
    file.write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match="the file is cut off or damaged"):
        export_hf(folder, folder, tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}))
    with pytest.raises(CheckpointError, match=r"not part of that model: decoder\.layers\.4"):
        check_hf(read_shape(folder), folder)
