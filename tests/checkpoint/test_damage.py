"""Damaged and hostile checkpoints: noticed before a tensor is used, named by file, and no code of theirs runs."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from distributed import run_ranks
from tiny import random_groups, write_llama
from train.engine import Case, build

from megadpo import checkpoint
from megadpo.checkpoint.folder import Saved, _checksum, begin, damage, finish, hashed, keep_newest, read_manifest
from megadpo.cli import main
from megadpo.data.packing import Budget
from megadpo.errors import CheckpointError
from megadpo.parallel.context import grid
from megadpo.train.step import train_step

VOCAB = 67


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = write_llama(tmp_path_factory.mktemp("model") / "llama", vocab=VOCAB, tied=True)
    return Case(folder, random_groups(13, vocab=VOCAB), distributed=True, budget=Budget(64), batch=5)


def save_two(device: torch.device, case: Case, run_dir: Path) -> None:
    """Checkpoints of step 1 and 2."""
    with grid(case.parallel, device, 0) as context:
        state, stream = build(case, context)
        column = np.zeros(len(case.store.response_lengths), dtype=np.float32)
        for _ in range(2):
            batches = stream.batches(stream.next_groups(state.consumed, case.batch), context.data_rank, column)
            train_step(state, batches, case.objective, None, context)
            checkpoint.save(state, run_dir, 10, 2, context)


@pytest.fixture(scope="module")
def whole_run(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("run")
    run_ranks(2, save_two, case, run_dir)
    return run_dir


@pytest.fixture
def run_dir(whole_run: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole_run, tmp_path / "run")
    return tmp_path / "run"


def resume(device: torch.device, case: Case, *run_dirs: Path) -> list[tuple[str, int, list[str]]]:
    """For each: (where it went on or the error, the step, what was told)"""
    found = []
    with grid(case.parallel, device, 0) as context:
        state, _ = build(case, context)
        for run_dir in run_dirs:
            told: list[str] = []
            state.step = 0
            try:
                folder = checkpoint.resume(state, run_dir, told.append)
                found.append((folder.name if folder else "nowhere", state.step, told))
            except CheckpointError as error:
                found.append((str(error), state.step, told))
    return found


# ---- damage


def edit(path: Path, change: Callable[[bytearray], object]) -> None:
    data = bytearray(path.read_bytes())
    change(data)
    path.write_bytes(data)


def flip(data: bytearray) -> None:
    data[len(data) // 2] ^= 1


def zero_page(data: bytearray) -> None:
    data[512:4608] = bytes(len(data[512:4608]))


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.distcp"), key=lambda path: -path.stat().st_size)


def swap(folder: Path) -> None:
    one, other, *_ = shards(folder)
    data = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(data)


def from_another(folder: Path) -> None:
    """The same shard of the step before: right size, valid, wrong time."""
    name = shards(folder)[0].name
    shutil.copyfile(folder.with_name("step-00000001") / name, folder / name)


def state_of(**changed: object) -> Callable[[Path], object]:
    """state.json with these values, and a manifest that fits it: what a fault of the writer's would leave."""

    def harm(folder: Path) -> None:
        state = json.loads((folder / "state.json").read_text())
        (folder / "state.json").write_text(json.dumps(state | changed))
        reseal(folder)

    return harm


def folder_for_shard(folder: Path) -> None:
    shard = shards(folder)[0]
    shard.unlink()
    shard.mkdir()


DAMAGE: dict[str, Callable[[Path], object]] = {
    "bit flip in a shard": lambda folder: edit(shards(folder)[0], flip),
    "bit flip in the smallest shard": lambda folder: edit(shards(folder)[-1], flip),
    "zero page": lambda folder: edit(shards(folder)[0], zero_page),
    "shard cut off": lambda folder: os.truncate(shards(folder)[0], 1000),
    "empty shard": lambda folder: os.truncate(shards(folder)[0], 0),
    "shard too long": lambda folder: edit(shards(folder)[0], lambda data: data.extend(b"more")),
    "missing shard": lambda folder: shards(folder)[0].unlink(),
    "swapped shards": swap,
    "shard of another step": from_another,
    "empty .metadata": lambda folder: os.truncate(folder / ".metadata", 0),
    "bit flip in .metadata": lambda folder: edit(folder / ".metadata", flip),
    "missing .metadata": lambda folder: (folder / ".metadata").unlink(),
    "bit flip in common.pt": lambda folder: edit(folder / "common.pt", flip),
    "missing metadata.json": lambda folder: (folder / "metadata.json").unlink(),
    "another step in state.json": lambda folder: edit(
        folder / "state.json", lambda data: data.__setitem__(slice(None), data.replace(b'"step": 2', b'"step": 3'))
    ),
    "empty manifest": lambda folder: os.truncate(folder / "manifest.json", 0),
    "missing manifest": lambda folder: (folder / "manifest.json").unlink(),
    "a file left out of the manifest": lambda folder: edit(
        folder / "manifest.json",
        lambda data: data.__setitem__(slice(None), data.replace(b'"common.pt"', b'"other.pt"')),
    ),
    "a folder instead of a shard": folder_for_shard,
    "the state of another step, with its manifest": state_of(step=3),
    "a step below 0": state_of(step=-1),
    "a step that is text": state_of(step="2"),
    "a place that is no whole number": state_of(consumed=2.5),
    "true for a number": state_of(total_steps=True),
    "a place beyond all data": state_of(consumed=10**300),
    "more batches skipped than done": state_of(skipped=3),
    "a state that lacks a number": lambda folder: (
        (folder / "state.json").write_text('{"step": 2, "consumed": 10}'),
        reseal(folder),
    ),
    "a state without a bottom": lambda folder: ((folder / "state.json").write_text("[" * 100_000), reseal(folder)),
}


