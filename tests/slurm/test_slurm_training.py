"""Real training on the nodes of a real SLURM: the same numbers as on one machine, whatever happens on the way."""

import json
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from box import ROOT, TOOLS, Cluster, Run, until, write_run
from tiny import write_llama

from megadpo.cli import main

STEPS = 60
PAIRS = 238
"""Groups: the batch of 4 does not divide them, and the last step goes on into the second epoch."""


def made(folder: Path) -> dict[str, Any]:
    """Model, tokenizer and pairs of random words, as sections of a run file."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    words = [f"{a}{b}" for a in ("ba", "do", "ki", "lu", "me") for b in ("na", "po", "ri", "st", "ty")]
    draw = random.Random(0)

    def text(count: int) -> str:
        return " ".join(draw.choice(words) for _ in range(count))

    rows = [{"prompt": text(4), "chosen": " " + text(5), "rejected": " " + text(5)} for _ in range(PAIRS)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    bytes_only = ByteLevelBPETokenizer()
    bytes_only.train_from_iterator(words, vocab_size=259, special_tokens=["<s>", "</s>"], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytes_only._tokenizer, bos_token="<s>", eos_token="</s>")
    write_llama(folder / "model", vocab=len(tokenizer))
    tokenizer.save_pretrained(folder / "model")
    return {
        "model": {"path": str(folder / "model"), "dtype": "float32"},
        "data": {"train": str(folder / "pairs.jsonl"), "cache_dir": str(folder / "cache"), "num_proc": 1},
        "parallel": {"tensor_model_parallel_size": 2, "data_parallel_size": 2},
        "batch": {"global_batch_size": 4},
        "optimizer": {"learning_rate": 1.0e-3},
        "train": {"max_steps": STEPS},
        "export": {"enabled": False},
    }


def numbers(run: Run) -> list[tuple[Any, ...]]:
    """What interruptions and the place of the ranks must not change."""
    names = ("step", "epoch", "loss", "grad_norm", "num_tokens", "rewards/margins", "logps/chosen")
    return [tuple(record[name] for name in names) for record in run.records("metrics.jsonl")]


def step_of(run: Run) -> int:
    records = run.records("metrics.jsonl") if (run.folder / "metrics.jsonl").exists() else [{"step": 0}]
    return records[-1]["step"] if records else 0


@pytest.fixture(scope="module")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[tuple[Any, ...]]]:
    """Sections of a run file, and the numbers of a run that nothing interrupted on this machine alone: without SLURM,
    the command that submits a job trains here."""
    folder = tmp_path_factory.mktemp("made")
    sections = made(folder)
    local = write_run(folder / "local", **sections)
    path = os.environ["PATH"]
    try:
        hidden = [part for part in path.split(":") if not any((Path(part) / tool).exists() for tool in TOOLS)]
        os.environ["PATH"] = ":".join(hidden)
        assert main(["launch", local.file, "--nodes", "2", "--processes-per-node", "2"]) == 0
    finally:
        os.environ["PATH"] = path
    return sections, numbers(local)


@pytest.mark.timeout(900)
def test_two_nodes_stopped_and_requeued_train_as_one_machine_does(
    inside: Cluster,
    made_once: tuple[dict[str, Any], list[tuple[Any, ...]]],
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    """Tensor 2 x data 2 over two nodes. Every step stands once and has the numbers of the local run to the bit, so
    every pair was used as often and in the same order."""
    sections, expected = made_once
    run = write_run(tmp_path / "run", **sections)
    assert main(["launch", run.file, "--nodes", "2", "--gpus-per-node", "2", "--cpus", "1"]) == 0
    until("a few steps are done", lambda: step_of(run) >= 5)
    inside.run("scancel", "--batch", "--signal=USR1", run.number)
    job = inside.ended(run.number)
    assert (job["JobState"], job["Restarts"], job["NumNodes"]) == ("COMPLETED", "1", "2"), run.log()
    assert run.events() == [("start", None), ("end", 138), ("start", None), ("end", 0)]
    assert [row[0] for row in expected] == list(range(1, STEPS + 1))
    assert numbers(run) == expected
    record_property("equal_steps", len(expected))
    assert main(["status", str(run.folder)]) == 0


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_node_dies_while_it_trains(
    inside: Cluster,
    made_once: tuple[dict[str, Any], list[tuple[Any, ...]]],
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    sections, expected = made_once
    run = write_run(tmp_path / "run", **sections | {"train": {"max_steps": STEPS, "save_steps": 10}})
    assert main(["launch", run.file, "--nodes", "2", "--gpus-per-node", "2", "--cpus", "1", "--preflight"]) == 0
    until("a checkpoint", lambda: step_of(run) >= 12)

    def again() -> float | None:
        """When the second start began, once it has done a step."""
        inside.ended_yet(run.number)  # nudges SLURM
        starts = [event for event in run.records("slurm/attempts.jsonl") if event["event"] == "start"]
        metrics = run.folder / "metrics.jsonl"
        if len(starts) < 2 or metrics.stat().st_mtime < starts[1]["time"]:
            return None
        return starts[1]["time"] if step_of(run) > int(starts[1]["checkpoint"].removeprefix("step-")) else None

    try:
        killed = time.time()
        inside.act("kill", "2")
        started = until("training goes on", again)
        record_property("node_started_seconds", round(started - killed, 1))
        record_property("node_training_seconds", round(time.time() - killed, 1))
        job = inside.ended(run.number)
        assert (job["JobState"], job["Restarts"], job["NodeList"]) == ("COMPLETED", "1", "n[1,3]"), run.log()
        assert numbers(run) == expected
        record_property("equal_steps", len(expected))
        assert "preflight: every node is fit" in run.log()
    finally:
        inside.act("start", "2")
    until("n2 is back", lambda: "3" in inside.run("sinfo", "-h", "-p", "main", "-t", "idle", "-o", "%D"))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_rank_is_started_again_in_the_same_job(
    inside: Cluster,
    made_once: tuple[dict[str, Any], list[tuple[Any, ...]]],
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    sections, expected = made_once
    run = write_run(tmp_path / "run", **sections | {"train": {"max_steps": STEPS, "save_steps": 10}})
    assert main(["launch", run.file, "--nodes", "2", "--gpus-per-node", "2", "--cpus", "1"]) == 0
    until("a checkpoint", lambda: step_of(run) >= 12)
    inside.run("scancel", "--signal=KILL", f"{run.number}.0")
    job = inside.ended(run.number)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "0"), run.log()
    assert [event for event, _ in run.events()] == ["start", "end", "start", "end"]
    assert numbers(run) == expected
    record_property("equal_steps", len(expected))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_that_only_its_ranks_refuse(
    inside: Cluster, made_once: tuple[dict[str, Any], list[tuple[Any, ...]]], tmp_path: Path
) -> None:
    """The data are bad, which nobody sees before the job runs: one line, exit code 2, no second start."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "chosen": "b"}\n')
    run = write_run(tmp_path / "run", **made_once[0] | {"data": {"train": str(rows), "cache_dir": str(tmp_path / "c")}})
    assert main(["launch", run.file, "--nodes", "2", "--gpus-per-node", "2", "--cpus", "1"]) == 0
    job = inside.ended(run.number)
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("FAILED", "2:0", "0")
    assert run.events() == [("start", None), ("end", 2)]
    assert run.log().count("megadpo: error: ") == 1


@pytest.mark.timeout(600)
def test_preflight_names_the_node_that_sees_another_folder(inside: Cluster, tmp_path: Path) -> None:
    folder = tmp_path / "shared"
    folder.mkdir()
    inside.act("on", "2", "mount", "-t", "tmpfs", "none", str(folder))
    try:
        began = time.monotonic()
        command = [sys.executable, str(ROOT / "launch" / "preflight.py"), "--run-dir", str(folder)]
        said = inside.run("bash", "-c", 'srun --nodes=3 --mpi=none "$@" 2>&1 || echo "exit code $?"', "_", *command)
        assert time.monotonic() - began < 60
    finally:
        inside.act("on", "2", "umount", str(folder))
    assert f"  n2: {folder} is another folder here than on the first node" in said
    assert "preflight: not fit: n2\n" in said
    assert "exit code 1" in said
    assert not list(folder.glob(".preflight*"))
