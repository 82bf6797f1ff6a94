"""Training from a folder of `megadpo import`, and what is written beside the weights of an export."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from megadpo.cli import main
from megadpo.config.decode import load_config
from megadpo.convert.to_checkpoint import import_hf
from megadpo.train.card import imported_card, redacted, run_card
from train.test_run import numbers, run_file

ONE = {"parallel": {"tensor_model_parallel_size": 1}}
CANARY = "hf_CanaryCanaryCanaryCanary12345"


def test_a_run_from_an_imported_folder_is_the_run_from_the_original(
    tmp_path: Path, shared: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """To the bit, and its checkpoints can be exported one by one, with everything that makes the folder usable."""
    source = shared / "models" / "stories260k"
    import_hf(source, tmp_path / "in")
    (tmp_path / "in" / "LICENSE").write_text("do what you like")
    for name, model in (("one", source), ("two", tmp_path / "in")):
        folder = tmp_path / name
        folder.mkdir()
        path = run_file(folder, shared, model={"path": str(model)}, train={"max_steps": 3, "save_steps": 2}, **ONE)
        assert main(["train", str(path)]) == 0
    assert numbers(tmp_path / "two" / "run") == numbers(tmp_path / "one" / "run")
    step2 = tmp_path / "two" / "run" / "checkpoints" / "step-00000002"
    assert main(["export", str(step2), str(tmp_path / "out"), "--dtype", "bfloat16"]) == 0
    assert main(["export", str(tmp_path / "one" / "run"), str(tmp_path / "last")]) == 0
    names = {x.name for x in (tmp_path / "out").iterdir()}
    assert names == {x.name for x in source.iterdir()} | {"README.md", "LICENSE"}
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    config = json.loads((source / "config.json").read_text())
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == config | {"dtype": "bfloat16"}
    assert {str(x.dtype) for x in load_file(tmp_path / "out" / "model.safetensors").values()} == {"torch.bfloat16"}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| checkpoint | step 2 |" in card
    assert "| `step` | 2 |" in card
    assert "stories_pairs_train.jsonl` (digest `" in card
    assert "| checkpoint | step 3 |" in (tmp_path / "last" / "README.md").read_text()


def test_model_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was trained from what, on what, with what result; no secret, and no home folder."""
    monkeypatch.setenv("HOME", "/home/someone")
    run_dir, model = tmp_path / "run", tmp_path / "model"
    for folder in (run_dir / "step", model):
        folder.mkdir(parents=True)
    (model / "config.json").write_text('{"_name_or_path": "maker/model-8B"}')
    clean = f"run_dir: {run_dir}\nmodel: {{path: {model}}}\ndata: {{train: pairs.jsonl, eval: held_out.jsonl}}\n"
    (run_dir / "clean.yaml").write_text(clean + "objective: {loss_type: dpo, beta: 0.3}\n")
    config = load_config(run_dir / "clean.yaml", [])
    # A run file with secrets is refused; one that has them all the same is an older one.
    (run_dir / "run.yaml").write_text(
        f"run_dir: {run_dir}\nmodel: {{path: {model}}}\nobjective: {{loss_type: dpo, beta: 0.3}}\n"
        f"data:\n  train: [https://me:{CANARY}@host/pairs.jsonl, /home/someone/pairs.jsonl]\n  eval: held_out.jsonl\n"
        f"log: {{run_name: {CANARY}, wandb_project: 'https://host/?token=hush-hush&x=1'}}\n"
    )
    (run_dir / "identity.json").write_text('{"model.weights": "aaa111", "data": "bbb222"}')
    records = [{"step": s, "loss": 0.7 - s / 10, "rewards/accuracies": 0.5 + s / 10} for s in (1, 2, 3)]
    records.append({"step": 3, "eval_loss": 0.123456789, "eval_rewards/accuracies": 0.875})
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (run_dir / "step" / "state.json").write_text('{"step": 3, "consumed": 24, "total_steps": 3}')
    card = run_card(config, run_dir / "step")
    assert card.startswith(
        "---\nlibrary_name: transformers\nbase_model: maker/model-8B\ntags:\n- megadpo\n- dpo\n---\n"
    )
    assert f"| trained from | `{model}` (digest `aaa111`) |" in card
    assert "beta=0.3" in card
    assert "(digest `bbb222`)" in card
    assert "| held-out data | `held_out.jsonl` |" in card
    assert "| `loss` | 0.4 |" in card
    assert "| `eval_loss` | 0.123457 |" in card
    assert "```yaml\nrun_dir: " in card
    assert "~/pairs.jsonl" in card
    for secret in (CANARY, "hush-hush", "/home/someone"):
        assert secret not in card
    early = run_card(config, tmp_path)
    assert "| checkpoint |" not in early


@pytest.mark.parametrize(
    "text",
    [
        CANARY,
        "sk-abcdefgh12345678",
        f"https://user:{CANARY}@host",
        "x?api_key=abcdefg",
        "s3://b/k?X-Amz-Signature=abcdefg",
    ],
)
def test_secrets_are_blotted_out(text: str) -> None:
    out = redacted(f"before {text} after")
    assert "[removed]" in out
    assert "abcdefg" not in out
    assert CANARY not in out
    assert out.startswith("before ")
    assert out.endswith(" after")


def test_card_of_a_conversion(shared: Path, tmp_path: Path) -> None:
    import_hf(shared / "models" / "stories260k", tmp_path / "in", dtype="bfloat16")
    card = imported_card(tmp_path / "in")
    assert "| converted from | `stories260k` (digest `" in card
    assert "| training | none by megadpo |" in card
    assert str(shared) not in card
