"""The sides of tools/bench_step.py: processes that stay, and take turns."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from step_sides import TRL, Work


class SideFailedError(Exception):
    """A side ended before its last turn."""


@dataclass
class Side:
    """Its processes, and what they answered: one record per turn."""

    name: str
    processes: list[subprocess.Popen[str]]
    steps: list[dict[str, float]] = field(default_factory=list)
    references: list[dict[str, float]] = field(default_factory=list)
    memory: dict[str, float] = field(default_factory=dict)

    def ask(self, word: str) -> dict[str, float]:
        """Give the turn to all its processes and wait: the longest time, the sum of everything else."""
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write(word + "\n")
            process.stdin.flush()
        return together([self._answer(process) for process in self.processes])

    def wait_ready(self) -> None:
        for process in self.processes:
            self._answer(process)

    def _answer(self, process: subprocess.Popen[str]) -> dict[str, float]:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise SideFailedError(f"{self.name}: ended with exit code {process.wait()}; what it said stands above")
        answer: dict[str, float] = json.loads(line)
        return answer


def together(answers: list[dict[str, float]]) -> dict[str, float]:
    """One record of a side's processes."""
    summed = {name: sum(answer[name] for answer in answers) for name in answers[0]}
    for name, combine in (("seconds", max), ("loss", statistics.mean)):
        if name in summed:
            summed[name] = combine([answer[name] for answer in answers])
    return summed


def start(name: str, work: Work, python: str, folder: Path) -> Side:
    """Start a side's processes and wait until they are ready."""
    environment = os.environ | {"OMP_NUM_THREADS": str(work.threads), "GLOO_SOCKET_IFNAME": "lo"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HOME": str(folder / "hf")}
    script = Path(__file__).with_name("step_sides.py")
    meeting = f"file://{folder}/meeting-{name}"
    processes = [
        subprocess.Popen(
            [python, str(script), json.dumps(asdict(replace(work, rank=rank, rendezvous=meeting)))],
            env=environment | {"PYTHONPATH": str(script.parents[1])},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(folder / f"{name}-{rank}.log").open("w"),
            text=True,
        )
        for rank in range(work.ranks)
    ]
    side = Side(name, processes)
    side.wait_ready()
    return side


def take_turns(sides: list[Side], steps: int) -> None:
    """First every side that can its reference passes, then all the steps; turn about, nobody while another works."""
    for _ in range(steps):
        for side in sides:
            if side.name not in TRL:
                side.references.append(side.ask("reference"))
    for _ in range(steps):
        for side in sides:
            side.steps.append(side.ask("step"))
    for side in sides:
        side.memory = side.ask("end")


def alone(side: Side, steps: int) -> Side:
    """All its turns, then its end: for sides that do not fit on a GPU together."""
    take_turns([side], steps)
    for process in side.processes:
        process.wait()
    return side
