"""Faults by the hundred, in a bounded time; writes the scorecard of docs/reliability.md.

python tools/soak.py                          all rows, about 45 minutes on a free machine with two cores
python tools/soak.py --minutes 5 --rows kills,resumes

A row that is not run keeps what was measured before. What a row counts is counted while it runs: trials, or tests of
pytest that passed and what they recorded (its junit file).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "reliability.md"
KEPT = ROOT / "tools" / "results" / "soak.json"
BEGIN, END = "<!-- scorecard: python tools/soak.py -->", "<!-- end of scorecard -->"


@dataclass(frozen=True)
class Row:
    what: str
    target: str
    peer: str
    run: Callable[[float], str]
    """Seconds to take, at most -> what was measured."""
    share: float = 0.0
    """Of the time."""


# ---- trials


def kills(seconds: float) -> str:
    from distributed import run_ranks
    from trials import SCENES, Kills, kill_at_every_call, kill_at_random

    def both(work: Callable[..., Kills], *arguments: object) -> Kills:
        """By two processes, each with jobs of its own."""
        one, other = run_ranks(2, work, Path(folder), *arguments, timeout=10 * seconds + 600)
        return one.add(other)

    # in memory where there is such a place: a kill does not reach the disk, and more of them fit into the time
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        random = both(kill_at_random, ["1", "data", "tensor"], 100_000, seconds * 0.5, 1)
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        calls = both(kill_at_every_call, ["1"], SCENES, seconds * 0.35, 1)
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        calls = calls.add(both(kill_at_every_call, ["data", "tensor"], SCENES[:1], seconds * 0.15, 3))
    every = random.add(calls)
    for line in every.lost + every.damaged:
        print(f"  {line}")
    two = sum(count for how, count in every.how.items() if not how.startswith("1 rank"))
    background = sum(count for how, count in every.how.items() if how.endswith("in the background"))
    part = f" (time ran out in {calls.unfinished} scenes)" if calls.unfinished else ""
    return (
        f"{every.kills} kills of megadpo's own saves, with engine, optimizer and gloo ranks of a small Llama: {two} of "
        f"jobs of two ranks (tensor 2 or data 2), {background} in the background, two checkpoints kept; {random.kills} "
        f"at random instants, {random.saves} saves were reported between them; {calls.kills} one before every call "
        f"that changes the folder, with two ranks every third{part}. {len(every.lost)} newest checkpoints lost (each "
        f"was loaded, and every number was its step's), {len(every.damaged)} listed ones damaged"
    )


def resumes(seconds: float) -> str:
    from trials import kill_and_resume

    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as name:
        result = kill_and_resume(Path(name), runs=1000, seconds=seconds, seed=3)
    for line in result.different[:5]:
        print(f"  {line}")
    how = ", ".join(f"{count} on {on}" for on, count in sorted(result.how.items()))
    return (
        f"{result.resumes} resumes in {result.runs} runs killed up to three times each ({how}); "
        f"{len(result.different)} differ (every step's groups, loss and gradient norm; weights, masters and moments at "
        "the end)"
    )


# ---- tests that count


def tests(*chosen: str, **environment: str) -> tuple[int, int, dict[str, list[str]]]:
    """(passed, not passed, recorded properties) of pytest."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-m", "slow or not slow", "--timeout=900", f"--junitxml={report}"]
        done = subprocess.run(
            [*command, *chosen], cwd=ROOT, env=os.environ | environment, stdout=subprocess.PIPE, text=True
        )
        if not report.exists():
            raise SystemExit(done.stdout)
        cases = list(ElementTree.parse(report).iter("testcase"))
    bad = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = [case for case in cases if case.find("skipped") is not None]
    for case in bad + skipped:
        print(f"  not passed: {case.get('classname')}.{case.get('name')}")
    found: dict[str, list[str]] = {}
    for entry in (entry for case in cases for entry in case.iter("property")):
        found.setdefault(entry.get("name", ""), []).append(entry.get("value", ""))
    return len(cases) - len(bad) - len(skipped), len(bad) + len(skipped), found


def resharded(_: float) -> str:
    _, failed, found = tests("tests/checkpoint/test_checkpoint.py", "-k", "every_pair")
    kinds = found.get("pairs", [])
    pairs = sum(int(kind.split()[0]) for kind in kinds)
    return f"{pairs} pairs of grids equal, weights too ({', '.join(kinds)}); {failed} tests failed"


def faults(_: float) -> str:
    passed, failed, found = tests("tests/train/test_faults.py", "-k", "not everyone_s_stack and not before_training")
    kinds = len(set(found.get("fault", [])))
    return f"{kinds} kinds in {passed + failed} tests (hangs of ranks apart); {failed} tests failed"


def hangs(_: float) -> str:
    chosen = "everyone_s_stack or before_training"
    _, failed, found = tests("tests/train/test_faults.py", "-k", chosen, MEGADPO_TEST_HANG_TIMEOUT="50")
    seconds = [float(value) for value in found.get("seconds", [])]
    worst = f"noticed and ended after {max(seconds):.1f} s at most" if seconds else "none noticed"
    return f"{len(seconds)} kinds: {worst}; {failed} tests failed"


def bad_inputs(_: float) -> str:
    passed, failed, _ = tests("tests/train/test_bad_input.py")
    _, worse, found = tests("tests/cli/test_bad_settings.py")
    settings = sum(map(int, found.get("cases", [])))
    return (
        f"{settings + passed} refused ({settings} settings, {passed} data, model and run folders); {failed + worse} not"
    )