def test_every_damage_is_noticed_and_the_checkpoint_before_is_taken(
    case: Case, whole_run: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    record_property("kinds", len(DAMAGE))
    for number, harm in enumerate(DAMAGE.values()):
        shutil.copytree(whole_run, tmp_path / str(number))
        harm(tmp_path / str(number) / "checkpoints" / "step-00000002")
    [found] = run_ranks(1, resume, case, *(tmp_path / str(number) for number in range(len(DAMAGE))))
    for number, (name, (folder, step, told)) in enumerate(zip(DAMAGE, found, strict=True)):
        assert (folder, step) == ("step-00000001", 1), name
        assert len(told) == 1, name
        assert told[0].startswith("WARNING"), name
        assert "step-00000002/" in told[0], f"{name}: the file is named"
        assert "\n" not in told[0], name
        names = {path.name for path in (tmp_path / str(number) / "checkpoints").glob("step-*")}
        assert names == {"step-00000001", "step-00000002.damaged"}, name


def test_two_ranks_agree(case: Case, run_dir: Path) -> None:
    """Each reads half of the files; the damage that one sees counts for both."""
    edit(shards(run_dir / "checkpoints" / "step-00000002")[0], flip)
    found = run_ranks(2, resume, case, run_dir)
    assert [(name, step) for [(name, step, _)] in found] == [("step-00000001", 1)] * 2


def test_nothing_whole_is_left(case: Case, run_dir: Path) -> None:
    """Never a silent start from the beginning, neither now nor at the next try."""
    for folder in checkpoint.checkpoints(run_dir):
        edit(shards(folder)[0], flip)
    [found] = run_ranks(1, resume, case, run_dir, run_dir)
    for message, step, _ in found:
        assert "so are all 2 checkpoints" in message
        assert step == 0
    assert len(checkpoint.checkpoints(run_dir)) == 2


def test_verify_on_the_command_line(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "verify", str(run_dir)]) == 0
    assert capsys.readouterr().out.count(": whole") == 2
    newest = run_dir / "checkpoints" / "step-00000002"
    assert main(["checkpoint", "verify", str(newest)]) == 0
    shard = shards(newest)[0]
    edit(shard, flip)
    capsys.readouterr()
    assert main(["checkpoint", "verify", str(run_dir)]) == 2
    output = capsys.readouterr()
    assert f"{shard}: damaged: its SHA-256 is not the one that was written" in output.out
    assert output.out.count(": whole") == 1
    assert output.err.count("\n") == 1
    assert main(["checkpoint", "verify", str(run_dir / "nowhere")]) == 2
    assert "is neither a checkpoint nor a run folder with one" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_not_exported(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run_dir / "run.yaml").write_text("run_dir: r\nmodel: {path: m}\ndata: {train: d}\n")
    edit(shards(run_dir / "checkpoints" / "step-00000002")[0], flip)
    assert main(["export", str(run_dir), str(run_dir / "hf")]) == 2
    assert "SHA-256" in capsys.readouterr().err
    assert not (run_dir / "hf").exists()


# ---- what a process that died leaves


def test_a_save_over_a_whole_checkpoint_keeps_it(tmp_path: Path) -> None:
    """There is no instant without the checkpoint of that step."""
    folder = tmp_path / "checkpoints" / "step-00000001"
    finish(begin(folder), folder, Saved(1, 1, 10))
    before = (folder / "manifest.json").stat().st_ino
    finish(begin(folder), folder, Saved(1, 1, 10))
    assert (folder / "manifest.json").stat().st_ino == before
    edit(folder / "state.json", flip)
    finish(begin(folder), folder, Saved(1, 1, 10))
    assert not checkpoint.damage(folder)
    assert (folder.parent / "step-00000001.damaged").is_dir()


def test_leftovers_go_and_count_for_nothing(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    for name in ("step-00000009.partial", "step-00000001.removed.partial", "step-00000007.damaged", "step-x", "other"):
        (root / name).mkdir(parents=True)
        (root / name / "state.json").write_text('{"step": 9, "consumed": 9, "total_steps": 9}')
    (root / "latest").write_text("nonsense")
    assert checkpoint.checkpoints(tmp_path) == []
    folder = root / "step-00000002"
    finish(begin(folder), folder, Saved(2, 1, 10))
    keep_newest(tmp_path, 1)
    assert sorted(path.name for path in root.iterdir()) == [
        "latest",
        "other",
        "step-00000002",
        "step-00000007.damaged",
        "step-x",
    ]
    assert (root / "latest").read_text() == "step-00000002\n"


# ---- hostile


class Hostile:
    """Runs code where it is unpickled."""

    def __init__(self, note: Path) -> None:
        self.note = note

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.note),)


