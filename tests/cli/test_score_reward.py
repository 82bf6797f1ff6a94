"""A reward model from pairs to scores: trained, exported, read by transformers, trained on, and used on a data set."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from megadpo.cli import main


def run_file(folder: Path, shared: Path, model: Path | None = None, **train: Any) -> Path:
    stories = shared / "models" / "stories260k"
    config = {
        "run_dir": str(folder / "run"),
        "model": {"path": str(model or stories), "dtype": "float32"},
        "data": {
            "train": str(shared / "data" / "stories_pairs_train.jsonl"),
            "eval": str(shared / "data" / "stories_pairs_eval.jsonl"),
            "cache_dir": str(folder / "cache"),
            "num_proc": 1,
        },
        "objective": {"loss_type": "reward", "centering": 0.01},
        "parallel": {"tensor_model_parallel_size": 2},
        "batch": {"global_batch_size": 16},
        "optimizer": {"learning_rate": 1.0e-3, "lr_scheduler_type": "constant", "warmup_ratio": 0},
        "train": {"max_steps": 30} | train,
        "export": {"dtype": "float32"},
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, shared: Path) -> Path:
    folder = tmp_path_factory.mktemp("reward")
    assert main(["train", str(run_file(folder, shared))]) == 0
    return folder


def held_out(folder: Path) -> dict[str, float]:
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return next(record for line in reversed(lines) if "eval_loss" in (record := json.loads(line)))


def by_transformers(folder: Path, texts: list[str]) -> list[float]:
    """Scores of whole texts, one at a time and as a batch padded on the right; they must agree."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.config.num_labels == 1
    assert type(model).__name__ == "LlamaForSequenceClassification"
    ids = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts]
    longest = max(map(len, ids))
    padded = torch.tensor([row + [model.config.pad_token_id] * (longest - len(row)) for row in ids])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids])
    with torch.no_grad():
        alone = [float(model(torch.tensor([row])).logits) for row in ids]
        together = model(padded, attention_mask=mask).logits[:, 0].tolist()
    assert together == pytest.approx(alone, abs=1e-4)
    return alone


def test_it_learns(trained: Path) -> None:
    first = json.loads((trained / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(0.693147, abs=1e-6)
    record = held_out(trained)
    assert record["eval_rewards/accuracies"] > 0.6
    assert 0 <= record["eval_rewards/ece"] < 0.5
    assert record["eval_lengths/chosen"] > 1


def test_scores_equal_those_of_transformers(trained: Path, shared: Path, tmp_path: Path) -> None:
    export, source = trained / "run" / "export", shared / "data" / "stories_pairs_eval.jsonl"
    out = tmp_path / "scored.jsonl"
    settings = ["model.dtype=float32", f"data.cache_dir={tmp_path}/cache", "parallel.tensor_model_parallel_size=2"]
    assert main(["score", "--reward", str(export), str(source), str(out), *settings]) == 0
    rows, before = ([json.loads(line) for line in path.read_text().splitlines()] for path in (out, source))
    names = ("prompt", "chosen", "rejected")
    assert [[row[name] for name in names] for row in rows] == [[row[name] for name in names] for row in before]
    want = by_transformers(export, [row["prompt"] + row[name] for row in rows[:8] for name in names[1:]])
    got = [row[name] for row in rows[:8] for name in ("chosen_score", "rejected_score")]
    assert got == pytest.approx(want, abs=1e-4)
    right = sum((row["chosen_score"] > row["rejected_score"]) for row in rows) / len(rows)
    assert right == pytest.approx(held_out(trained)["eval_rewards/accuracies"], abs=0.01)
    assert main(["score", "--reward", str(export), str(source), str(out), *settings]) != 0  # it is there already


def test_training_goes_on_from_the_export(trained: Path, shared: Path, tmp_path: Path) -> None:
    path = run_file(tmp_path, shared, model=trained / "run" / "export", max_steps=1)
    assert main(["train", str(path), "optimizer.learning_rate=1e-12", "parallel.tensor_model_parallel_size=1"]) == 0
    for name in ("eval_loss", "eval_rewards/ece", "eval_rewards/margins"):
        assert held_out(tmp_path)[name] == pytest.approx(held_out(trained)[name], abs=1e-4)


def test_a_language_model_gives_no_scores(shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, model = shared / "data" / "stories_pairs_eval.jsonl", shared / "models" / "stories260k"
    code = main(["score", "--reward", str(model), str(data), str(tmp_path / "x.jsonl")])
    assert code != 0
    assert "is no reward model" in capsys.readouterr().err


@pytest.mark.slow
def test_a_hang_while_it_scores(
    trained: Path, shared: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 75 within the limit, and the stacks stay where the line says."""
    import megadpo.parallel.watchdog as watchdog
    import megadpo.train.rewards as rewards

    monkeypatch.setattr(watchdog, "START", 20.0)
    monkeypatch.setattr(rewards, "score_groups", lambda *arguments: time.sleep(600))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    source, out = shared / "data" / "stories_pairs_eval.jsonl", tmp_path / "scored.jsonl"
    settings = ["model.dtype=float32", f"data.cache_dir={trained}/cache", "train.hang_timeout=1"]
    began = time.monotonic()
    assert main(["score", "--reward", str(trained / "run" / "export"), str(source), str(out), *settings]) == 75
    assert time.monotonic() - began < 100
    assert "made no progress" in capfd.readouterr().err
    [log] = tmp_path.glob("megadpo-score-*/run/logs/rank-0.log")
    assert "hung: scoring has taken" in log.read_text()
    assert "in run_scoring" in log.read_text()
    assert not out.exists()
