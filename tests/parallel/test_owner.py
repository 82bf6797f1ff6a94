"""One start at a time in a run folder: who has it, who is dead, and who may take it over."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from megadpo.errors import CheckpointError
from megadpo.parallel import owner
from megadpo.parallel.owner import FILE, Owner, Ownership, lives, read_owner, this_start


def write(run_dir: Path, there: Owner, age: float = 0.0) -> None:
    run_dir.mkdir(exist_ok=True)
    whole = run_dir / "whole"
    whole.write_text(json.dumps(asdict(there)))
    os.utime(whole, (time.time() - age, time.time() - age))
    whole.replace(run_dir / FILE)


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
    monkeypatch.chdir(tmp_path)
    with Ownership(tmp_path) as first:
        first.take(lambda line: None)
        with Ownership(Path()) as second, pytest.raises(CheckpointError) as caught:
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
    """On another node: the same job requeued, a job that is gone, and one that is still in the queue; two starts in one
    allocation are told apart by their signs of life."""
    me = replace(this_start(), job="17", cluster="here", requeue=1)
    there = replace(me, host="n2", machine="another", requeue=0)
    assert lives(there, me) is False
    assert lives(replace(there, requeue=1), me) is None
    squeue(tmp_path, monkeypatch, "echo 'RUNNING|n2'")
    assert lives(replace(there, job="16"), me) is True
    assert lives(replace(there, job="16", cluster="elsewhere"), me) is None
    squeue(tmp_path, monkeypatch, "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    assert lives(replace(there, job="16"), me) is False
    squeue(tmp_path, monkeypatch, "exit 1")
    assert lives(replace(there, job="16"), me) is None
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_CLUSTER_NAME", "here")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
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
    monkeypatch.setattr(owner, "DEAD", 2.0)
    write(tmp_path / "run", there)
    told = take(tmp_path / "run")
    assert "waiting for a sign of life of it, 2 s at most" in told[0]
    assert "takes" in told[1]
    monkeypatch.setattr(owner, "DEAD", 60.0)
    write(tmp_path / "run", there)
    threading.Timer(0.5, lambda: os.utime(tmp_path / "run" / FILE)).start()
    with Ownership(tmp_path / "run") as mine, pytest.raises(CheckpointError, match=r"if you know that it is dead"):
        mine.take(lambda line: None)


def test_no_clock_decides_who_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Silent for long, by its file: two beats are awaited, for the clock may have jumped. From the future: no longer
    than from now."""
    there = replace(this_start(), machine="another", job=None)
    monkeypatch.setattr(owner, "BEAT", 0.4)
    write(tmp_path / "old", there, age=owner.DEAD + 60)
    assert "1 s at most" in take(tmp_path / "old")[0]
    monkeypatch.setattr(owner, "BEAT", 5.0)
    write(tmp_path / "lives", there, age=owner.DEAD + 60)
    threading.Timer(0.5, lambda: os.utime(tmp_path / "lives" / FILE, (1, 1))).start()
    with Ownership(tmp_path / "lives") as mine, pytest.raises(CheckpointError, match="trains in it already"):
        mine.take(lambda line: None)
    monkeypatch.setattr(owner, "DEAD", 2.0)
    write(tmp_path / "ahead", there, age=-3600)
    began = time.monotonic()
    assert "2 s at most" in take(tmp_path / "ahead")[0]
    assert time.monotonic() - began < 10


def test_it_shows_that_it_lives_and_that_it_was_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(owner, "BEAT", 0.05)
    ended: list[int] = []
    monkeypatch.setattr(owner.os, "_exit", ended.append)
    file = tmp_path / FILE
    with Ownership(tmp_path) as mine:
        mine.take(lambda line: None)
        me = read_owner(tmp_path)
        os.utime(file, (1, 1))
        time.sleep(0.3)
        assert file.stat().st_mtime > 1
        for text in (None, '{"token', ""):
            if text is None:
                file.unlink()
            else:
                file.write_text(text)
            time.sleep(0.3)
            assert read_owner(tmp_path) == me, "removed or broken by someone, it is there again"
        assert [path.name for path in tmp_path.iterdir()] == [FILE]
        assert not ended
        write(tmp_path, replace(this_start(), pid=1))
        time.sleep(0.3)
        assert ended, "who was taken for dead and woke up must not write any more"
        said = capsys.readouterr().err.splitlines()[0]
        assert said.startswith("process 1 on ")
        assert f" took {tmp_path} over, while this process ({os.getpid()} on " in said
        assert "ends without a save" in said
    assert file.exists(), "which is the other's"


def test_a_read_that_fails_ends_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does another's file that is seen once only."""
    monkeypatch.setattr(owner, "BEAT", 0.02)
    ended: list[int] = []
    monkeypatch.setattr(owner.os, "_exit", ended.append)
    read, looks = owner._read, [0]
    other = json.dumps(asdict(replace(this_start(), pid=1))).encode()

    def sometimes(path: Path) -> bytes | None:
        looks[0] += 1
        if looks[0] in (3, 4):
            raise OSError(116, "Stale file handle")
        return other if looks[0] in (6, 9) else read(path)

    with Ownership(tmp_path) as mine:
        mine.take(lambda line: None)
        monkeypatch.setattr(owner, "_read", sometimes)
        end = time.monotonic() + 10
        while looks[0] < 12 and time.monotonic() < end:
            time.sleep(0.02)
        assert looks[0] >= 12, "it goes on looking"
        assert not ended
    assert not (tmp_path / FILE).exists()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"token": "../x"}', "[" * 100_000])
def test_a_file_that_nobody_can_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """Half written, by a machine that went down: nobody writes it anew."""
    monkeypatch.setattr(owner, "BEAT", 0.1)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / FILE).write_text(text)
    os.utime(tmp_path / "run" / FILE, (1, 1))
    assert all("an unknown machine" in line for line in take(tmp_path / "run"))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: path.symlink_to("nowhere"), "symbolic links"),
        (os.mkfifo, "no regular file"),
        (os.mkdir, "no regular file"),
    ],
    ids=["dangling link", "pipe", "folder"],
)
def test_what_is_no_file(tmp_path: Path, make: Callable[[Path], None], reason: str) -> None:
    """Told at once, and left as it is."""
    make(tmp_path / FILE)
    with Ownership(tmp_path) as mine, pytest.raises(CheckpointError, match=rf"{FILE} cannot be read \(.*{reason}"):
        mine.take(lambda line: None)
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


@pytest.mark.parametrize(
    "odd",
    [{"token": "a" * 5000}, {"token": "९"}, {"host": "\x1b[2J\nX"}, {"job": ["a"]}, {"since": None}, {"pid": 10**30}],
    ids=str,
)
def test_what_no_start_says_of_itself_is_not_shown(tmp_path: Path, odd: dict[str, object]) -> None:
    (tmp_path / FILE).write_text(json.dumps(asdict(this_start()) | odd))
    there = read_owner(tmp_path)
    assert there is not None
    assert there.host == "an unknown machine"
    assert str(there).isprintable()


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
