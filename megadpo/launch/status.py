"""Where a run stands, from what it writes: step, speed, time left, checkpoint, restarts, its SLURM job."""

from __future__ import annotations

import json
import math
import re
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from megadpo.config.decode import load_config
from megadpo.errors import CheckpointError
from megadpo.launch.slurm import FOLDER, job_of
from megadpo.observe.speed import clock, short
from megadpo.parallel.owner import Owner, lives, read_owner, this_start
from megadpo.parallel.squeue import job_state

TAIL = 200_000
"""Bytes of the end of metrics.jsonl that are read."""
RECENT = 20
"""Steps from which the speed is taken."""
QUIET = (60.0, 3.0)
"""A run is stale after so many seconds, or so many median steps, without a record, whichever is longer."""

State = Literal["waiting", "starting", "training", "stale", "stopped", "finished"]


@dataclass(frozen=True)
class Status:
    """None: not known, or nothing there yet. Times in seconds."""

    run_dir: str
    state: State
    """waiting: its job is not running. starting: no step since its last start. stale: running, but silent for too
    long. stopped: nothing runs, and it is not at its end. Of a run without a SLURM job its owner file tells; seen from
    another machine, a stale one may be gone."""
    step: int
    total_steps: int | None
    loss: float | None
    seconds_per_step: float | None
    pairs_per_second: float | None
    tokens_per_second: float | None
    seconds_left: float | None
    silent_for: float | None
    """Since the last record, or the last start where that is later."""
    checkpoint: str | None
    checkpoint_age: float | None
    restarts: int
    """Starts after the first, in the allocation or by a requeue."""
    job: str | None
    job_state: str | None
    """As squeue has it."""
    job_reason: str | None
    """Why it waits, or on which nodes it runs."""
    exit_code: int | None
    """Of the last start under SLURM, where it has ended."""
    owner: str | None
    """The start that trains in it, as far as is known."""


def read_status(run_dir: Path, now: float | None = None) -> Status:
    """Raises CheckpointError where there is no run folder."""
    run_dir, now = run_dir.expanduser(), time.time() if now is None else now
    if not any((run_dir / name).exists() for name in ("run.yaml", f"{FOLDER}/run.yaml", "metrics.jsonl")):
        raise CheckpointError(f"{run_dir}: has no run.yaml; give the run_dir of a training run")
    metrics = run_dir / "metrics.jsonl"
    steps = [record for record in tail(metrics) if {"seconds", "step", "epoch"} <= record.keys()]
    events = [event for event in tail(run_dir / FOLDER / "attempts.jsonl") if {"event", "time", "code"} <= event.keys()]
    starts = [event for event in events if event["event"] == "start"]
    last = steps[-1] if steps else {}
    pace = statistics.median(record["seconds"] for record in steps[-RECENT:]) if steps else None
    total = total_steps(run_dir, last)
    checkpoint = newest_checkpoint(run_dir)
    job = job_of(run_dir)
    owner = _owner(run_dir)
    state, reason = job_state(job) if job else (None, None)
    heard = [metrics.stat().st_mtime] if steps else []
    silent = now - max(heard + [float(event["time"]) for event in starts[-1:]], default=now)
    begun = bool(steps) and not (starts and heard[0] < starts[-1]["time"])
    left = None if pace is None or total is None else max(0, total - last["step"]) * pace
    return Status(
        run_dir=str(run_dir),
        state=_state(last.get("step", 0), total, begun, silent, pace, state, (run_dir / "export").exists(), owner),
        step=last.get("step", 0),
        total_steps=total,
        loss=last.get("loss"),
        seconds_per_step=pace,
        pairs_per_second=last.get("pairs_per_second"),
        tokens_per_second=last.get("tokens_per_second"),
        seconds_left=left,
        silent_for=silent if heard or starts else None,
        checkpoint=str(checkpoint) if checkpoint else None,
        checkpoint_age=now - checkpoint.stat().st_mtime if checkpoint else None,
        restarts=max(0, len(starts) - 1),
        job=job,
        job_state=state,
        job_reason=reason,
        exit_code=next((event["code"] for event in reversed(events) if event["event"] == "end"), None)
        if events and events[-1]["event"] != "start"
        else None,
        owner=str(owner).rstrip(",") if owner else None,
    )


