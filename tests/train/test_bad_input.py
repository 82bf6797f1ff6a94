"""What can be wrong with a run: one line that says what was given, what is allowed and what to do."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import write_llama

from megadpo.cli import main
from train.test_run import run_file

Change = Callable[[Path, Path], list[str]]
"""(a copy of the model folder, the data file) -> overrides for the command line."""


def edit_config(**fields: object) -> Change:
    def change(model: Path, data: Path) -> list[str]:
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | fields))
        return []

    return change


def settings(*overrides: str) -> Change:
    return lambda model, data: list(overrides)


def no_weights(model: Path, data: Path) -> list[str]:
    (model / "model.safetensors").unlink()
    return []


def cut_off(model: Path, data: Path) -> list[str]:
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5000])
    return []


def no_tokenizer(model: Path, data: Path) -> list[str]:
    for file in model.glob("token*"):
        file.unlink()
    return []


def lines(*rows: object) -> Change:
    def change(model: Path, data: Path) -> list[str]:
        data.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return []

    return change


def another_reference(**fields: object) -> Change:
    """TDPO with a resident reference whose config.json differs."""

    def change(model: Path, data: Path) -> list[str]:
        other = model.parent / "other"
        shutil.copytree(model, other)
        edit_config(**fields)(other, data)
        return ["objective.loss_type=tdpo2", "reference.mode=resident", f"reference.path={other}"]

    return change


GOOD = {"prompt": "Once upon a time", "chosen": " there was joy.", "rejected": " there was gloom."}

CASES: dict[str, tuple[Change, str]] = {
    "two vocabularies": (
        another_reference(vocab_size=68),
        r"have vocabularies of \d+ and 68 tokens, and objective\.loss_type tdpo2 compares .* or leave it out",
    ),
    "misspelt setting": (settings("objective.beat=0.1"), r"did you mean objective\.beta\?"),
    "wrong type": (settings("batch.global_batch_size=many"), r"global_batch_size"),
    "heads": (settings("parallel.tensor_model_parallel_size=3"), r"tensor_model_parallel_size = 3.*fit.*1, 2, 4"),
    "stages": (settings("parallel.pipeline_model_parallel_size=6"), r"6 stages for 5 layers"),
    "too small a budget": (settings("batch.micro_batch_tokens=8"), r"micro_batch_tokens = 8: \d+ of \d+ groups"),
    "model folder": (settings("model.path=/nowhere/model"), r"/nowhere/model"),
    "no weights": (no_weights, r"safetensors"),
    "cut-off weights": (cut_off, r"model\.safetensors"),
    "architecture": (edit_config(architectures=["GPT2LMHeadModel"]), r"GPT2LMHeadModel.*LlamaForCausalLM"),
    "activation": (edit_config(hidden_act="gelu"), r"hidden_act"),
    "shape": (edit_config(intermediate_size=176), r"mlp"),
    "tokenizer": (no_tokenizer, r"tokenizer"),
    "vocabulary": (edit_config(vocab_size=400), r"(vocabulary|512|embed_tokens)"),
    "bad line": (lines(GOOD, '{"prompt": "Once'), r"pairs\.jsonl:2"),
    "columns": (lines({"question": "a", "reply": "b"}), r"question.*reply.*|reply.*question"),
    "empty": (lines(), r"pairs\.jsonl"),
    "identical": (lines({**GOOD, "rejected": GOOD["chosen"]}), r"(identical|equal|same)"),
    "data file": (settings("data.train=/nowhere/pairs.jsonl"), r"/nowhere/pairs\.jsonl"),
    "eval file": (settings("data.eval=/nowhere/eval.jsonl"), r"/nowhere/eval\.jsonl"),
    "format": (settings("data.format=orca"), r"orca"),
    "occupied export": (settings("export.enabled=true", "export.path={occupied}"), r"export\.path.*not empty"),
    "checkpoints as export": (settings("export.enabled=true", "export.path={run}/checkpoints"), r"export\.path.*own"),
    "export that cannot be": (settings("export.enabled=true", "export.path=/proc/none/export"), r"/proc/none"),
    "long warm-up": (settings("optimizer.warmup_steps=8"), r"warmup_steps = 8: the run has only 8 steps"),
    "run_dir is a file": (settings("run_dir={occupied}/file"), r"file"),
}


@pytest.mark.parametrize("name", CASES)
def test_one_line(name: str, tmp_path: Path, shared: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model, data, occupied = tmp_path / "model", tmp_path / "pairs.jsonl", tmp_path / "occupied"
    shutil.copytree(shared / "models" / "stories260k", model)
    model.chmod(0o755)
    for file in model.iterdir():
        file.chmod(0o644)
    data.write_text(json.dumps(GOOD) + "\n")
    occupied.mkdir()
    (occupied / "file").write_text("mine")
    change, message = CASES[name]
    path = run_file(tmp_path, shared, model={"path": str(model)}, data={"train": str(data)})
    overrides = [override.format(occupied=occupied, run=tmp_path / "run") for override in change(model, data)]
    code = main(["train", str(path), "parallel.tensor_model_parallel_size=1", *overrides])
    error = capfd.readouterr().err
    assert code != 0
    assert error.startswith("megadpo: error: "), error
    assert error.count("\n") == 1, error
    assert re.search(message, error), error
    assert not list(tmp_path.glob("run/checkpoints/*"))
    assert not (tmp_path / "run" / "export").exists()
    assert (occupied / "file").read_text() == "mine"
    assert not (tmp_path / "run" / "identity.json").exists(), "a start that was refused claims no run folder"


def test_a_run_folder_of_another_run(tmp_path: Path, shared: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = run_file(tmp_path, shared, train={"max_steps": 1}, parallel={"tensor_model_parallel_size": 1})
    assert main(["train", str(path)]) == 0
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    capfd.readouterr()
    assert main(["train", str(path), "objective.beta=0.3"]) == 2
    error = capfd.readouterr().err
    assert "belongs to another run: its objective.beta is 0.1, this run's is 0.3" in error
    assert main(["train", str(path), "parallel.use_distributed_optimizer=false"]) == 2
    error = capfd.readouterr().err
    assert "its parallel.use_distributed_optimizer is True, this run's is False" in error
    assert error.count("\n") == 1
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before


def test_another_model_s_checkpoint(tmp_path: Path, shared: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Evaluation names the mistake, and never advises to remove a good checkpoint."""
    stories = shared / "data" / "stories_pairs_eval.jsonl"
    path = run_file(tmp_path, shared, train={"max_steps": 1}, parallel={"tensor_model_parallel_size": 1})
    assert main(["train", str(path)]) == 0
    other = write_llama(tmp_path / "other", layers=5, hidden=64, ffn=172, heads=8, groups=4, vocab=512, tied=True)
    for file in (shared / "models" / "stories260k").glob("token*"):
        shutil.copyfile(file, other / file.name)
    capfd.readouterr()
    for overrides, message in (
        ([f"model.path={other}"], "its model.weights is"),
        (["--checkpoint", str(tmp_path / "nowhere")], "is not a checkpoint"),
    ):
        assert main(["eval", str(path), f"data.eval={stories}", *overrides]) != 0
        error = capfd.readouterr().err
        assert message in error
        assert error.count("\n") == 1
        assert "remove" not in error


def test_damaged_identity(tmp_path: Path, shared: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = run_file(tmp_path, shared, train={"max_steps": 1}, parallel={"tensor_model_parallel_size": 1})
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "identity.json").write_text("{")
    assert main(["train", str(path)]) == 2
    assert "identity.json: cannot be read" in capfd.readouterr().err
