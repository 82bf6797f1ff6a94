"""FP8's drift: the figures are those of an independent computation, watching changes nothing, and the limit stops."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from distributed import run_ranks
from tiny import random_groups, write_llama

from megadpo.cli import main
from megadpo.config import Config, DataConfig, ModelConfig, TrainConfig
from megadpo.data.packing import Budget
from megadpo.errors import NumericsError
from megadpo.model.fp8 import without_fp8
from megadpo.parallel.context import grid
from megadpo.train.drift import Drift, DriftWatch, _nothing_noted, margins, measure, probe_groups
from megadpo.train.passes import score
from train.engine import Case, build

EMULATED = {"fp8_format": "hybrid", "fp8_emulation": True, "fp8_recipe": "mxfp8"}


def test_probe() -> None:
    """Evenly over the data, each once, whatever is asked for."""
    assert probe_groups(600, 4).tolist() == [0, 200, 399, 599]
    assert probe_groups(3, 8).tolist() == [0, 1, 2]
    assert probe_groups(1, 8).tolist() == [0]


def test_margins() -> None:
    """First against the mean of the others; a single response has no margin."""
    difference = torch.tensor([1.0, 3.0, 9.0, 5.0, 2.0, 6.0], dtype=torch.float64)
    assert margins(difference, torch.tensor([0, 2, 3, 6])).tolist() == [-2.0, 1.0]
    assert len(margins(difference[:1], torch.tensor([0, 1]))) == 0


def measured(device: torch.device, case: Case) -> dict[str, Any]:
    """By `measure`; and token by token and response by response, of one group at a time."""
    with grid(case.parallel, device, seed=1) as context:
        state, stream = build(case, context)
        groups = probe_groups(len(case.store), 6)
        found: dict[str, Any] = {"drift": measure(state.chunks, stream, groups, 4, context)}
        found["again"] = measure(state.chunks, stream, groups, 6, context)
        alone = replace(stream, ranks=1)
        tokens, sums = [], []
        for group in groups:
            batches = alone.batches(np.array([group]), 0, None)
            [one] = score(state.chunks, batches, context, as_trained=True) or [None]
            with without_fp8(state.chunks):
                [other] = score(state.chunks, batches, context) or [None]
            if one is not None:
                tokens.append((one.logprob_N - other.logprob_N).double().numpy())
                sums.append((one.sums_S - other.sums_S).double().numpy())
        found["tokens"], found["sums"] = tokens, sums
        return found


def check(found: dict[str, Any]) -> None:
    tokens = np.abs(np.concatenate(found["tokens"]))
    sums = np.concatenate(found["sums"])
    drift = found["drift"]
    assert drift.token == pytest.approx(tokens.mean(), rel=1e-3)
    assert drift.token > 1e-3
    assert drift.token_max == pytest.approx(tokens.max(), rel=1e-3)
    assert drift.response == pytest.approx(np.abs(sums).mean(), rel=1e-3)
    if len(found["sums"][0]) == 1:
        assert drift.margin is None
    else:
        margin = np.abs([group[0] - group[1:].mean() for group in found["sums"]])
        assert drift.margin == pytest.approx(margin.mean(), rel=1e-3)
    assert found["again"].metrics == pytest.approx(drift.metrics, rel=1e-3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("llama"), layers=2)


def test_figures(folder: Path) -> None:
    """For one, two and three responses, on one rank, data- and pipeline-parallel. (MXFP8's forward pass does not mix
    rows, so a group has the same numbers alone and among others.)"""
    cases = [
        Case(folder, random_groups(9, responses=count), budget=Budget(128), model_options=EMULATED)
        for count in (1, 2, 3)
    ]
    for case in cases:
        [found] = run_ranks(1, measured, case)
        check(found)
    for one in run_ranks(2, measured, cases[1]):
        check(one)
    *_, last = run_ranks(2, measured, replace(cases[1], pipeline=2))
    check(last)


def test_transformer_engines_histories_are_put_back() -> None:
    """Its modules hang their state on `fp8_meta`; what was not there before was empty."""
    old, fresh = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    history = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    old.fp8_meta = {"scaling_fwd": SimpleNamespace(amax_history=history), "recipe": object()}
    with _nothing_noted([torch.nn.Sequential(old, fresh)]):
        history[0] = 9.0
        fresh.fp8_meta = {"scaling_fwd": SimpleNamespace(amax_history=torch.ones(2, 2))}
    assert history.tolist() == [[1, 2], [3, 4]]
    assert not fresh.fp8_meta["scaling_fwd"].amax_history.any()


def run_file(folder: Path, shared: Path, **sections: Any) -> Path:
    config: dict[str, Any] = {
        "run_dir": str(folder / "run"),
        "model": {"path": str(shared / "models" / "stories260k"), "dtype": "float32", **EMULATED},
        "data": {
            "train": str(shared / "data" / "stories_pairs_train.jsonl"),
            "cache_dir": str(folder / "cache"),
            "num_proc": 1,
        },
        "batch": {"global_batch_size": 8},
        "optimizer": {"learning_rate": 3.0e-4, "warmup_ratio": 0, "lr_scheduler_type": "constant"},
        "train": {"max_steps": 4},
        "export": {"enabled": False},
    }
    for name, section in sections.items():
        config[name] = {**config[name], **section}
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def test_a_run(tmp_path: Path, shared: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """It trains in emulated FP8 and says so; the drift is in the log; watching and stopping half-way change nothing."""
    (tmp_path / "quiet").mkdir()
    (tmp_path / "watched").mkdir()
    assert main(["train", str(run_file(tmp_path / "quiet", shared))]) == 0
    out = capfd.readouterr().out
    assert "fp8        emulated: mxfp8, gradients in e5m2, products of 5 of 5 layers" in out
    assert "FP8 drift  step 0:" in out
    path = run_file(tmp_path / "watched", shared, train={"fp8_probe_steps": 2, "max_steps": 4, "save_steps": 1})
    assert main(["train", str(path), "train.max_steps=3"]) == 0
    assert main(["train", str(path)]) == 0
    quiet, watched = records(tmp_path / "quiet"), records(tmp_path / "watched")
    assert [r["step"] for r in watched] == [0, 1, 2, 3, 4]
    assert [any(name.startswith("fp8/") for name in r) for r in watched] == [True, False, True, False, True]
    assert watched[0].keys() == {"step", *Drift(0, 0, 0, 0).metrics}
    for one, other in zip(quiet[1:], watched[1:], strict=True):
        for name in (name for name in one if "second" not in name and not name.startswith("perf/")):
            assert one[name] == other[name], (one["step"], name)
    assert 1e-3 < watched[0]["fp8/token_drift"] < 0.3
    assert watched[0]["fp8/token_drift"] == quiet[0]["fp8/token_drift"]


def test_the_limit_stops_it(tmp_path: Path, shared: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """At the start, before anything is trained; and later, without a checkpoint of what was measured."""
    path = run_file(tmp_path, shared)
    assert main(["train", str(path), "train.fp8_drift_limit=1e-4"]) == 3
    said = "".join(capfd.readouterr())
    assert "step 0: FP8 moves log-probabilities by" in said
    assert "train.fp8_drift_limit = 0.0001" in said
    assert not list((tmp_path / "run").glob("checkpoints/step-*"))
    [start] = records(tmp_path)
    assert start["fp8/token_drift"] > 1e-4, "what was over the limit can be looked up"
    # A learning rate that does the model no good: the drift grows from 0.10 to 0.19 in one step.
    broken = ["optimizer.learning_rate=0.02", "train.fp8_drift_limit=0.14", "train.fp8_probe_steps=1"]
    assert main(["train", str(path), *broken, "train.save_steps=1"]) == 3
    said = "".join(capfd.readouterr())
    assert "step 1: FP8 moves log-probabilities by" in said
    assert not list((tmp_path / "run").glob("checkpoints/step-*"))
    first, last = records(tmp_path)
    assert (first["step"], last["step"]) == (0, 1), "the start's record stands once, though there were two starts"
    assert first == start
    assert last["fp8/token_drift"] > 0.14
    assert last["loss"] > 0


class Told:
    """A log's lines and records."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.records: list[dict[str, Any]] = []
        self.line, self.step = self.lines.append, self.records.append


