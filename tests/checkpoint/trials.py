"""Trials that end by kill -9: many in `make soak` (tools/soak.py), a few in the tests."""

import hashlib
import os
import random
import select
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from distributed import run_ranks  # noqa: F401  (imports the engine once, before the forks)
from tiny import random_groups, write_llama
from train.engine import Case, build

from megadpo import checkpoint
from megadpo.checkpoint.folder import (
    MANIFEST,
    STATE,
    Entry,
    Saved,
    begin,
    checkpoint_name,
    finish,
    hashed,
    keep_newest,
)
from megadpo.data.packing import Budget
from megadpo.observe.quiet import quiet
from megadpo.parallel.context import grid, join_world
from megadpo.train.optimizer import set_learning_rate
from megadpo.train.step import train_step

GROUPS, BATCH, EPOCHS = 13, 2, 2
"""A data set that the batch does not divide."""


def tiny_case(folder: Path) -> Case:
    write_llama(folder, vocab=67, tied=True)
    return Case(folder, random_groups(GROUPS), distributed=True, budget=Budget(64), batch=BATCH)


def start(case: Case, work: Any, *arguments: Any) -> tuple[int, int]:
    """Fork a one-rank job; returns its process id and the pipe on which it says a line for each thing done."""
    reading, writing = os.pipe()
    child = os.fork()
    if child:
        os.close(writing)
        return child, reading
    os.setpgid(0, 0)
    os.close(reading)
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    code = 1
    try:
        with quiet():
            meeting = Path(case.folder).parent / f"meeting-{os.getpid()}"
            device = join_world(0, 1, 0, f"file://{meeting}")
            with grid(case.parallel, device, 0) as context:
                work(case, context, writing, *arguments)
            code = 0
    finally:
        os._exit(code)


def said(reading: int, seconds: float) -> list[str]:
    """Whole lines that come within so many seconds, or until the end of the process."""
    text, end = b"", time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        if not select.select([reading], [], [], left)[0]:
            break
        more = os.read(reading, 65536)
        if not more:
            break
        text += more
    return text.decode().split("\n")[:-1]


# ---- killed while it saves


@dataclass
class Kills:
    kills: int = 0
    saves: int = 0
    """Saves that had returned."""
    lost: list[str] = field(default_factory=list)
    """Newest checkpoints that were there by the process's word and are not there, or not whole."""
    damaged: list[str] = field(default_factory=list)
    """Listed checkpoints that are not whole."""
    found: Counter = field(default_factory=Counter)
    """What the kill left in the folder; shows where it struck."""


def save_for_ever(case: Case, context: Any, writing: int, run_dir: Path, background: bool) -> None:
    """Load the newest checkpoint, as every start does, then save, and save again."""
    state, stream = build(case, context)
    if checkpoint.resume(state, run_dir, lambda line: os.write(writing, f"told {line}\n".encode())) is None:
        column = np.zeros(len(case.store.response_lengths), dtype=np.float32)
        train_step(state, stream.batches(np.arange(4), 0, column), case.objective, None, context)
        checkpoint.save(state, run_dir, 10**6, 2, context)
    os.write(writing, f"began {state.step}\n".encode())
    saving = None
    while True:
        state.step += 1
        saving = checkpoint.Saving(state, run_dir, 10**6, 2, context, background, before=saving)
        saving.finish()
        os.write(writing, f"saved {state.step}\n".encode())


def kill_during_save(folder: Path, kills: int, seconds: float, seed: int) -> Kills:
    """A process that does nothing but save (retention: 2), killed at random instants, and started again from what it
    left; every start loads the newest checkpoint after reading all of its bytes."""
    case, run_dir, chance = tiny_case(folder / "model"), folder / "run", random.Random(seed)
    result, newest_step, end = Kills(), 0, time.monotonic() + seconds
    window = 1.0
    """Seconds after the start within which the kill falls; follows the machine's speed, so that about one save has
    ended by then."""
    while result.kills < kills and time.monotonic() < end:
        child, reading = start(case, save_for_ever, run_dir, chance.random() < 0.5)
        try:
            lines = []
            while not any(line.startswith("began") for line in lines):
                more = said_line(reading)
                if more is None:
                    result.lost.append(f"kill {result.kills}: the next start failed")
                    return result
                lines.append(more)
            lines += said(reading, chance.uniform(0, window))
        finally:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            lines += said(reading, 1)
            os.close(reading)
        result.kills += 1
        began = next(int(line.split()[1]) for line in lines if line.startswith("began"))
        if began < newest_step:
            result.lost.append(f"kill {result.kills}: step {newest_step} was saved, the next start began at {began}")
        result.damaged += [line for line in lines if line.startswith("told")]
        steps = [int(line.split()[1]) for line in lines if line.startswith("saved")]
        result.saves += len(steps)
        window = min(max(window * (0.93 if steps else 1.15), 0.05), 10)
        newest_step = max([began, *steps])
        result.found[" ".join(sorted({kind(path) for path in (run_dir / "checkpoints").iterdir()}))] += 1
        listed = checkpoint.checkpoints(run_dir)
        result.damaged += [line for path in listed for line in checkpoint.damage(path)]
        if not listed or int(listed[-1].name.removeprefix("step-")) < newest_step:
            result.lost.append(f"kill {result.kills}: step {newest_step} is gone")
    return result


