"""What a run folder tells of its run."""

import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from megadpo.cli import main
from megadpo.launch.status import read_status
from megadpo.parallel.owner import Owner, this_start

NOW = 1_000_000.0


@pytest.fixture(autouse=True)
def no_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))


def squeue(tmp_path: Path, answer: str) -> None:
    path = tmp_path / "bin" / "squeue"
    path.write_text(f"#!/bin/sh\necho '{answer}'\n")
    path.chmod(0o755)


def write(folder: Path, records: int, seconds: float = 2.0, age: float = 5.0, **train: Any) -> Path:
    """A run folder in which so many steps of 10 groups are done, of 95 groups per epoch."""
    run = folder / "run"
    run.mkdir()
    settings = {"run_dir": str(run), "model": {"path": "m"}, "data": {"train": "d"}, "batch": {"global_batch_size": 10}}
    (run / "run.yaml").write_text(yaml.safe_dump(settings | {"train": train}))
    lines = [
        {"step": n, "epoch": 10 * n / 95, "loss": 0.5, "seconds": seconds, "pairs_per_second": 5.0}
        for n in range(1, records + 1)
    ]
    if records:
        metrics = run / "metrics.jsonl"
        metrics.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 99, "half')
        os.utime(metrics, (NOW - age, NOW - age))
    own(run, this_start())
    return run


def own(run: Path, owner: Owner) -> None:
    (run / "owner.json").write_text(json.dumps(asdict(owner)))


def attempts(run: Path, *events: tuple[str, float, int | None]) -> None:
    (run / "owner.json").unlink()
    (run / "slurm").mkdir()
    (run / "slurm" / "job").write_text("17\n")
    lines = [{"event": event, "time": NOW - age, "code": code} for event, age, code in events]
    (run / "slurm" / "attempts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_local_run(tmp_path: Path) -> None:
    """3 epochs of 95 groups in batches of 10 are 29 steps, the last one smaller."""
    run = write(tmp_path, 9, num_train_epochs=3)
    for name in ("step-00000004", "step-00000008", "step-00000009.partial"):
        (run / "checkpoints" / name).mkdir(parents=True)
    status = read_status(run, NOW)
    assert (status.state, status.step, status.total_steps, status.seconds_left) == ("training", 9, 29, 40.0)
    assert (status.seconds_per_step, status.pairs_per_second, status.silent_for) == (2.0, 5.0, 5.0)
    assert status.checkpoint == str(run / "checkpoints" / "step-00000008")
    assert (status.restarts, status.job) == (0, None)


@pytest.mark.parametrize(
    ("seconds", "age", "state"), [(2, 59, "training"), (2, 61, "stale"), (30, 89, "training"), (30, 91, "stale")]
)
def test_silent_for_too_long(tmp_path: Path, seconds: float, age: float, state: str) -> None:
    assert read_status(write(tmp_path, 3, seconds, age, max_steps=10), NOW).state == state


def test_whose_run_it_is(tmp_path: Path) -> None:
    """Without SLURM: nobody's, a live process's, a dead one's, and one's on another machine, of which nobody knows."""
    run, me = write(tmp_path, 3, age=500, max_steps=10), this_start()
    status = read_status(run, NOW)
    assert (status.state, status.owner) == ("stale", f"process {os.getpid()} on {me.host}, started {me.since}")
    own(run, replace(me, machine="another", job=None))
    assert read_status(run, NOW).state == "stale"
    own(run, replace(me, started=me.started + 1))
    assert (read_status(run, NOW).state, read_status(run, NOW).owner) == ("stopped", None)
    (run / "owner.json").unlink()
    assert read_status(run, NOW).state == "stopped"


def test_the_end(tmp_path: Path) -> None:
    run = write(tmp_path, 10, age=9999, max_steps=10)
    assert read_status(run, NOW).state == "finished"


def test_a_job_that_waits_runs_and_is_gone(tmp_path: Path) -> None:
    run = write(tmp_path, 3, age=500, max_steps=10)
    attempts(run, ("start", 900, None), ("end", 490, 138), ("start", 30, None))
    squeue(tmp_path, "PENDING|(Resources)")
    status = read_status(run, NOW)
    assert (status.state, status.job, status.job_state, status.job_reason) == ("waiting", "17", "PENDING", "Resources")
    squeue(tmp_path, "RUNNING|n[1-2]")
    status = read_status(run, NOW)
    assert (status.state, status.restarts, status.silent_for, status.exit_code) == ("starting", 1, 30, None)
    squeue(tmp_path, "")
    assert read_status(run, NOW).state == "stopped"


def test_how_the_last_start_ended(tmp_path: Path) -> None:
    run = write(tmp_path, 3, max_steps=10)
    attempts(run, ("start", 9, None), ("end", 5, 1), ("gave up", 5, 1))
    status = read_status(run, NOW)
    assert (status.state, status.exit_code, status.restarts) == ("stopped", 1, 0)


def test_before_the_first_step(tmp_path: Path) -> None:
    status = read_status(write(tmp_path, 0), NOW)
    assert (status.state, status.step, status.total_steps, status.seconds_left) == ("starting", 0, None, None)


def test_on_the_terminal_and_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write(tmp_path, 5, max_steps=10)
    assert main(["status", str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "step         5 of 10 (50%)" in lines
    assert "time left    0:10" in lines
    assert main(["status", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 5
    assert main(["status", str(tmp_path)]) == 2
    assert "has no run.yaml; give the run_dir of a training run" in capsys.readouterr().err