def corruption(_: float) -> str:
    passed, failed, found = tests("tests/checkpoint/test_damage.py", "-k", "every_damage")
    return f"{sum(map(int, found.get('kinds', []))) if passed else 0} kinds, all noticed; {failed} tests failed"


def hostile(_: float) -> str:
    chosen = "hostile or leaves_the_folder or is_no_file or without_a_bottom"
    others, failed, found = tests("tests/checkpoint/test_damage.py", "-k", chosen)
    _, worse, more = tests("tests/test_security.py")
    if failed or worse:
        return f"{failed + worse} tests failed"
    [loads], [sources], [searched] = found["loads"], more["sources"], more["searched"]
    return (
        f"{loads} loads of checkpoints with a hostile pickle as one of their files, by a resume and an evaluation: "
        f"none ran code; {others - 2} more tricks (ways out of the folder, pipes, files without a bottom) refused; no "
        f"unsafe call in {sources} source files; 5 keys of the environment in none of {searched} files of a run"
    )


def slurm(_: float) -> str:
    """The training tests of tests/slurm that interrupt a run."""
    chosen = "node_dies_while_it_trains or killed_rank or stopped_and_requeued"
    passed, failed, found = tests("tests/slurm/test_slurm_training.py", "-k", chosen)
    if failed:
        return f"{failed} of {passed + failed} tests did not pass"
    [started], [training] = found["node_started_seconds"], found["node_training_seconds"]
    equal = found["equal_steps"]
    return (
        f"a node lost its power: its job, 2 nodes x 2 processes, was started on another node after {started} s (SLURM "
        f"takes a silent node for dead after 5 s here, after 300 s by default) and trained again after {training} s; a "
        f"killed rank and a requeue went on too; {len(equal)} of {passed} runs had the {equal[0]} steps of one that "
        "nothing stopped, to the bit"
    )


def stall(_: float) -> str:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "bench_save.py")], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    return " ".join(done.stdout.split()) if done.returncode == 0 else "the measurement failed"


ROWS = {
    "kills": Row(
        "kill -9 during save",
        ">= 1,000 instants, 0 lost",
        "DCP, fresh folder: 0 of 80 lost, in place 21 of 40, with retention 7 of 80 (one process, 48 MB)",
        kills,
        0.4,
    ),
    "resumes": Row(
        "killed at random steps and resumed, epoch 2, 13 groups in batches of 2",
        ">= 50, all to the bit",
        "Megatron-LM: 106 resume cases, logged loss; torchtitan: 100 steps against a file",
        resumes,
        0.3,
    ),
    "resharded": Row(
        "resumed on another grid: masters and moments",
        ">= 12 pairs equal",
        "Megatron-LM: unit tests of TP and PP",
        resharded,
    ),
    "faults": Row("kinds of fault injected and survived", ">= 20", "nvidia-resiliency-ext 12, torchft 5", faults),
    "bad_inputs": Row("bad inputs: one line and exit code", ">= 200", "none counted", bad_inputs),
    "corruption": Row(
        "kinds of damage to a checkpoint",
        ">= 10, all noticed",
        "Megatron-LM: SHA-256 where asked for; DCP notices neither bit flip nor zero page",
        corruption,
    ),
    "hangs": Row(
        "hung rank (SIGSTOP, sleep, lock, data; a tokenising process, loading, scoring), default limit",
        "<= 60 s",
        "nvidia-resiliency-ext: 45 to 60 min by default; NeMo-RL's chaos test 222 s",
        hangs,
    ),
    "hostile": Row(
        "hostile checkpoints; unsafe calls; secrets",
        "0 run, 0 found",
        "Composer, Megatron Bridge: allow-lists",
        hostile,
    ),
    "stall": Row(
        "training stands still for a save in the background",
        "< 2 % of one step",
        "none published: DCP, nvidia-resiliency-ext save in the background too",
        stall,
    ),
    "slurm": Row("restart under SLURM after a node failure", "goes on", "none published", slurm),
}


def table(kept: dict[str, dict[str, str]]) -> str:
    lines = ["| what | target | measured | command | best known peer |", "|---|---|---|---|---|"]
    for name, row in ROWS.items():
        entry = kept.get(name, {})
        command = f"python tools/soak.py --rows {name}"
        lines.append(
            f"| {row.what} | {row.target} | {entry.get('measured', 'not measured')} | `{command}` | {row.peer} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20.0, help="for the rows that repeat trials, about")
    parser.add_argument("--rows", default=",".join(ROWS))
    options = parser.parse_args()
    sys.path += [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "checkpoint")]
    for name in options.rows.split(","):
        row = ROWS[name]
        began = time.monotonic()
        measured = row.run(60 * options.minutes * row.share)
        kept = json.loads(KEPT.read_text()) if KEPT.exists() else {}  # others may measure other rows meanwhile
        kept[name] = {"measured": measured, "seconds": f"{time.monotonic() - began:.0f}"}
        print(f"{name}: {measured} ({kept[name]['seconds']} s)", flush=True)
        KEPT.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")
        head, _, rest = PAGE.read_text().partition(BEGIN)
        _, _, tail = rest.partition(END)
        PAGE.write_text(f"{head}{BEGIN}\n{table(kept)}\n{END}{tail}")


if __name__ == "__main__":
    main()
