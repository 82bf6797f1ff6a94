"""Parity with TRL: what each side is asked, and the exit code. The numbers themselves are for `make parity`."""

import json
import math
from pathlib import Path

import compare_steps
import parity
import pytest
import trl_side

from megadpo.config.decode import load_config
from megadpo.objectives import DPO

MADE_ARGS = ["--steps", "2", "--batch", "4"]


def task(made: Path, **changed: object) -> parity.Task:
    settings: dict = {
        "model": made / "model",
        "data": made / "pairs_train.jsonl",
        "steps": 2,
        "batch": 4,
        "micro_batch": None,
        "learning_rate": 1e-4,
        "beta": 0.1,
        "reference": "precomputed",
    }
    return parity.Task(**{**settings, **changed})


def steps(count: int = 2, **changed: float | None) -> list[dict]:
    """Records of a run; `changed` goes into the last."""
    found = [
        {"step": step, **dict.fromkeys(compare_steps.SHOWN, 0.1), "loss": math.log(2)} for step in range(1, count + 1)
    ]
    found[-1].update(changed)
    return found


@pytest.mark.parametrize(
    ("ours", "code"),
    [
        (steps(), 0),
        (steps(loss=math.log(2) + 2e-4), 1),
        (steps(loss=None), 1),
        (steps(grad_norm=math.nan), 1),
        (steps(count=1), 1),
    ],
)
def test_exit_code(
    made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, ours: list[dict], code: int
) -> None:
    monkeypatch.setattr(parity, "trl_records", lambda *_: steps())
    monkeypatch.setattr(parity, "megadpo_records", lambda *_: ours)
    monkeypatch.setattr(parity, "logits_agree", lambda _: True)
    args = ["--model", str(made / "model"), "--data", str(made / "pairs_train.jsonl"), *MADE_ARGS]
    assert parity.main(args) == code
    assert ("over the limits" in capsys.readouterr().out) == bool(code)


def test_for_real(shared: Path) -> None:
    """Five steps against TRL itself on tensor 2 x pipeline 2; `make parity` runs 20 on six grids."""
    stories = ["--model", str(shared / "models" / "stories260k"), "--steps", "5", "--tp", "2", "--pp", "2"]
    assert parity.main([*stories, "--data", str(shared / "data" / "stories_pairs_train.jsonl")]) == 0


