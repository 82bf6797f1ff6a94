"""Data of other kinds than pairs through the command line: KTO on converted pairs, evaluation, what is refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from megadpo.cli import main
from megadpo.config import ReferenceConfig
from megadpo.config.decode import load_config
from megadpo.errors import ConfigError, ModelError
from megadpo.train.inputs import read_shapes


def run_file(folder: Path, shared: Path, **sections: Any) -> Path:
    config: dict[str, Any] = {
        "run_dir": str(folder / "run"),
        "model": {"path": str(shared / "models" / "stories260k"), "dtype": "float32"},
        "data": {
            "train": str(shared / "data" / "stories_pairs_train.jsonl"),
            "eval": str(shared / "data" / "stories_pairs_eval.jsonl"),
            "cache_dir": str(folder / "cache"),
            "num_proc": 1,
        },
        "parallel": {"data_parallel_size": 1},
        "batch": {"global_batch_size": 16},
        "optimizer": {"learning_rate": 1.0e-3, "lr_scheduler_type": "constant", "warmup_ratio": 0},
        "train": {"max_steps": 4},
        "export": {"enabled": False},
    }
    for name, section in sections.items():
        config[name] = config.get(name, {}) | section
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def test_kto_on_pairs(tmp_path: Path, shared: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = run_file(
        tmp_path,
        shared,
        objective={"loss_type": "kto", "beta": 0.5},
        data={"convert": "pairs_to_unpaired"},
        parallel={"data_parallel_size": 2},
    )
    assert main(["train", str(path)]) == 0
    steps = [r for r in records(tmp_path) if "loss" in r]
    [held_out] = [r for r in records(tmp_path) if "eval_loss" in r]
    assert steps[0]["loss"] == pytest.approx(0.5, abs=1e-5)  # before the first update every reward and the KL are 0
    assert len({round(step["loss"], 6) for step in steps}) == 4
    assert held_out["eval_desirable"] == held_out["eval_undesirable"] == 0.5
    assert held_out["eval_kl/token"] != 0
    assert held_out["eval_lengths/chosen"] > 10
    assert "600 rows converted into 1200 groups (data.convert)" in capfd.readouterr().out
    assert main(["eval", str(path)]) == 0
    said = capfd.readouterr().out
    for name in ("eval_loss", "eval_kl/token", "eval_lengths/rejected"):
        [line] = [line for line in said.splitlines() if line.split()[:1] == [name]]
        assert float(line.split()[1]) == pytest.approx(held_out[name], abs=2e-5)


def test_a_batch_without_a_pairing_is_refused_before_anything_is_done(
    tmp_path: Path, shared: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """1200 groups, 1199 at a time: the last batch has one."""
    path = run_file(
        tmp_path,
        shared,
        objective={"loss_type": "kto"},
        data={"convert": "pairs_to_unpaired"},
        batch={"global_batch_size": 1199},
        train={"max_steps": None, "num_train_epochs": 1},
    )
    assert main(["train", str(path)]) != 0
    assert "step 2 has a batch of 1 group" in capfd.readouterr().err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_kl_of_an_objective_without_reference(tmp_path: Path, shared: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The model itself is its reference here: 0."""
    path = run_file(tmp_path, shared, objective={"loss_type": "simpo"})
    assert main(["eval", str(path)]) == 0
    without = capfd.readouterr().out
    assert "eval_kl/token" not in without
    assert "eval_lengths/chosen" in without
    assert main(["eval", str(path), "--kl"]) == 0
    [line] = [line for line in capfd.readouterr().out.splitlines() if "eval_kl/token" in line]
    assert float(line.split()[1]) == pytest.approx(0, abs=1e-6)


def test_a_reference_that_nothing_would_look_at_is_refused(
    tmp_path: Path, shared: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """And its folder is not read; evaluation that measures the KL to it does look."""
    config = load_config(run_file(tmp_path, shared, objective={"loss_type": "simpo"}), [])
    missing = replace(config, reference=ReferenceConfig(path=str(tmp_path / "nowhere")))
    for reference, said in (
        (missing.reference, "reference.path = .*nowhere: objective.loss_type simpo has no reference"),
        (ReferenceConfig("resident"), "reference.mode = resident: objective.loss_type simpo has no reference"),
    ):
        with pytest.raises(ConfigError, match=said):
            read_shapes(replace(config, reference=reference), 1)
    assert read_shapes(replace(config, reference=ReferenceConfig("resident")), 1, kl=True)
    with pytest.raises(ModelError, match="nowhere"):
        read_shapes(missing, 1, kl=True)
    path = run_file(tmp_path, shared, objective={"loss_type": "simpo"}, reference={"mode": "resident"})
    assert main(["train", str(path)]) != 0
    assert "leave it out" in capfd.readouterr().err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("objective", "data", "words"),
    [
        ({"loss_type": "dpo"}, {"convert": "pairs_to_unpaired"}, "needs pairs; take a conversion to pairs"),
        ({"loss_type": "kto"}, {"convert": "lists_to_pairs_all"}, "needs unpaired"),
        ({"loss_type": "dpo"}, {"loss_on": "all_turns"}, "is for demonstrations"),
        ({"loss_type": "dpo"}, {"convert": "pairs_to_nothing"}, "must be one of"),
    ],
)
def test_run_files(objective: Any, data: Any, words: str, tmp_path: Path, shared: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        load_config(run_file(tmp_path, shared, objective=objective, data=data), [])
