"""What a checkpoint costs training, written in the background and at once; and what hashing and verifying cost.

python tools/bench_save.py [REPEATS]    one process, a Llama of 10 M parameters with AdamW's float32 state

"Stands still" is the time in which the training thread does nothing for training: it begins the save, waits before the
next update for the copy, and goes from stage to stage at the end of later steps. What it loses beside that, to the
other thread's use of memory, disk and Python's lock, shows in steps that take longer. The model is small and its steps
are short for it (1,000 tokens or so), so the share is that of a bad case: time to save grows with parameters, time of a
step with parameters x tokens.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path += [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests")]

STEPS = 16
"""Steps between two saves."""
BATCH = 16
REPEATS = int(sys.argv[1]) if len(sys.argv) > 1 else 4


class Bench:
    """A run that is stepped and saved by hand, with a clock on what keeps the training thread."""

    def __init__(self, device: Any, folder: Path, context: Any) -> None:
        import numpy as np
        from tiny import random_groups, write_llama
        from train.engine import Case, build

        from megadpo.data.packing import Budget

        model = write_llama(folder / "llama", layers=8, hidden=256, ffn=768, heads=8, groups=8, vocab=8192)
        store = random_groups(64, vocab=8192, longest_prompt=60, longest_response=60)
        self.case = Case(model, store, distributed=True, budget=Budget(2048), batch=BATCH)
        self.folder, self.context = folder, context
        self.state, self.stream = build(self.case, context)
        self.column = np.zeros(len(store.response_lengths), dtype=np.float32)
        self.waited: list[float] = []
        """Seconds, by the clock, of what kept the training thread."""
        self.worked: list[float] = []
        """Its processor seconds in them."""

    def batches(self, number: int) -> Any:
        """The same at every repeat."""
        return self.stream.batches(self.stream.next_groups(number * BATCH, BATCH), 0, self.column)

    def timed(self, work: Callable[[], Any]) -> Any:
        began, cpu = time.monotonic(), time.thread_time()
        result = work()
        self.waited.append(time.monotonic() - began)
        self.worked.append(time.thread_time() - cpu)
        return result

    def steps(self, saving: Any = None) -> list[float]:
        """Seconds of each of STEPS steps, as train/loop.py does them; at last the save's end is waited for."""
        from megadpo.train.step import train_step

        seconds = []
        for number in range(STEPS):
            began = time.monotonic()
            train_step(self.state, self.batches(number), self.case.objective, None, self.context)
            if saving is not None and saving.done and self.timed(saving.advance) is not None:
                saving = None
            seconds.append(time.monotonic() - began)
        if saving is not None:
            self.timed(saving.finish)
        return seconds

    def save(self, background: bool, before: Any = None) -> Any:
        from megadpo import checkpoint

        return checkpoint.Saving(self.state, self.folder, 99, 1, self.context, background, before)

    def saved(self, before: Any) -> float:
        """Seconds of STEPS steps with a save in the background; `waited` has its begin, the copy, and the rest."""
        self.waited, self.worked, began = [], [], time.monotonic()
        saving = self.timed(lambda: self.save(True, before))
        free = self.state.until_free
        first = iter([True])
        self.state.until_free = lambda: self.timed(free) if next(first, False) else None
        self.steps(saving)
        return time.monotonic() - began


def measure(device: Any, name: str) -> dict[str, float]:
    """Seconds, medians over the repeats."""
    from megadpo import checkpoint
    from megadpo.config import ParallelConfig
    from megadpo.parallel.context import grid

    folder = Path(name)
    found: dict[str, list[float]] = {}

    def note(**values: float) -> None:
        for name, value in values.items():
            found.setdefault(name, []).append(value)

    with grid(ParallelConfig(), device, 0) as context:
        bench = Bench(device, folder, context)
        first = bench.save(True) if bench.steps() else None  # plans, and gets the memory for the copy
        bench.steps(first)
        for _ in range(REPEATS):
            cpu = time.thread_time()
            bare = bench.steps()
            cpu = time.thread_time() - cpu
            began = time.monotonic()
            bench.save(False).finish()
            note(step=statistics.median(bare), at_once=time.monotonic() - began)
            cpu_saving = time.thread_time()
            seconds = bench.saved(first)
            cpu_saving = time.thread_time() - cpu_saving
            note(begin=bench.waited[0], copy=bench.waited[1], end=sum(bench.waited[2:]), still=sum(bench.waited))
            note(work=sum(bench.worked), longer=seconds / sum(bare) - 1, cpu_longer=cpu_saving / cpu - 1)
        newest = checkpoint.latest(folder)
        assert newest is not None
        began = time.monotonic()
        assert not checkpoint.damage(newest)
        note(verify=time.monotonic() - began, bytes=float(sum(path.stat().st_size for path in newest.iterdir())))
        note(parameters=float(sum(p.numel() for m in bench.state.modules for p in m.parameters())))
        note(tokens=float(sum(len(batch.tokens_T) for batch in bench.batches(0))))
    return {name: statistics.median(values) for name, values in found.items()}


def report(found: dict[str, float], busy: float) -> str:
    """busy: processes that wanted a core, on average, before the measurement began."""
    ms = {name: f"{1000 * found[name]:.0f}" for name in ("still", "begin", "copy", "end", "work")}
    step, cores = found["step"], len(os.sched_getaffinity(0))
    others = f"others used them too, load {busy:.1f} before" if busy > 0.5 else "nobody else used them"
    share = 100 * found["still"] / step
    verdict = "under" if share < 2 else "not under"
    return (
        f"a save takes {share:.1f} % of one step, {share / STEPS:.2f} % with {STEPS} steps between saves: {verdict} 2 "
        f"% of a step. ({found['parameters'] / 1e6:.0f} M parameters, {found['bytes'] / 1e6:.0f} MB, "
        f"{found['tokens']:.0f} tokens and {step:.2f} s a step, {cores} cores, {others}. Training stands still for "
        f"{ms['still']} ms: {ms['begin']} to begin, {ms['copy']} for the copy, {ms['end']} at the end; {ms['work']} ms "
        f"of it are work of its own. {STEPS} steps with a save take {100 * found['longer']:.1f} % longer by the clock, "
        f"and {100 * found['cpu_longer']:.1f} % more of the training thread's processor time. Written at once: "
        f"{found['at_once']:.2f} s. Reading and hashing all of it: {found['verify']:.2f} s)"
    )


def main() -> None:
    from distributed import run_ranks

    busy = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        [found] = run_ranks(1, measure, folder, timeout=1800)
    print(report(found, busy))


if __name__ == "__main__":
    main()
