"""What stands on the terminal: one line that moves, or, where no terminal is, a plain line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import IO, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.text import Text

from megadpo.observe.speed import TimeLeft, clock, short

# What of a record stands in the progress line, where the objective has it: (key, words around the number).
SHOWN = (
    ("loss", "loss {}"),
    ("rewards/margins", "margin {}"),
    ("rewards/accuracies", "acc {}"),
    ("pairs_per_second", "{} {what}/s"),
    ("tokens_per_second", "{} tok/s"),
)
GAP = "  "
WIDE, BAR = 140, 20
"""Columns from which a bar has room beside the numbers, and the bar's."""


def numbers(record: Mapping[str, Any], what: str = "pairs") -> list[str]:
    """The record's most important numbers in words, the most important first. what: what a group of data is."""
    return [words.format(short(record[key]), what=what) for key, words in SHOWN if key in record]


class Terminal(Console):
    """A console that leaves a lost terminal to its user; rich would end the process."""

    def __init__(self, file: IO[str] | None = None) -> None:
        super().__init__(file=file, highlight=False)

    def on_broken_pipe(self) -> None:
        raise  # the BrokenPipeError in whose handling rich calls this


def restore_cursor() -> None:
    """Show the cursor again on the terminal of a process that drew and was killed."""
    Console(file=sys.__stdout__).show_cursor(True)


class Screen:
    """Lines that stay, and tasks (something of a total) that move.

    Losing the terminal never stops a run: drawing just ends.
    """

    def __init__(self, console: Console, now: Callable[[], float] = time.monotonic, every: float = 10.0) -> None:
        """now: seconds, any clock that only goes forward. every: seconds between lines without a terminal."""
        self.now = now
        self.pause = 0.1 if console.is_terminal else every
        self._console: Console | None = console
        wide = console.width >= WIDE
        self._room = console.width - (BAR + 2 if wide else 0)
        bar = [BarColumn(bar_width=BAR)] if wide else []
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            *bar,
            TextColumn("{task.fields[text]}", markup=False),
            console=console,
            transient=True,
            auto_refresh=False,  # no thread: ranks fork (checkpoint writers) while this is on the screen
            redirect_stdout=False,  # what libraries print belongs in the rank's log
            redirect_stderr=False,
        )

    def line(self, text: str) -> None:
        """A line that stays, above what moves."""
        if self._console is not None:
            with self._drawing():
                self._console.print(Text(text), soft_wrap=True)

    @contextmanager
    def task(self, name: str, total: int | None, done: int = 0) -> Iterator[Task]:
        """A task for the length of a with-block; it leaves nothing on a terminal."""
        task = Task(self, name, total, done)
        try:
            yield task
        finally:
            self._drop(task)

    def draw(self, task: Task, title: str, parts: list[str], left: str) -> None:
        """One line for the task. Where it is too long for the terminal the gaps go first, then the last parts."""
        if self._console is None:
            return
        with self._drawing():
            if not self._console.is_terminal:
                self._console.print(Text(_joined([title, *parts, left])), soft_wrap=True)
                return
            gap = GAP if len(_joined([title, *parts, left])) <= self._room else " "
            while parts and len(_joined([title, *parts, left], gap)) > self._room:
                parts = parts[:-1]
            text = _joined([*parts, left], gap)
            if task.id is None:
                task.id = self._progress.add_task(title, total=task.total, text=text)
                self._progress.start()
            self._progress.update(task.id, description=title, completed=task.done, text=text, refresh=True)

    def _drop(self, task: Task) -> None:
        if task.id is None:
            return
        self._progress.remove_task(task.id)
        with self._drawing():
            if not self._progress.task_ids:
                self._progress.stop()

    @contextmanager
    def _drawing(self) -> Iterator[None]:
        try:
            yield
        except OSError:  # the terminal was closed, or the reader of a pipe has gone
            self._console = None


class Task:
    """Something of a total that goes on."""

    def __init__(self, screen: Screen, name: str, total: int | None, done: int) -> None:
        self.name, self.total, self.done = name, total, done
        self.id: TaskID | None = None
        """Set by the screen once it stands on a terminal."""
        self._screen = screen
        self._left = TimeLeft(total or 0)
        self._left.mark(done, screen.now())
        self._drawn: float | None = None
        self._drawn_done = -1

    @property
    def stands(self) -> bool:
        """Whether what was done last can still be read: a terminal's line is gone with the task."""
        return self.id is None and self._drawn_done == self.done

    def to(self, done: int, parts: Sequence[str] = ()) -> None:
        """So much is done; parts: what else to say of it. Drawn first, last, and in between now and then."""
        now = self._screen.now()
        self.done = done
        self._left.mark(done, now)
        last = self.total is not None and done >= self.total
        if self._drawn is not None and not last and now - self._drawn < self._screen.pause:
            return
        self._drawn, self._drawn_done = now, done
        seconds = self._left.seconds()
        left = f"{clock(seconds)} left" if seconds is not None and self.total is not None and not last else ""
        of_total = "" if self.total is None else f"/{self.total:,}"
        self._screen.draw(self, f"{self.name} {done:,}{of_total}", list(parts), left)


def _joined(parts: list[str], gap: str = GAP) -> str:
    return gap.join(part for part in parts if part)
