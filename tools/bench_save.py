"""What a checkpoint costs a step, written at once and in the background; and what hashing and verifying cost.

python tools/bench_save.py    one process, a Llama of 10 M parameters with AdamW's float32 state, on this machine

Processor seconds of the training thread are given beside the clock's: on a machine that others use, too, only they mean
something. What the disk takes is in the clock's alone.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path += [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests")]

STEPS = 8
"""Steps between two saves."""
REPEATS = int(sys.argv[1]) if len(sys.argv) > 1 else 4


def measure(device: object, folder: str) -> dict[str, float]:
    """Seconds: of a step, of the time that each kind of save takes from training, of verifying."""
    import numpy as np
    from tiny import random_groups, write_llama
    from train.engine import Case, build

    from megadpo import checkpoint
    from megadpo.data.packing import Budget
    from megadpo.parallel.context import grid
    from megadpo.train.step import train_step

    model = write_llama(Path(folder) / "llama", layers=8, hidden=256, ffn=768, heads=8, groups=8, vocab=8192)
    store = random_groups(64, vocab=8192, longest_prompt=60, longest_response=60)
    case = Case(model, store, distributed=True, budget=Budget(2048), batch=16)
    result: dict[str, float] = {}
    with grid(case.parallel, device, 0) as context:  # type: ignore[arg-type]
        state, stream = build(case, context)
        column = np.zeros(len(store.response_lengths), dtype=np.float32)

        def steps(saving: checkpoint.Saving | None) -> float:
            """Seconds of STEPS steps, the finish of a background save at a step's end included."""
            began = time.monotonic()
            for _ in range(STEPS):
                groups = stream.next_groups(state.consumed, 16)
                train_step(state, stream.batches(groups, 0, column), case.objective, None, context)
                if saving is not None and saving.done:
                    saving.finish()
                    saving = None
            if saving is not None:
                saving.finish()
            return time.monotonic() - began

        steps(None)
        bare, at_once, background, stalls = [], [], [], []
        cpu_bare, cpu_stalls = [], []
        for _ in range(REPEATS):
            cpu = time.thread_time()
            bare.append(steps(None))
            cpu_bare.append(time.thread_time() - cpu)
            began = time.monotonic()
            checkpoint.Saving(state, Path(folder), 99, 1, context, background=False).finish()
            at_once.append(time.monotonic() - began)
            began, cpu = time.monotonic(), time.thread_time()
            saving = checkpoint.Saving(state, Path(folder), 99, 1, context, background=True)
            stalls.append(time.monotonic() - began)
            cpu_stalls.append(time.thread_time() - cpu)
            background.append(stalls[-1] + steps(saving) - bare[-1])
        newest = checkpoint.latest(Path(folder))
        assert newest is not None
        began = time.monotonic()
        assert not checkpoint.damage(newest)
        result["verify"] = time.monotonic() - began
        result["bytes"] = float(sum(path.stat().st_size for path in newest.iterdir()))
        result["step"] = statistics.median(bare) / STEPS
        result["at_once"] = statistics.median(at_once)
        result["stall"] = statistics.median(stalls)
        result["cpu_step"] = statistics.median(cpu_bare) / STEPS
        result["cpu_stall"] = statistics.median(cpu_stalls)
        result["background"] = statistics.median(background)
    return result


def main() -> None:
    from distributed import run_ranks

    with tempfile.TemporaryDirectory() as folder:
        [found] = run_ranks(1, measure, folder)
    every, seconds = STEPS * found["step"], found["cpu_stall"]
    print(
        f"{found['bytes'] / 1e6:.0f} MB, step {found['step']:.2f} s: at once {found['at_once']:.2f} s; in the "
        f"background training stands still for {found['stall']:.3f} s, and {STEPS} steps with a save take "
        f"{100 * found['background'] / every:.1f} % longer; of the training thread's processor time the copy takes "
        f"{seconds:.3f} s, a step {found['cpu_step']:.2f} s; reading and hashing all of it {found['verify']:.2f} s "
        f"({found['bytes'] / 1e6 / found['verify']:.0f} MB/s)"
    )


if __name__ == "__main__":
    main()