def said_line(reading: int) -> str | None:
    """The next line; None at the end of the process or after a minute."""
    text = b""
    while not text.endswith(b"\n"):
        if not select.select([reading], [], [], 120)[0]:
            return None
        byte = os.read(reading, 1)
        if not byte:
            return None
        text += byte
    return text.decode().strip()


def kind(path: Path) -> str:
    for ending in (".removed.partial", ".partial", ".damaged"):
        if path.name.endswith(ending):
            return ending[1:]
    return "latest" if path.name == "latest" else "whole"


# ---- killed at every call, and at random, with the files of a real checkpoint but without the engine

CHANGES = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.link", "os.symlink"}
"""Python's audit events of calls that change a folder (https://docs.python.org/3/library/audit_events.html)."""


def write_as_a_run_does(run_dir: Path, step: int, files: dict[str, bytes]) -> None:
    """What a save does to the folder: begin, the ranks' files, manifest, name, pointer, retention."""
    folder = run_dir / "checkpoints" / checkpoint_name(step)
    partial = begin(folder)
    for name, data in files.items():
        (partial / name).write_bytes(data)
    known = {n: entry for n, entry in hashed(partial, list(files)).items() if isinstance(entry, Entry)}
    finish(partial, folder, Saved(step, step, 10**6), known)
    keep_newest(run_dir, 2)


def look(run_dir: Path, least: int, kills: Kills, what: str) -> None:
    """Count what is wrong after a kill: `least` is the newest step whose save had returned."""
    listed = checkpoint.checkpoints(run_dir)
    kills.damaged += [f"{what}: {line}" for path in listed for line in checkpoint.damage(path)]
    if not listed or int(listed[-1].name.removeprefix("step-")) < least:
        kills.lost.append(f"{what}: step {least} is gone")
    kills.found[" ".join(sorted({kind(path) for path in (run_dir / "checkpoints").iterdir()}))] += 1


def real_files(run_dir: Path) -> dict[str, bytes]:
    newest = checkpoint.latest(run_dir)
    assert newest is not None
    return {p.name: p.read_bytes() for p in newest.iterdir() if p.name not in (STATE, MANIFEST)}


SCENES = ("two whole", "leftovers", "a damaged one of the same step")


def kill_at_every_call(folder: Path, files: dict[str, bytes], scenes: Sequence[str] = SCENES) -> Kills:
    """One kill before each call that changes a folder during a save with retention: with leftovers of a save that died,
    and over a damaged checkpoint of the same step."""
    kills = Kills()
    for before in scenes:
        number = 0
        ended = False
        while not ended:
            number += 1
            run_dir = folder / f"{before}-{number}"
            for step in (1, 2):
                write_as_a_run_does(run_dir, step, files)
            if before == "leftovers":
                begin(run_dir / "checkpoints" / checkpoint_name(3)).joinpath("half").write_bytes(b"x")
            if before.startswith("a damaged"):
                write_as_a_run_does(run_dir, 3, files)
                (run_dir / "checkpoints" / checkpoint_name(3) / "common.pt").write_bytes(b"")
            child = os.fork()
            if child == 0:
                count = 0

                def strike(event: str, arguments: Any, number: int = number) -> None:
                    nonlocal count
                    if event in CHANGES:
                        count += 1
                        if count == number:
                            os.kill(os.getpid(), signal.SIGKILL)

                sys.addaudithook(strike)
                write_as_a_run_does(run_dir, 3, files)
                os._exit(0)
            ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
            if before.startswith("a damaged"):
                # the damaged one may still be listed; a start passes it over (test_damage.py)
                listed = [path for path in checkpoint.checkpoints(run_dir) if not checkpoint.damage(path)]
                if not listed or (ended and listed[-1].name != checkpoint_name(3)):
                    kills.lost.append(f"{before}, call {number}: no whole checkpoint")
            else:
                look(run_dir, 3 if ended else 2, kills, f"{before}, call {number}")
            kills.kills += not ended
            write_as_a_run_does(run_dir, 4, files)  # the next start works with what is left
            look(
                run_dir, 4, Kills() if before.startswith("a damaged") else kills, f"{before}, call {number}, next save"
            )
            shutil.rmtree(run_dir)
    return kills


