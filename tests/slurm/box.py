"""The test cluster as Python sees it, run files for it, and a stand-in for training that costs nothing."""

import json
import os
import shutil
import signal
import subprocess
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

SCRIPT = Path(__file__).with_name("cluster.sh")
ROOT = Path(__file__).resolve().parents[2]
TOOLS = ("sbatch", "squeue", "scontrol", "scancel", "sinfo")
INSTALL = "apt-get install --no-install-recommends slurmctld slurmd slurm-client iproute2"
PATIENCE = 240.0
"""Seconds for anything to happen; a loaded machine is slow."""


def missing() -> str | None:
    """Why there can be no cluster here."""
    if os.geteuid() != 0:
        return "needs root, for network namespaces: run the tests as root (in a container: --privileged)"
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    absent = [name for name in ("slurmctld", "slurmd", "sbatch", "ip", "unshare") if not shutil.which(name, path=path)]
    if absent:
        return f"{', '.join(absent)} not installed: {INSTALL}"
    allowed = subprocess.run(["unshare", "--net", "--pid", "--fork", "--mount", "true"], capture_output=True)
    return None if allowed.returncode == 0 else f"no namespaces here: {allowed.stderr.decode().strip()}"


def until(what: str, true: Any, patience: float = PATIENCE) -> Any:
    """Wait for a condition, and give its value."""
    end = time.monotonic() + patience
    while time.monotonic() < end:
        value = true()
        if value:
            return value
        time.sleep(0.1)
    raise AssertionError(f"not in {patience:.0f} s: {what}")


@dataclass
class Cluster:
    """`tools` is for PATH: commands of SLURM that run inside."""

    folder: Path
    process: subprocess.Popen

    @classmethod
    def start(cls, folder: Path, nodes: int, **settings: str) -> "Cluster":
        folder.mkdir(parents=True)
        tools = folder / "tools"
        tools.mkdir()
        for name in TOOLS:
            (tools / name).write_text(f'#!/bin/sh\nexec {SCRIPT} in {folder} {name} "$@"\n')
            (tools / name).chmod(0o755)
        log = (folder / "up.log").open("w")
        # Dies with the test process, and all of the cluster with it.
        command = ["setpriv", "--pdeathsig", "KILL", str(SCRIPT), "up", str(folder), str(nodes)]
        process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | settings)
        cluster = cls(folder, process)
        try:
            until("the cluster is up", lambda: (folder / "ready").exists() or process.poll() is not None, 60)
            assert process.poll() is None
        except AssertionError:
            cluster.stop()
            logs = "\n".join(path.read_text()[-2000:] for path in [folder / "up.log", *folder.glob("log/*")])
            raise AssertionError(f"no cluster:\n{logs}") from None
        return cluster

    def stop(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def run(self, *command: str) -> str:
        done = subprocess.run(
            [str(SCRIPT), "in", str(self.folder), *command], capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def act(self, *arguments: str) -> None:
        """kill, start, on."""
        action, *others = arguments
        subprocess.run([str(SCRIPT), action, str(self.folder), *others], timeout=60, check=True)

    def job(self, number: str) -> dict[str, str]:
        """What SLURM knows of a job, of a finished one too."""
        text = self.run("scontrol", "--oneliner", "show", "job", number)
        return dict(word.split("=", 1) for word in text.split() if "=" in word)

    def state(self, number: str) -> str:
        return self.job(number)["JobState"]

    def ended(self, number: str) -> dict[str, str]:
        """Wait for the end of a job."""
        job: dict[str, str] = until(f"job {number} ends", lambda: self.ended_yet(number))
        return job

    def ended_yet(self, number: str) -> dict[str, str] | None:
        """The job where it has ended. A requeued job waits two minutes for the credential of its last start to run out;
        here it need not. (The new one must only not be of the same second.)"""
        job = self.job(number)
        if job["JobState"] == "PENDING" and job["Reason"] == "BeginTime":
            time.sleep(2)
            self.run("scontrol", "update", f"jobid={number}", "StartTime=now")
        # states that a requeued job does not leave again; SIGNALING, PREEMPTED, NODE_FAIL and others pass
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL")
        return job if job["JobState"] in over else None


@dataclass(frozen=True)
class Run:
    """A run folder with its run file."""

    folder: Path

    @property
    def file(self) -> str:
        return str(self.folder.with_suffix(".yaml"))

    @property
    def number(self) -> str:
        return (self.folder / "slurm" / "job").read_text().strip()

    def log(self) -> str:
        path = self.folder / "logs" / f"slurm-{self.number}.log"
        return path.read_text() if path.exists() else ""

    def events(self) -> list[tuple[str, int | None]]:
        return [(event["event"], event["code"]) for event in self.records("slurm/attempts.jsonl")]

    def records(self, name: str) -> list[dict[str, Any]]:
        path = self.folder / name
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def write_run(folder: Path, **sections: Any) -> Run:
    """A run file with the settings given, beside its run folder."""
    run = Run(folder)
    settings = {"run_dir": str(folder), "model": {"path": "model"}, "data": {"train": "pairs.jsonl"}} | sections
    Path(run.file).write_text(yaml.safe_dump(settings))
    return run


def stand_in(path: Path, body: str) -> str:
    """A program in the place of Python: on each node it gets the arguments of training, and runs `body` in bash.

    The body has $run, $start (which start this is, from 1), $rank; `save N` makes a checkpoint, `end CODE` writes what
    the ranks say of their end, `sleeping` waits for a signal. Asked for the preflight, it runs `preflight` at #TRAIN.
    """
    path.write_text(
        textwrap.dedent("""\
        #!/bin/bash
        rank=$SLURM_PROCID
        save() { mkdir -p "$run/checkpoints/step-0000000$1"; }
        end() { echo "$1" >"$MEGADPO_END_FILE"; }
        sleeping() { for _ in {1..3000}; do sleep 0.1; done; }
        preflight() { exit 0; }
        if [[ $1 == */preflight.py ]]; then run=$3; else run=$(dirname "$(dirname "$4")"); fi
        start=$(grep -cs '"start"' "$run/slurm/attempts.jsonl")
        """)
        + textwrap.dedent(body).replace("#TRAIN\n", "if [[ $1 == */preflight.py ]]; then preflight; fi\n")
    )
    path.chmod(0o755)
    return str(path)
