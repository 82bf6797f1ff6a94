"""Where the time of a step goes. At any moment it belongs to exactly one part, so the parts sum to the whole.

On a GPU the clock is the device's: an event on the current stream at every change of part, read when all is over, so
nothing waits for the device in between. What a part has there is how long the device's main stream took from one change
to the next, its idling included. On a CPU it is the process's monotonic clock.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch

Part = Literal["data", "reference", "forward", "head", "backward", "optimizer", "communication", "waiting", "other"]
PARTS: tuple[Part, ...] = Part.__args__  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Times:
    """Seconds."""

    steps: list[float]
    parts: dict[Part, float]
    """Of all steps together."""
    calls: dict[int, float]
    """Of every call that was given a number."""


class Parts:
    """A stopwatch with a part for every moment, and steps."""

    def __init__(self, device: torch.device, trace: bool = False) -> None:
        """trace: parts also become ranges of torch's profiler."""
        self._open: list[tuple[Part, int | None]] = []
        self._on_gpu = device.type == "cuda"
        self._device = device
        self._marks: list[tuple[Any, Part, int | None]] = []
        self._starts: list[int] = []
        """Marks that begin a step; the last one ends the last step."""
        self._trace = trace
        self._ranges: list[Any] = []

    def step(self) -> None:
        """A step begins, and the one before ends. To be called once more at the end of the last."""
        self._starts.append(len(self._marks))
        self._mark()

    def enter(self, part: Part, call: int | None = None) -> None:
        """From now on time belongs to `part`, until the `leave` that fits; then to what it was before."""
        self._open.append((part, call))
        if self._trace:
            self._ranges.append(torch.profiler.record_function(f"megadpo: {part}"))
            self._ranges[-1].__enter__()
        self._mark()

    def leave(self) -> None:
        self._open.pop()
        if self._ranges:
            self._ranges.pop().__exit__(None, None, None)
        self._mark()

    @contextmanager
    def part(self, part: Part, call: int | None = None) -> Iterator[None]:
        self.enter(part, call)
        try:
            yield
        finally:
            self.leave()

    def _mark(self) -> None:
        part, call = self._open[-1] if self._open else ("other", None)
        if self._on_gpu:
            moment: Any = torch.cuda.Event(enable_timing=True)
            moment.record()
        else:
            moment = time.perf_counter()
        self._marks.append((moment, part, call))

    def read(self) -> Times:
        """Waits for the device."""
        if self._on_gpu:
            torch.cuda.synchronize(self._device)
        parts: dict[Part, float] = dict.fromkeys(PARTS, 0.0)
        calls: dict[int, float] = defaultdict(float)
        steps = [0.0] * (len(self._starts) - 1)
        step = -1
        begins = set(self._starts[:-1])
        for index, (moment, part, call) in enumerate(self._marks[:-1]):
            step += index in begins
            if step < 0:
                continue
            seconds = self._between(moment, self._marks[index + 1][0])
            steps[step] += seconds
            parts[part] += seconds
            if call is not None:
                calls[call] += seconds
        return Times(steps, parts, dict(calls))

    def _between(self, start: Any, end: Any) -> float:
        return start.elapsed_time(end) / 1e3 if self._on_gpu else end - start


def profiler(file: str | None) -> Any:
    """torch's profiler over the device and the host, writing a trace for Perfetto; nothing where no file is given."""
    if file is None:
        return nullcontext()
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    return torch.profiler.profile(activities=activities, on_trace_ready=lambda done: done.export_chrome_trace(file))