def kill_small_saves(folder: Path, files: dict[str, bytes], most: int, seconds: float, seed: int) -> Kills:
    """Processes that save without end, killed at random instants."""
    kills, chance, newest = Kills(), random.Random(seed), 0
    run_dir, end, window = folder / "small", time.monotonic() + seconds, 0.2
    while kills.kills < most and time.monotonic() < end:
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            step = newest
            while True:
                step += 1
                write_as_a_run_does(run_dir, step, files)
                os.write(writing, f"{step}\n".encode())
        os.close(writing)
        lines = said(reading, chance.uniform(0, window))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        lines += said(reading, 1)
        os.close(reading)
        window = min(max(window * (0.93 if lines else 1.15), 0.005), 10)
        kills.kills += 1
        kills.saves += len(lines)
        newest = max([newest, *map(int, lines)])
        if newest:
            look(run_dir, newest, kills, f"kill {kills.kills}")
            newest = int(checkpoint.checkpoints(run_dir)[-1].name.removeprefix("step-"))
    return kills


# ---- killed while it trains, resumed, and the same


@dataclass
class Resumes:
    runs: int = 0
    resumes: int = 0
    different: list[str] = field(default_factory=list)


def train_on(case: Case, context: Any, writing: int, run_dir: Path, every: int) -> None:
    """Train to the end, saving every so many steps; says what each step used and computed."""
    state, stream = build(case, context)
    checkpoint.resume(state, run_dir, lambda line: None)
    os.write(writing, f"began {state.step}\n".encode())
    column = np.zeros(len(case.store.response_lengths), dtype=np.float32)
    total = GROUPS * EPOCHS
    steps = -(-total // BATCH)
    while state.step < steps:
        groups = stream.next_groups(state.consumed, min(BATCH, total - state.consumed))
        set_learning_rate(state.optimizer, 1e-3 * (1 - state.step / steps))
        sums, norm = train_step(state, stream.batches(groups, 0, column), case.objective, None, context)
        numbers = ",".join(str(int(group)) for group in groups)
        os.write(writing, f"step {state.step} {numbers} {sums.loss.hex()} {norm.hex()}\n".encode())
        if state.step % every == 0 or state.step == steps:
            checkpoint.save(state, run_dir, steps, 2, context)
    os.write(writing, f"end {digest(state)}\n".encode())


def digest(state: Any) -> str:
    """Of weights, masters and moments."""
    found = hashlib.sha256()
    for module in state.modules:
        for name, parameter in sorted(module.named_parameters()):
            found.update(name.encode() + parameter.detach().float().numpy().tobytes())
    for group in state.optimizer.param_groups:
        for parameter in group["params"]:
            found.update(parameter.detach().float().numpy().tobytes())
    for optimizer in state.optimizer.chained_optimizers:
        for values in optimizer.optimizer.state.values():
            for name in ("exp_avg", "exp_avg_sq"):
                found.update(values[name].numpy().tobytes())
    return found.hexdigest()


def kill_and_resume(folder: Path, runs: int, seconds: float, seed: int) -> Resumes:
    """Runs that are killed three times each at random steps; compared with one that never stopped: every step's
    groups, loss and gradient norm, and at the end weights, masters and moments, all to the bit."""
    case, chance = tiny_case(folder / "model"), random.Random(seed)
    whole = follow(case, folder / "whole", 2, None)
    result, end = Resumes(), time.monotonic() + seconds
    counts = Counter(group for line in whole[0].values() for group in line.split()[0].split(","))
    if set(counts.values()) != {EPOCHS} or len(counts) != GROUPS:
        result.different.append(f"the run that never stopped used groups unequally: {counts}")
    while result.runs < runs and time.monotonic() < end:
        run_dir, every = folder / f"run-{result.runs}", chance.choice((1, 2, 3))
        steps: dict[int, str] = {}
        for attempt in range(60):
            kill_after = (chance.randint(1, 5), chance.uniform(0, 0.2)) if attempt < 3 else None
            before = bool(checkpoint.checkpoints(run_dir))
            lines, last = follow(case, run_dir, every, kill_after)
            result.resumes += before
            for step, line in lines.items():
                if whole[0][step] != line:
                    result.different.append(f"run {result.runs}, step {step}: {line} is not {whole[0][step]}")
            steps.update(lines)
            if last:
                break
        if last != whole[1] or steps.keys() != whole[0].keys():
            result.different.append(f"run {result.runs}: the end is another one")
        result.runs += 1
    return result


def follow(case: Case, run_dir: Path, every: int, kill_after: tuple[int, float] | None) -> tuple[dict[int, str], str]:
    """Run to the end, or to the kill so many steps and then so many seconds later: (what each step said, the digest at
    the end or nothing)."""
    child, reading = start(case, train_on, run_dir, every)
    lines = []
    while (line := said_line(reading)) is not None:
        lines.append(line)
        if kill_after is not None and sum(line.startswith("step") for line in lines) >= kill_after[0]:
            lines += said(reading, kill_after[1])
            break
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    lines += said(reading, 1)
    os.close(reading)
    assert lines, "the run failed to start"
    steps = {int(line.split()[1]): line.split(maxsplit=2)[2] for line in lines if line.startswith("step")}
    ends = [line.split()[1] for line in lines if line.startswith("end")]
    return steps, ends[0] if ends else ""
