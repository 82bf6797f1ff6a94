"""The log of a run: metrics.jsonl, the progress line, TensorBoard, W&B. Only rank 0 writes."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import TextIO

import yaml
from rich.console import Console

from megadpo.config import Config
from megadpo.config.decode import to_yaml
from megadpo.files import storage_errors, write_text
from megadpo.objectives.kinds import Kind, kind_of
from megadpo.observe.progress import Screen, Task, Terminal, numbers
from megadpo.observe.trackers import Tracker, open_trackers
from megadpo.observe.versions import versions

METRICS = "metrics.jsonl"
HELD_OUT = "eval_"
"""What the names of held-out metrics begin with."""
GROUPS: dict[Kind, str] = {"demonstrations": "responses", "unpaired": "responses", "pairs": "pairs", "lists": "lists"}
"""What a group of data is, in the step line; the record's key is pairs_per_second for all."""


class RunLog:
    """What a run tells, for the length of a with-block.

    Lines and phases may come at any time, records only after `resume`. Raises StorageError where the run
    folder cannot be written, MachineError where a tracker is missing.
    """

    def __init__(
        self,
        run_dir: str | Path,
        total_steps: int,
        config: Config,
        enabled: bool,
        console: Console | None = None,
    ) -> None:
        """total_steps: updates of the whole run. enabled: false on every rank but 0. console: standard output
        where not given."""
        self._folder = Path(run_dir).expanduser()
        self._total = total_steps
        self._config = config
        self._what = GROUPS[kind_of(config.objective)]
        self._screen: Screen | None = None
        self._file: TextIO | None = None
        self._trackers: list[Tracker] = []
        self._training: Task | None = None
        self._last: Mapping[str, float | int] = {}
        self._closing = ExitStack()
        if enabled:
            # sys.stdout of a rank is its log file (launch/worker.py); the interpreter's own is the terminal.
            self._screen = Screen(console or Terminal(sys.__stdout__))

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def resume(self, step: int) -> None:
        """Open the log to go on after `step`; records of later steps are dropped (0: all, the run begins anew)."""
        if self._screen is None:
            return
        path = self._folder / METRICS
        last = step or -1  # a run that begins anew writes step 0 anew
        truncate_after(path, last)
        with storage_errors(path):
            self._folder.mkdir(parents=True, exist_ok=True)
            self._file = self._closing.enter_context(path.open("a", encoding="utf-8"))
            settings = yaml.safe_load(to_yaml(self._config))
            self._trackers = open_trackers(self._folder, self._config.log, settings, last + 1)
        self._training = self._closing.enter_context(self._screen.task("step", self._total, step))

    def rewind(self, step: int) -> None:
        """Training goes on after `step`, an earlier one."""
        self.close()
        self.resume(step)

    def step(self, record: Mapping[str, float | int]) -> None:
        """One record; `record["step"]` counts updates from 1. NaN and infinity are written as null.

        A record of held-out metrics has names that begin with eval_.
        """
        if self._screen is None:
            return
        assert self._file is not None, "resume comes first"
        assert self._training is not None
        line = json.dumps({name: _finite(value) for name, value in record.items()}, allow_nan=False)
        with storage_errors(self._folder / METRICS):
            self._file.write(line + "\n")
            self._file.flush()
            for tracker in self._trackers:
                tracker.log(int(record["step"]), {name: value for name, value in record.items() if name != "step"})
        held_out = {name[len(HELD_OUT) :]: record[name] for name in record if name.startswith(HELD_OUT)}
        if held_out:
            self.line(f"step {record['step']:,}, held-out data  {'  '.join(numbers(held_out))}")
        else:
            self._last = record
            self._training.to(int(record["step"]), numbers(record, self._what))

    def line(self, text: str) -> None:
        """A line on the terminal."""
        if self._screen is not None:
            self._screen.line(text)

    def banner(self, lines: list[str]) -> None:
        """Lines on the terminal, before the run begins."""
        for text in lines:
            self.line(text)

    @contextmanager
    def phase(self, description: str, total: int | None) -> Iterator[Callable[[int], None]]:
        """Progress of work that is no step; gives what to call with how much of the total is done by now."""
        if self._screen is None:
            yield lambda done: None
            return
        with self._screen.task(description, total) as task:
            yield task.to

    def close(self) -> None:
        """Finish every file and take the progress line off the terminal; the last numbers stay."""
        self._closing.close()
        for tracker in self._trackers:
            tracker.close()
        if self._last and self._training is not None and not self._training.stands:
            self.line(f"step {self._last['step']:,}/{self._total:,}  {'  '.join(numbers(self._last, self._what))}")
        self._trackers, self._last = [], {}


def truncate_after(path: Path, step: int) -> None:
    """Drop the records of later steps and a half-written last line, so that every step stands once.

    Raises StorageError; the file is replaced whole or stays.
    """
    if not path.exists():
        return
    with storage_errors(path):
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    write_text(path, "".join(f"{line}\n" for line in lines if _step_of(line) <= step))


def write_run_files(run_dir: str | Path, config: Config) -> None:
    """Save run.yaml (the resolved run file) and versions.json in the run folder. Raises StorageError."""
    folder = Path(run_dir).expanduser()
    write_text(folder / "run.yaml", to_yaml(config))
    write_text(folder / "versions.json", json.dumps(versions(), indent=1) + "\n")


def _finite(value: float | int) -> float | int | None:
    return value if math.isfinite(value) else None


def _step_of(line: str) -> float:
    """The step of a record; infinity for a line that is none."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf
