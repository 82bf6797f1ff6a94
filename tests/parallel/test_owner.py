"""One start at a time in a run folder: who has it, who is dead, and who may take it over."""

import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from megadpo.errors import CheckpointError
from megadpo.parallel import owner
from megadpo.parallel.owner import FILE, Owner, Ownership, lives, read_owner, this_start


def write(run_dir: Path, there: Owner, age: float = 0.0) -> None:
    run_dir.mkdir(exist_ok=True)
    (run_dir / FILE).write_text(json.dumps(asdict(there)))
    os.utime(run_dir / FILE, (time.time() - age, time.time() - age))


def take(run_dir: Path) -> list[str]:
    """What was told; the folder is free again afterwards."""
    told: list[str] = []
    with Ownership(run_dir) as mine:
        mine.take(told.append)
        there = read_owner(run_dir)
        assert there is not None
        assert there.pid == os.getpid()
        assert [path.name for path in run_dir.iterdir()] == [FILE], "nothing else is left"
    assert not (run_dir / FILE).exists()
    return told


def test_a_second_start_is_refused_while_the_first_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owner, "DYING", 0.1)
    with Ownership(tmp_path) as first:
        first.take(lambda line: None)
        with Ownership(tmp_path) as second, pytest.raises(CheckpointError) as caught:
            second.take(lambda line: None)
        assert (tmp_path / FILE).exists(), "the one that was refused leaves the other's alone"
    message = str(caught.value)
    assert f"process {os.getpid()} on " in message
    assert "trains in it already; wait for its end, save and end it (kill -INT" in message
    assert f"delete {tmp_path / FILE}" in message
    assert "\n" not in message
    assert caught.value.exit_code == 2
    assert take(tmp_path) == [], "and it is free at the end"


def test_of_many_at_once_one_gets_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over a dead owner's file, too."""
    monkeypatch.setattr(owner, "DYING", 0.1)
    for dead in (False, True):
        run_dir = tmp_path / str(dead)
        run_dir.mkdir()
        if dead:
            write(run_dir, replace(this_start(), started=1))
        got: list[bool] = []
        all_tried, begin = threading.Barrier(8), threading.Barrier(8)

        def one(run_dir: Path, got: list[bool], begin: threading.Barrier, all_tried: threading.Barrier) -> None:
            with Ownership(run_dir) as mine:
                begin.wait()
                try:
                    mine.take(lambda line: None)
                    got.append(True)
                except CheckpointError:
                    got.append(False)
                all_tried.wait()

        threads = [threading.Thread(target=one, args=(run_dir, got, begin, all_tried)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(got) == [False] * 7 + [True]


def test_a_dead_process_of_this_machine(tmp_path: Path) -> None:
    """Gone, or another one has its number by now."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    me = this_start()
    for there in (replace(me, pid=child.pid), replace(me, started=me.started + 1)):
        write(tmp_path / "run", there)
        [line] = take(tmp_path / "run")
        assert f"process {there.pid} on {me.host}" in line
        assert "no longer lives: this start takes" in line


def test_a_killed_one_has_a_moment_to_be_gone(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    write(tmp_path / "run", replace(this_start(), pid=child.pid, started=owner.began(child.pid) or 0))
    threading.Timer(0.3, child.kill).start()
    assert len(take(tmp_path / "run")) == 1
    child.wait()


def squeue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    (tmp_path / "bin").mkdir(exist_ok=True)
    (tmp_path / "bin" / "squeue").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "bin" / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/bin:/usr/bin")


def test_a_job_of_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On another node: the same job again (a requeue), a job that is gone, and one that is still in the queue."""
    me = replace(this_start(), job="17", cluster="here")
    there = replace(me, host="n2", machine="another")
    assert lives(there, me) is False
    squeue(tmp_path, monkeypatch, "echo 'RUNNING|n2'")
    assert lives(replace(there, job="16"), me) is True
    assert lives(replace(there, job="16", cluster="elsewhere"), me) is None
    squeue(tmp_path, monkeypatch, "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    assert lives(replace(there, job="16"), me) is False
    squeue(tmp_path, monkeypatch, "exit 1")
    assert lives(replace(there, job="16"), me) is None
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_CLUSTER_NAME", "here")
    write(tmp_path / "run", there)
    [line] = take(tmp_path / "run")
    assert "in job 17" in line
    squeue(tmp_path, monkeypatch, "echo 'PENDING|(Resources)'")
    write(tmp_path / "run", replace(there, job="16"))
    with Ownership(tmp_path / "run") as mine, pytest.raises(CheckpointError, match=r"scancel --signal=INT 16"):
        mine.take(lambda line: None)


def test_a_restart_by_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "abc")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    me = this_start()
    there = replace(me, machine="another", restart=0)
    assert lives(there, me) is False
    assert lives(replace(there, restart=1), me) is None
    assert lives(replace(there, run="other"), me) is None


def test_on_another_machine_signs_of_life_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = replace(this_start(), machine="another", job=None)
    write(tmp_path / "run", there, age=owner.DEAD + 1)
    assert len(take(tmp_path / "run")) == 1, "silent for long: dead"
    monkeypatch.setattr(owner, "DEAD", 3.0)
    write(tmp_path / "run", there)
    told = take(tmp_path / "run")
    assert "waiting for a sign of life of it, 3 s at most" in told[0]
    assert "takes" in told[1]
    monkeypatch.setattr(owner, "DEAD", 60.0)
    write(tmp_path / "run", there)
    threading.Timer(0.5, lambda: os.utime(tmp_path / "run" / FILE)).start()
    with Ownership(tmp_path / "run") as mine, pytest.raises(CheckpointError, match=r"if you know that it is dead"):
        mine.take(lambda line: None)


def test_it_shows_that_it_lives_and_that_it_was_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owner, "BEAT", 0.05)
    ended: list[int] = []
    monkeypatch.setattr(owner.os, "_exit", ended.append)
    with Ownership(tmp_path) as mine:
        mine.take(lambda line: None)
        os.utime(tmp_path / FILE, (1, 1))
        time.sleep(0.5)
        assert (tmp_path / FILE).stat().st_mtime > 1
        (tmp_path / FILE).unlink()
        time.sleep(0.5)
        assert (tmp_path / FILE).exists(), "removed by someone, it is there again"
        assert not ended
        write(tmp_path, replace(this_start(), pid=1))
        time.sleep(0.5)
        assert ended, "who was taken for dead and woke up must not write any more"
    assert (tmp_path / FILE).exists(), "which is the other's"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"token": "../x"}', "[" * 100_000])
def test_a_file_that_nobody_can_read(tmp_path: Path, text: str) -> None:
    """Half written, by a machine that went down: its age decides."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / FILE).write_text(text)
    os.utime(tmp_path / "run" / FILE, (1, 1))
    [line] = take(tmp_path / "run")
    assert "an unknown machine" in line


def test_where_there_are_no_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(owner.os, "link", refuse)
    monkeypatch.setattr(owner, "DYING", 0.1)
    with Ownership(tmp_path / "run") as first:
        first.take(lambda line: None)
        with Ownership(tmp_path / "run") as second, pytest.raises(CheckpointError, match="trains in it already"):
            second.take(lambda line: None)
    assert take(tmp_path / "run") == []