@pytest.mark.slow
def test_for_real_with_kernels(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two small steps with the head in Triton's interpreter; tools/results/parity.md has more of every back end."""
    pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.setattr(parity, "logits_agree", lambda _: True)  # the other back ends' test compares them
    small = ["--steps", "2", "--batch", "1", "--reference", "resident", "--logprob-backend", "triton"]
    stories = ["--model", str(shared / "models" / "stories260k")]
    assert parity.main([*stories, *small, "--data", str(shared / "data" / "stories_pairs_train.jsonl")]) == 0


def test_logits_count(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parity, "trl_records", lambda *_: steps())
    monkeypatch.setattr(parity, "megadpo_records", lambda *_: steps())
    monkeypatch.setattr(parity, "logits_agree", lambda _: False)
    args = ["--model", str(made / "model"), "--data", str(made / "pairs_train.jsonl"), *MADE_ARGS]
    assert parity.main(args) == 1


def test_every_grid_counts(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def ours(_: parity.Task, grid: parity.Grid, folder: Path) -> list[dict]:
        asked.append(str(grid))
        return steps(loss=9.0) if str(grid) == "PP2" else steps()

    monkeypatch.setattr(parity, "trl_records", lambda *_: steps())
    monkeypatch.setattr(parity, "megadpo_records", ours)
    monkeypatch.setattr(parity, "logits_agree", lambda _: True)
    args = ["--model", str(made / "model"), "--data", str(made / "pairs_train.jsonl"), "--grids", *MADE_ARGS]
    assert parity.main(args) == 1
    assert asked == ["TP1", "TP2", "TP2 + SP", "PP2", "TP2 x PP2", "DP2"]


def test_too_few_pairs(made: Path, capsys: pytest.CaptureFixture) -> None:
    args = ["--model", str(made / "model"), "--data", str(made / "pairs_eval.jsonl"), "--steps", "1000"]
    assert parity.main(args) == 2
    assert "1000 steps of 8 need 8000 pairs" in capsys.readouterr().err


def test_a_side_that_fails_is_told(made: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(parity.sys, "executable", "/bin/false")
    with pytest.raises(parity.SideFailedError, match="TRL: exit code 1"):
        parity.trl_records(task(made), [], tmp_path, None)


def test_the_run_file_is_valid_and_says_what_trl_is_told(made: Path, tmp_path: Path) -> None:
    grid = parity.Grid(tp=2, pp=2, sp=True)
    path = tmp_path / "run.yaml"
    path.write_text(parity.yaml.safe_dump(parity.run_file(task(made, reference="resident"), grid, tmp_path)))
    config = load_config(path, [])
    assert config.objective == DPO(beta=0.1, label_smoothing=0.0)
    assert config.model.dtype == "float32"
    assert config.reference.mode == "resident"
    assert not config.train.shuffle
    assert not config.export.enabled
    assert (config.train.max_steps, config.batch.global_batch_size) == (2, 4)
    sizes = config.parallel
    assert (sizes.tensor_model_parallel_size, sizes.pipeline_model_parallel_size) == (2, 2)
    assert (sizes.data_parallel_size, sizes.sequence_parallel) == (1, True)
    optimizer = config.optimizer
    assert (optimizer.lr_scheduler_type, optimizer.warmup_steps) == ("constant", 0)
    assert (optimizer.adam_beta1, optimizer.adam_beta2, optimizer.adam_epsilon) == (0.9, 0.999, 1e-8)
    assert (optimizer.weight_decay, optimizer.max_grad_norm, optimizer.learning_rate) == (0.0, 1.0, 1e-4)


def test_trl_sees_the_given_ids_and_starts_at_ln_2(made: Path, tmp_path: Path) -> None:
    pairs = parity.token_ids(task(made), tmp_path / "cache")
    assert len(pairs) == 8
    run = trl_side.TrlRun(model=str(made / "model"), steps=2, batch=4, micro_batch=2)
    records = trl_side.train(run, pairs, eval_pairs=pairs[:2])
    assert [record.get("step") for record in records] == [1, 2, None]
    assert records[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert records[1]["rewards/margins"] != 0
    assert records[1]["learning_rate"] == run.learning_rate
    assert records[2]["eval_rewards/margins"] != 0


def test_trl_numbers_are_kept_for_the_same_task_only(
    made: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ran = []

    def run(_: str, command: list[str]) -> None:
        ran.append(command)
        Path(command[command.index("--out") + 1]).write_text(json.dumps(steps()[0]) + "\n")

    monkeypatch.setattr(parity, "_run", run)
    pairs, cache = [{"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]}], tmp_path / "trl.json"
    first = parity.trl_records(task(made), pairs, tmp_path, cache)
    assert parity.trl_records(task(made, reference="resident"), pairs, tmp_path, cache) == first
    assert len(ran) == 1
    parity.trl_records(task(made, beta=0.2), pairs, tmp_path, cache)
    assert len(ran) == 2


@pytest.mark.parametrize(
    "wrong",
    [
        {"prompt_ids": [5, 6], "chosen_ids": [7, 2], "rejected_ids": [8, 2]},
        {"prompt_ids": [5], "chosen_ids": [7], "rejected_ids": [8, 2]},
        {"prompt_ids": [5], "chosen_ids": [8, 2], "rejected_ids": [7, 2]},
    ],
)
def test_a_batch_of_other_ids_is_noticed(wrong: dict) -> None:
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    collator = DataCollatorForPreference(pad_token_id=2)
    given = {"prompt_ids": [5], "chosen_ids": [7, 2], "rejected_ids": [8, 2]}
    longer = {"prompt_ids": [5, 9, 9], "chosen_ids": [7, 2], "rejected_ids": [8, 8, 2]}
    trl_side.check_batch(collator([given, longer]), [given, longer])
    with pytest.raises(AssertionError, match="not the pairs that were given"):
        trl_side.check_batch(collator([wrong, longer]), [given, longer])
    short = DataCollatorForPreference(pad_token_id=2, max_length=4)
    with pytest.raises(AssertionError, match="not the pairs that were given"):
        trl_side.check_batch(short([given, longer]), [given, longer])


def test_cut_micro_batches_are_refused() -> None:
    run = trl_side.TrlRun(model="", steps=3, batch=4, micro_batch=2)
    assert run.problems(pairs=12) == []
    assert len(run.problems(pairs=10)) == 1
    assert len(trl_side.TrlRun(model="", steps=1, batch=4, micro_batch=3).problems(pairs=12)) == 1