def _owner(run_dir: Path) -> Owner | None:
    """The start that has the folder, unless it is known to be dead; asked from inside its own job, too."""
    there = read_owner(run_dir)
    return None if there is None or lives(there, replace(this_start(), job=None)) is False else there


def _state(
    step: int,
    total: int | None,
    begun: bool,
    silent: float,
    pace: float | None,
    state: str | None,
    exported: bool,
    owner: Owner | None,
) -> State:
    if total is not None and step >= total and (state is None or exported):
        return "finished"
    if state is None and owner is None:
        return "stopped"
    if state is not None and state not in ("RUNNING", "COMPLETING", "UNKNOWN"):
        return "waiting"
    if begun and pace is not None and silent > max(QUIET[0], QUIET[1] * pace):
        return "stale"
    return "training" if begun else "starting"


def tail(path: Path) -> list[dict[str, Any]]:
    """The last records of a file of JSON lines, oldest first; broken lines are left out."""
    if not path.is_file():
        return []
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL))
        lines = file.read().decode("utf-8", "replace").splitlines()
    found = []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            found.append(record)
    return found


def total_steps(run_dir: Path, last: dict[str, Any]) -> int | None:
    """Updates of the whole run: train.max_steps, or what the epochs come to; None before the first step says."""
    path = next((path for path in (run_dir / "run.yaml", run_dir / FOLDER / "run.yaml") if path.is_file()), None)
    if path is None:
        return None
    config = load_config(path, [])
    if config.train.max_steps is not None:
        return config.train.max_steps
    if not last.get("epoch"):
        return None
    if last["epoch"] >= config.train.num_train_epochs:
        return int(last["step"])
    groups = round(last["step"] * config.batch.global_batch_size / last["epoch"])
    return math.ceil(groups * config.train.num_train_epochs / config.batch.global_batch_size)


def newest_checkpoint(run_dir: Path) -> Path | None:
    """The newest folder that has a complete checkpoint's name; it is not opened."""
    found = [path for path in (run_dir / "checkpoints").glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return max(found, default=None)


def status_lines(status: Status) -> list[str]:
    """The status for a terminal."""
    total = status.total_steps
    share = f" of {total} ({100 * status.step / total:.0f}%)" if total else ""
    words: list[tuple[str, str | None]] = [
        ("state", status.state),
        ("step", f"{status.step}{share}"),
        ("loss", None if status.loss is None else short(status.loss)),
        ("speed", _speed(status)),
        ("time left", None if status.seconds_left is None else clock(status.seconds_left)),
        ("last record", None if status.silent_for is None else f"{clock(status.silent_for)} ago"),
        (
            "checkpoint",
            f"{status.checkpoint}, {clock(status.checkpoint_age or 0)} old" if status.checkpoint else "none",
        ),
        ("restarts", str(status.restarts)),
        ("job", _job(status)),
        ("owner", status.owner),
    ]
    return [f"{name:<12} {text}" for name, text in words if text is not None]


def _speed(status: Status) -> str | None:
    if status.seconds_per_step is None:
        return None
    speeds = [f"{short(status.seconds_per_step)} s per step"]
    if status.pairs_per_second is not None:
        speeds.append(f"{short(status.pairs_per_second)} groups/s")
    if status.tokens_per_second is not None:
        speeds.append(f"{short(status.tokens_per_second)} tokens/s")
    return ", ".join(speeds)


def _job(status: Status) -> str | None:
    if status.job is None:
        return None
    code = f"; last exit code {status.exit_code}" if status.exit_code is not None else ""
    reason = f" ({status.job_reason})" if status.job_reason else ""
    return f"{status.job} {status.job_state or 'not in the queue'}{reason}{code}"