def watch_of(step: int, limit: float | None = None, **model: Any) -> DriftWatch:
    """At this step, of a model that drifts by 0.3; nothing is computed."""
    train = TrainConfig(fp8_probe_steps=1, fp8_drift_limit=limit)
    config = Config("r", ModelConfig("m", fp8_format="hybrid", **model), DataConfig(("d",)), train=train)
    stream = SimpleNamespace(store=range(8))
    watch = DriftWatch(SimpleNamespace(step=step), stream, config, None, 1, lambda: None)  # type: ignore[arg-type]
    watch._measured = lambda: Drift(0.3, 1.0, 2.0, None)  # type: ignore[method-assign]
    return watch


@pytest.mark.parametrize(
    ("step", "model", "measured"),
    [
        (0, {"fp8_recipe": "delayed"}, False),
        (5, {"fp8_recipe": "delayed"}, False),
        (0, {"fp8_recipe": "delayed", "fp8_emulation": True}, False),
        (5, {"fp8_recipe": "delayed", "fp8_emulation": True}, True),
        (0, {"fp8_recipe": "tensorwise"}, True),
        (5, {"fp8_recipe": "tensorwise"}, True),
    ],
)
def test_a_start_without_scales_is_not_measured(step: int, model: dict[str, Any], measured: bool) -> None:
    """Transformer Engine's delayed scales are in no checkpoint, the emulation's are: a limit must not stop a resumed
    run for scales that it has not yet learnt again."""
    log = Told()
    watch_of(step, **model).at_start(log)
    [line] = log.lines
    assert ("0.3 nats per token" in line) == measured
    assert [record["step"] for record in log.records] == ([0] if measured and step == 0 else [])
    if not measured:
        watch_of(step, limit=0.1, **model).at_start(log)


@pytest.mark.parametrize(
    ("model", "remedy"),
    [
        ({}, True),
        ({"fp8_recipe": "delayed", "fp8_emulation": True}, False),
        ({"first_last_layers_bf16": True}, False),
    ],
)
def test_what_helps_against_drift_is_possible(model: dict[str, Any], remedy: bool) -> None:
    watch, log = watch_of(3, limit=0.2, **model), Told()
    with pytest.raises(NumericsError) as caught:
        watch.log_step(log, {"step": 3})
    assert [record["fp8/token_drift"] for record in log.records] == [0.3]
    assert ("first_last_layers_bf16" in str(caught.value)) == remedy
    assert "take another model.fp8_recipe, or raise the limit" in str(caught.value)
    watch_of(3, limit=0.4, **model).log_step(log, {"step": 3})
    with pytest.raises(NumericsError):
        watch.check(Drift(float("nan"), 0, 0, None))
