"""The demo's own judgement: what it measures, and that it fails where nothing was shown."""

import json
import math
import shutil
from pathlib import Path

import demo
import pytest
import torch
from make_demo import Sizes
from safetensors.torch import load_file, save_file


@pytest.fixture(scope="module")
def loaded(made: Path) -> demo.Loaded:
    return demo.load(made / "model")


def pairs(made: Path) -> list[dict]:
    return [json.loads(line) for line in (made / "pairs_eval.jsonl").read_text().splitlines()][:4]


def test_log_probability_of_an_answer(made: Path, loaded: demo.Loaded) -> None:
    """An untrained model is nearly uniform: every token of the answer and the EOS costs about ln(vocabulary)."""
    pair = pairs(made)[0]
    text = pair["chosen"][0]["content"]
    tokens = len(loaded.tokenizer(text, add_special_tokens=False)["input_ids"]) + 1
    per_token = -demo.answer_logp(loaded, pair["prompt"], pair["chosen"]) / tokens
    assert per_token == pytest.approx(math.log(len(loaded.tokenizer)), rel=0.05)


def test_answers_follow_the_seed(made: Path, loaded: demo.Loaded) -> None:
    prompt = pairs(made)[0]["prompt"]
    assert demo.answer(loaded, prompt, seed=1) == demo.answer(loaded, prompt, seed=1)
    assert demo.answer(loaded, prompt, seed=1) != demo.answer(loaded, prompt, seed=2)


@pytest.mark.parametrize("fault", ["missing", "misshapen", "truncated", "not finite"])
def test_an_export_that_does_not_load_fails_the_demo(made: Path, tmp_path: Path, fault: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(made / "model", folder)
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    if fault == "missing":
        del tensors["lm_head.weight"]
    elif fault == "misshapen":
        tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1].clone()
    elif fault == "not finite":
        tensors["model.norm.weight"] = torch.full_like(tensors["model.norm.weight"], math.nan)
    save_file(tensors, weights, metadata={"format": "pt"})
    if fault == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(demo.DemoError):
        demo.load(folder)


@pytest.mark.parametrize("after", [0.4, 0.5, math.nan])
def test_an_accuracy_that_does_not_rise_fails_the_demo(after: float) -> None:
    with pytest.raises(demo.DemoError, match="did not rise"):
        demo.verdict(demo.Shown(0.5, (), 0.0), demo.Shown(after, (), 1.0))
    demo.verdict(demo.Shown(0.5, (), 1.0), demo.Shown(0.6, (), 0.0))


def test_examples_are_the_first_gloomy_answers() -> None:
    answers = ("How wonderful! Life is good!", "nothing", "How tiresome!", "Nobody likes it.", "How tiresome!")
    assert demo.examples(demo.Shown(0.5, answers, 0.2)) == [2, 3]
    assert demo.examples(demo.Shown(0.5, answers[:2], 0.2)) == [0, 1]


def test_fewer_than_four_gpus_get_a_smaller_grid() -> None:
    assert demo.grid_settings(0) == demo.grid_settings(4) == demo.grid_settings(8) == []
    for gpus, ranks in ((1, 1), (2, 2), (3, 2)):
        assert f"parallel.tensor_model_parallel_size={ranks}" in demo.grid_settings(gpus)
        assert "parallel.pipeline_model_parallel_size=1" in demo.grid_settings(gpus)


def test_a_run_that_teaches_nothing_fails_the_demo(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    asked = []

    def train(recipe: str, settings: list[str]) -> None:
        asked.append((recipe, *settings))
        name = "sft" if recipe == "demo-sft.yaml" else "dpo"
        shutil.copytree(made / "model", tmp_path / "demo" / name / "export")

    monkeypatch.setattr(demo, "WORK", tmp_path / "demo")
    monkeypatch.setattr(demo, "train", train)
    sizes = Sizes(held_out=3, hidden_size=32, intermediate_size=48, layers=1, heads=4, kv_heads=2)
    monkeypatch.setattr(demo, "Sizes", lambda: sizes)
    assert demo.main(["seed=1"]) == 1
    assert [call[0] for call in asked] == ["demo-sft.yaml", "demo.yaml"]
    assert all(call[-1] == "seed=1" for call in asked)
    assert "did not rise" in capsys.readouterr().out