def reseal(folder: Path) -> None:
    """A stranger who changes files writes the manifest too."""
    files = hashed(folder, sorted(set(read_manifest(folder))))
    text = {"files": {name: vars(entry) for name, entry in files.items()}, "sha256": _checksum(files)}
    (folder / "manifest.json").write_text(json.dumps(text))


def attack(device: torch.device, case: Case, whole: Path, scratch: Path) -> list[tuple[str, str]]:
    """Every file of a checkpoint as a hostile pickle, bare and inside torch.save; loaded by every way that we have."""
    source = whole / "checkpoints" / "step-00000002"
    said = []
    with grid(case.parallel, device, 0) as context:
        state, _ = build(case, context)
        for number, name in enumerate(sorted(read_manifest(source))):
            for wrapped in (False, True):
                folder = scratch / f"{number}-{wrapped}" / "checkpoints" / source.name
                shutil.copytree(source, folder)
                hostile = Hostile(scratch / f"ran-{number}-{wrapped}")
                with (folder / name).open("wb") as file:
                    if wrapped:
                        torch.save(hostile, file)
                    else:
                        pickle.dump(hostile, file)
                reseal(folder)
                assert not checkpoint.damage(folder) or name == "state.json", "the manifest fits"
                for way, target in ((checkpoint.load, state), (checkpoint.load_weights, state.modules)):
                    try:
                        way(target, folder)
                        said.append((name, "loaded"))
                    except CheckpointError as error:
                        said.append((name, str(error)))
    return said


def test_no_file_of_a_hostile_checkpoint_runs_code(
    case: Case,
    whole_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, object], None],
) -> None:
    """Even where the user's environment asks torch to load everything."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    [said] = run_ranks(1, attack, case, whole_run, tmp_path)
    assert not list(tmp_path.glob("ran-*"))
    record_property("loads", len(said))
    refused = {name for name, text in said if text != "loaded"}
    assert {".metadata", "common.pt", "metadata.json", "state.json"} <= refused
    assert any(name.endswith(".distcp") for name in refused)
    assert all("\n" not in text for _, text in said)


def test_the_hostile_pickle_would_run(tmp_path: Path) -> None:
    """What the test above shows is not that the pickle is harmless."""
    pickle.loads(pickle.dumps(Hostile(tmp_path / "ran")))
    assert (tmp_path / "ran").is_dir()


def leave(device: torch.device, case: Case, folder: Path, place: str) -> str:
    """A .metadata that sends the reader to a file outside the folder."""
    with (folder / ".metadata").open("rb") as file:
        found = pickle.load(file)
    for info in found.storage_data.values():
        info.relative_path = place
    (folder / ".metadata").write_bytes(pickle.dumps(found))
    reseal(folder)
    with grid(case.parallel, device, 0) as context:
        state, _ = build(case, context)
        with pytest.raises(CheckpointError) as caught:
            checkpoint.load(state, folder)
    return str(caught.value)


@pytest.mark.parametrize("place", ["../../../outside.distcp", "/etc/passwd"])
def test_metadata_that_leaves_the_folder(case: Case, run_dir: Path, place: str) -> None:
    [message] = run_ranks(1, leave, case, run_dir / "checkpoints" / "step-00000002", place)
    assert "which is no file of it" in message


@pytest.mark.parametrize("name", ["manifest.json", "state.json"])
def test_a_pipe_is_no_file(tmp_path: Path, name: str) -> None:
    """Read, it would be waited for without an end."""
    folder = tmp_path / "checkpoints" / "step-00000001"
    finish(begin(folder), folder, Saved(1, 1, 10))
    (folder / name).unlink()
    os.mkfifo(folder / name)
    assert damage(folder) == [f"{folder / name}: is no file"]


def test_a_manifest_without_a_bottom(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints" / "step-00000001"
    finish(begin(folder), folder, Saved(1, 1, 10))
    (folder / "manifest.json").write_text("[" * 100_000)
    [line] = damage(folder)
    assert "manifest.json: cannot be read" in line


def test_a_manifest_that_leaves_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints" / "step-00000001"
    finish(begin(folder), folder, Saved(1, 1, 10))
    files = {**read_manifest(folder), "../../outside": read_manifest(folder)["state.json"]}
    text = {"files": {name: vars(entry) for name, entry in files.items()}, "sha256": _checksum(files)}
    (folder / "manifest.json").write_text(json.dumps(text))
    assert "no file of this folder" in checkpoint.damage(folder)[0]


def test_hashes_are_the_written_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(np.arange(1000).tobytes())
    (tmp_path / "b").write_bytes(b"")
    assert hashed(tmp_path, ["a", "b", "c"])["b"].sha256.startswith("e3b0c44298fc1c14")  # sha256 of nothing
    assert isinstance(hashed(tmp_path, ["c"])["c"], OSError)
