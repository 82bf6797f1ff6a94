"""Trials that end by kill -9: many in `make soak` (tools/soak.py), a few in the tests.

Everything that is killed is megadpo itself: its engine with a small model, its optimizer, its saves, in gloo ranks.
"""

import gc
import hashlib
import json
import os
import random
import select
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from distributed import run_ranks  # noqa: F401  (imports the engine once, before the forks)
from tiny import random_groups, write_llama
from torch.distributed import distributed_c10d
from train.engine import Case, build

from megadpo import checkpoint
from megadpo.checkpoint.folder import checkpoint_name
from megadpo.config import Config, DataConfig, ModelConfig, TrainConfig
from megadpo.data.packing import Budget
from megadpo.errors import CheckpointError
from megadpo.observe.quiet import quiet
from megadpo.parallel.context import ParallelContext, grid, join_world
from megadpo.train.loop import Saver
from megadpo.train.optimizer import set_learning_rate
from megadpo.train.state import TrainState
from megadpo.train.step import train_step

GROUPS, BATCH, EPOCHS = 13, 2, 2
"""A data set that the batch does not divide."""


def tiny_case(folder: Path, **changes: Any) -> Case:
    if not (folder / "config.json").exists():
        write_llama(folder, layers=2, vocab=67, tied=True)
    case = Case(folder, random_groups(GROUPS), distributed=True, budget=Budget(64), batch=BATCH)
    return replace(case, **changes)


def first_step(state: TrainState, stream: Any, case: Case, context: ParallelContext) -> None:
    """One update, so that there are moments."""
    column = np.zeros(len(case.store.response_lengths), dtype=np.float32)
    batches = stream.batches(np.arange(4), context.data_rank, column)
    train_step(state, batches, case.objective, None, context)


# ---- killed while it saves: jobs whose engine is built once, and forked for every trial


@dataclass
class Kills:
    kills: int = 0
    saves: int = 0
    """Saves that were reported as done before."""
    lost: list[str] = field(default_factory=list)
    """Newest checkpoints that were reported as saved, and are not there, not whole, or not loaded."""
    damaged: list[str] = field(default_factory=list)
    """Listed checkpoints that are not whole."""
    found: Counter = field(default_factory=Counter)
    """What the kill left in the folder; shows where it struck."""
    how: Counter = field(default_factory=Counter)
    """Kills by what was killed."""
    unfinished: int = 0
    """Scenes of which time ran out before every call was struck."""

    def add(self, other: "Kills") -> "Kills":
        return Kills(
            self.kills + other.kills,
            self.saves + other.saves,
            self.lost + other.lost,
            self.damaged + other.damaged,
            self.found + other.found,
            self.how + other.how,
            self.unfinished + other.unfinished,
        )


@dataclass(frozen=True)
class Order:
    """What a job's ranks are to do: save the steps after `step`, without end, or `count` of them."""

    run_dir: str
    meeting: str
    step: int
    background: bool
    count: int | None = None
    strike: tuple[int, int] | None = None
    """(rank, number): that rank kills itself before its so-manieth call that changes the folder."""


GONE: list[Any] = []
"""Process groups of the process that this one was forked from. Their threads are not here, and their destructors would
wait for them."""


def meet_again(rank: int, ranks: int, meeting: str) -> torch.device:
    """Join a world anew after a fork. Groups of a grid that was built before still say who is in them, which is all
    that a save asks of them; what it exchanges goes over the world's group."""
    GONE.append((distributed_c10d._world.default_pg, dict(distributed_c10d._world.pg_map)))
    distributed_c10d._update_default_pg(None)
    return join_world(rank, ranks, rank, f"file://{meeting}")


class Job:
    """One process per rank, in which the engine stands built; each forks itself for an order."""

    def __init__(self, case: Case, ranks: int, folder: Path) -> None:
        self.ranks, self.name = ranks, name_of(case, ranks)
        self._folder, self._meetings = folder, 0
        self._reading, said = os.pipe()
        self._controls = []
        self._stems = []
        for rank in range(ranks):
            listening, telling = os.pipe()
            child = os.fork()
            if child == 0:
                for end in (telling, self._reading, *self._controls):
                    os.close(end)
                code = 1
                try:
                    stem(case, rank, ranks, f"{folder}/meeting-{self.name}", listening, said)
                    code = 0
                finally:
                    os._exit(code)
            os.close(listening)
            self._controls.append(telling)
            self._stems.append(child)
        os.close(said)

    def close(self) -> None:
        for child in self._stems:
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        for end in (self._reading, *self._controls):
            os.close(end)

    def begin(self, run_dir: Path, step: int, background: bool, **more: Any) -> "Running":
        """Give the order, and wait until every rank is about to begin its first save."""
        self._meetings += 1
        meeting = f"{self._folder}/meeting-{self.name}-{self._meetings}"
        order = Order(str(run_dir), meeting, step, background, **more)
        for control in self._controls:
            os.write(control, json.dumps(vars(order)).encode() + b"\n")
        running = Running(self._reading, self.ranks)
        running.until(lambda: len(running.pids) == self.ranks and running.ready == self.ranks)
        return running


def name_of(case: Case, ranks: int) -> str:
    return "1 rank" if ranks == 1 else f"tensor {case.tensor} x data {ranks // case.tensor}"


class Running:
    """The ranks of an order, from their first word to their end."""

    def __init__(self, reading: int, ranks: int) -> None:
        self._reading, self._text = reading, b""
        self.pids: dict[int, int] = {}
        self._watched: dict[int, int] = {}
        """Rank -> descriptor of its process, which can be read at its end."""
        self.ready = 0
        self.saved: list[int] = []

    def listen(self, seconds: float) -> None:
        """Take in what the ranks say within so many seconds, or until one of them ends."""
        ready, _, _ = select.select([self._reading, *self._watched.values()], [], [], max(0.0, seconds))
        if self._reading in ready:
            self._text += os.read(self._reading, 65536)
            *lines, self._text = self._text.split(b"\n")
            for line in lines:
                word, *numbers = line.decode().split()
                if word == "rank":
                    rank, pid = map(int, numbers)
                    self.pids[rank] = pid
                    with suppress(ProcessLookupError):  # it has struck already
                        self._watched[rank] = os.pidfd_open(pid)
                elif word == "ready":
                    self.ready += 1
                else:
                    self.saved.append(int(numbers[0]))
        for rank, descriptor in list(self._watched.items()):
            if descriptor in ready:
                os.close(self._watched.pop(rank))

    def until(self, true: Callable[[], bool], seconds: float = 120) -> None:
        end = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < end, f"not in {seconds} s: {vars(self)}"
            self.listen(1)

    def for_seconds(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end and len(self._watched) == len(self.pids):
            self.listen(end - time.monotonic())

    def end(self) -> None:
        """Wait for the end of one; the others, where they do not end by themselves, are killed soon after."""
        self.until(lambda: len(self._watched) < len(self.pids))
        end = time.monotonic() + 2
        while self._watched and time.monotonic() < end:
            self.listen(end - time.monotonic())
        self.kill(None, 0)

    def kill(self, first: int | None, later: float) -> None:
        """All at once; or one rank first, and the others so many seconds later. Waits for the end of all, and takes in
        their last words."""
        for rank, pid in self.pids.items():
            if rank in self._watched and first in (None, rank):
                os.kill(pid, signal.SIGKILL)
        if first is not None:
            end = time.monotonic() + later
            while time.monotonic() < end:
                self.listen(end - time.monotonic())
            self.kill(None, 0)
        while self._watched:
            self.listen(10)
        while select.select([self._reading], [], [], 0)[0]:
            self.listen(0)


def stem(case: Case, rank: int, ranks: int, meeting: str, listening: int, said: int) -> None:
    """Build the engine, do one step, and fork for every order."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the children
    with quiet(), grid(case.parallel, meet_again(rank, ranks, meeting), 0) as context:
        state, stream = build(case, context)
        first_step(state, stream, case, context)
        gc.freeze()  # so that a fork does not copy what it never changes
        text = b""
        while more := os.read(listening, 65536):
            *lines, text = (text + more).split(b"\n")
            for line in lines:
                child = os.fork()
                if child == 0:
                    code = 1
                    try:
                        save_on(state, context, Order(**json.loads(line)), said)
                        code = 0
                    finally:
                        os._exit(code)


def save_on(state: TrainState, context: ParallelContext, order: Order, said: int) -> None:
    """Save and save again. Every number of a step's state is the step's, so that a checkpoint tells whose it is; in the
    background, the next update comes while it is being written."""
    os.write(said, f"rank {context.rank} {os.getpid()}\n".encode())
    meet_again(context.rank, context.world_size, order.meeting)
    if order.strike is not None and order.strike[0] == context.rank:
        strike_before(order.strike[1], order.run_dir)
    context.any_of(False)  # everyone is here
    os.write(said, b"ready\n")
    run_dir, saving = Path(order.run_dir), None
    state.step = order.step
    while order.count is None or state.step < order.step + order.count:
        state.step += 1
        state.consumed = state.step
        become(state, state.step)
        saving = checkpoint.Saving(state, run_dir, 10**6, 2, context, order.background, before=saving)
        if order.background:
            state.until_free()
            become(state, state.step + 0.5)
        saving.finish()
        if context.is_first:
            os.write(said, f"saved {state.step}\n".encode())


def become(state: TrainState, value: float) -> None:
    for tensor in tensors_of(state):
        tensor.fill_(value)


def tensors_of(state: TrainState) -> Iterator[torch.Tensor]:
    """Weights, masters and moments of this rank."""
    for module in state.modules:
        yield from (parameter.data for parameter in module.parameters())
    for group in state.optimizer.param_groups:
        yield from (parameter.data for parameter in group["params"])
    for optimizer in state.optimizer.chained_optimizers:
        for values in optimizer.optimizer.state.values():
            yield from (values[name] for name in ("exp_avg", "exp_avg_sq"))


CHANGES = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.link", "os.symlink")
"""Python's audit events of calls that change a folder (https://docs.python.org/3/library/audit_events.html)."""


def strike_before(number: int, run_dir: str) -> None:
    """From here on count the calls by which this process changes the run folder, or brings it to the disk, of all its
    threads; before the so-manieth it is no more. Between them is the product's code. torch writes common.pt without a
    call of Python's, so calls of torch.save count too, which are one for each tensor and for common.pt."""
    count = 0

    def strike() -> None:
        nonlocal count
        count += 1
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_event(event: str, arguments: tuple) -> None:
        if event not in CHANGES or not isinstance(arguments[0], str | os.PathLike):
            return
        path = os.fspath(arguments[0])
        if event == "open":
            if path.startswith(run_dir) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                strike()
        elif path.startswith(run_dir) or not os.path.isabs(path):  # shutil.rmtree gives names within a folder
            strike()

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def and_count(*arguments: Any, **more: Any) -> Any:
            strike()
            return call(*arguments, **more)

        return and_count

    os.fsync = counted(os.fsync)
    torch.save = counted(torch.save)
    sys.addaudithook(on_event)


class Checker:
    """Looks at what a kill left. In a process with a world of one rank, and an engine built for it."""

    def __init__(self, case: Case, context: ParallelContext) -> None:
        self._state, stream = build(case, context)
        first_step(self._state, stream, case, context)
        gc.freeze()  # Megatron-Core collects garbage at every load, and there is much here that is none

    def look(self, run_dir: Path, least: int, kills: Kills, what: str) -> int:
        """Count what is wrong; the newest step that is there. least: the newest step that was reported as saved."""
        listed = checkpoint.checkpoints(run_dir)
        wrong = [f"{what}: {line}" for path in listed for line in checkpoint.damage(path)]
        kills.damaged += wrong
        kills.found[" ".join(sorted({kind(path) for path in (run_dir / "checkpoints").iterdir()}))] += 1
        newest = int(listed[-1].name.removeprefix("step-")) if listed else 0
        if newest < least:
            kills.lost.append(f"{what}: step {least} is gone, {newest} is there")
        elif listed and not wrong:
            kills.lost += [f"{what}: {line}" for line in self.loaded(listed[-1], newest)]
        return newest

    def loaded(self, folder: Path, step: int) -> list[str]:
        """What is wrong with its numbers, loaded as a resumed run does it, on one rank."""
        become(self._state, -1)
        try:
            checkpoint.load(self._state, folder)
        except CheckpointError as error:
            return [str(error)]
        torn = sum(int((tensor != step).sum()) for tensor in tensors_of(self._state))
        if torn or self._state.step != step:
            return [f"{folder}: {torn} numbers are not those of step {step}"]
        return []


def kind(path: Path) -> str:
    for ending in (".removed.partial", ".partial", ".damaged"):
        if path.name.endswith(ending):
            return ending[1:]
    return "latest" if path.name == "latest" else "whole"


@contextmanager
def lane(folder: Path, grids: Sequence[str]) -> Iterator[tuple[list[Job], Checker]]:
    """Jobs on these grids, and who looks at what they leave; in a process that run_ranks started."""
    folder.mkdir(parents=True)
    case = tiny_case(folder / "model")
    ways = {"1": (case, 1), "data": (case, 2), "tensor": (replace(case, tensor=2), 2)}
    jobs = [Job(*ways[name], folder) for name in grids]
    try:
        with quiet(), grid(case.parallel, meet_again(0, 1, f"{folder}/meeting-checker"), 0) as context:
            yield jobs, Checker(case, context)
    finally:
        for job in jobs:
            job.close()


def kill_at_random(
    device: torch.device, folder: Path, grids: Sequence[str], kills: int, seconds: float, seed: int
) -> Kills:
    """Jobs that save without end (two checkpoints are kept), killed at random instants; the next one begins with what
    the last one left. Each rank of run_ranks does this by itself."""
    me = dist.get_rank()
    result, chance, end = Kills(), random.Random(f"{seed} {me}"), time.monotonic() + seconds
    with lane(folder / f"lane-{me}", grids) as (jobs, checker):
        places = {job.name: [folder / f"lane-{me}" / f"run {job.name}", 0, 0.1] for job in jobs}
        while result.kills < kills and time.monotonic() < end:
            job = jobs[result.kills % len(jobs)]
            run_dir, newest, window = places[job.name]
            background = chance.random() < 0.5
            running = job.begin(run_dir, newest, background)
            running.for_seconds(chance.uniform(0, window))
            one = chance.randrange(job.ranks) if job.ranks > 1 and chance.random() < 0.5 else None
            running.kill(one, chance.uniform(0, 0.1))
            result.kills += 1
            result.saves += len(running.saved)
            result.how[f"{job.name}, {'in the background' if background else 'at once'}"] += 1
            newest = max([newest, *running.saved])
            if newest:
                newest = checker.look(run_dir, newest, result, f"kill {result.kills} ({job.name})")
            # about one save has ended by then, whatever the machine's speed
            window = min(max(window * (0.93 if running.saved else 1.15), 0.01), 10)
            places[job.name] = [run_dir, newest, window]
    return result


SCENES = ("two whole", "leftovers", "a damaged one of the same step", "a whole one of the same step")


def scene(before: str, template: Path, run_dir: Path) -> None:
    """A run folder ahead of the save of step 4, with the two before. template: has the checkpoints 2, 3 and 4."""
    for step in (2, 3, 4):
        shutil.copytree(template / f"kept-{step}", run_dir / "checkpoints" / checkpoint_name(step))
    shutil.copyfile(template / "checkpoints" / "latest", run_dir / "checkpoints" / "latest")
    fourth = run_dir / "checkpoints" / checkpoint_name(4)
    if before == "leftovers":
        shutil.copytree(fourth, fourth.with_name(fourth.name + ".partial"))
        shutil.copytree(fourth, fourth.with_name(checkpoint_name(1) + ".removed.partial"))
    if before == "a damaged one of the same step":
        (fourth / "common.pt").write_bytes(b"")
    if before in ("two whole", "leftovers"):
        shutil.rmtree(fourth)


def kill_at_every_call(
    device: torch.device, folder: Path, grids: Sequence[str], scenes: Sequence[str], seconds: float, stride: int = 1
) -> Kills:
    """One kill before each call by which a save changes the folder, of every rank, at once and in the background; then
    the next save works with what is left. The ranks of run_ranks share the work; stride: every so-manieth call only."""
    me, many = dist.get_rank(), dist.get_world_size()
    result, end, turn = Kills(), time.monotonic() + seconds, 0
    with lane(folder / f"calls-{me}", grids) as (jobs, checker):
        template = folder / f"calls-{me}" / "template"
        for job in jobs:
            shutil.rmtree(template, ignore_errors=True)
            for step in (1, 2, 3):  # retention leaves two, and a scene needs three
                job.begin(template, step, False, count=1).end()
                shutil.copytree(template / "checkpoints" / checkpoint_name(step + 1), template / f"kept-{step + 1}")
            for before in scenes:
                for background in (False, True):
                    for rank in range(job.ranks):
                        turn += 1
                        if turn % many == me:
                            what = (before, background, rank, stride, end)
                            result = result.add(_every_call(job, checker, template, folder / f"calls-{me}", *what))
    return result


def _every_call(
    job: Job,
    checker: Checker,
    template: Path,
    folder: Path,
    before: str,
    background: bool,
    rank: int,
    stride: int,
    end: float,
) -> Kills:
    kills, number, struck = Kills(), 1, True
    while struck:
        if time.monotonic() > end:
            kills.unfinished += 1
            break
        run_dir = folder / "scene"
        scene(before, template, run_dir)
        running = job.begin(run_dir, 3, background, count=1, strike=(rank, number))
        running.end()
        struck = not running.saved
        what = f"{job.name}, {before}, call {number} of rank {rank}"
        if before == "a damaged one of the same step":
            # it may still be listed; a start passes it over (test_damage.py)
            whole = [path for path in checkpoint.checkpoints(run_dir) if not checkpoint.damage(path)]
            if not whole or (running.saved and whole[-1].name != checkpoint_name(4)):
                kills.lost.append(f"{what}: no whole checkpoint")
        else:
            checker.look(run_dir, 4 if running.saved or before == "a whole one of the same step" else 3, kills, what)
        kills.kills += struck
        if struck:
            kills.how[f"{job.name}, before a call, {'in the background' if background else 'at once'}"] += 1
        after = job.begin(run_dir, 4, background, count=1)
        after.end()
        checker.look(run_dir, 5, Kills() if "damaged" in before else kills, f"{what}, the next save")
        shutil.rmtree(run_dir)
        number += stride
    return kills


# ---- killed while it trains, resumed, and the same


@dataclass
class Resumes:
    runs: int = 0
    resumes: int = 0
    different: list[str] = field(default_factory=list)
    how: Counter = field(default_factory=Counter)
    """Resumes by grid and kind of save."""


def start(case: Case, ranks: int, work: Any, *arguments: Any) -> tuple[list[int], int]:
    """Fork a job; returns its process ids and the pipe on which it says a line for each thing done."""
    reading, writing = os.pipe()
    meeting = Path(case.folder).parent / f"meeting-{time.monotonic_ns()}"
    children: list[int] = []
    for rank in range(ranks):
        child = os.fork()
        if child:
            children.append(child)
            continue
        os.close(reading)
        torch.set_num_threads(1)
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        code = 1
        try:
            with quiet():
                device = join_world(rank, ranks, rank, f"file://{meeting}")
                with grid(case.parallel, device, 0) as context:
                    work(case, context, writing, *arguments)
                code = 0
        finally:
            os._exit(code)
    os.close(writing)
    return children, reading


def said(reading: int, seconds: float) -> list[str]:
    """Whole lines that come within so many seconds, or until the end of all who could say one."""
    text, end = b"", time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        if not select.select([reading], [], [], left)[0]:
            break
        more = os.read(reading, 65536)
        if not more:
            break
        text += more
    return text.decode().split("\n")[:-1]


def said_line(reading: int) -> str | None:
    """The next line; None at the end of the processes or after two minutes."""
    text = b""
    while not text.endswith(b"\n"):
        if not select.select([reading], [], [], 120)[0]:
            return None
        byte = os.read(reading, 1)
        if not byte:
            return None
        text += byte
    return text.decode().strip()


class Silence:
    """A log for who wants none."""

    def step(self, record: dict[str, Any]) -> None: ...

    def line(self, text: str) -> None: ...

    def rewind(self, step: int) -> None: ...


def train_on(case: Case, context: ParallelContext, writing: int, run_dir: Path, every: int, background: bool) -> None:
    """Train to the end, saving every so many steps; says what each step used and computed."""
    state, stream = build(case, context)
    checkpoint.resume(state, run_dir, lambda line: None)
    column = np.zeros(len(case.store.response_lengths), dtype=np.float32)
    total = GROUPS * EPOCHS
    steps = -(-total // BATCH)
    config = Config(
        str(run_dir),
        ModelConfig(str(case.folder)),
        DataConfig(("memory",)),
        train=TrainConfig(async_save=background, save_total_limit=2),
    )
    saver = Saver(state, config, steps, context, Silence())
    while state.step < steps:
        groups = stream.next_groups(state.consumed, min(BATCH, total - state.consumed))
        set_learning_rate(state.optimizer, 1e-3 * (1 - state.step / steps))
        batches = stream.batches(groups, context.data_rank, column)
        sums, norm = train_step(state, batches, case.objective, None, context)
        if context.is_first:
            numbers = ",".join(str(int(group)) for group in groups)
            os.write(writing, f"step {state.step} {numbers} {sums.loss.hex()} {norm.hex()}\n".encode())
        [still] = context.any_of(saver.writing)
        if saver.pending and not still:
            saver.advance()
        if state.step % every == 0 or state.step == steps:
            saver.save()
    saver.settle()
    os.write(writing, f"end {context.rank} {digest(state)}\n".encode())
    context.any_of(False)  # no rank leaves before all have said theirs


def digest(state: TrainState) -> str:
    """Of weights, masters and moments."""
    found = hashlib.sha256()
    for tensor in tensors_of(state):
        found.update(tensor.detach().float().numpy().tobytes())
    return found.hexdigest()


def ways_to_resume(case: Case) -> list[tuple[Case, int, bool]]:
    """(grid, its ranks, whether it saves in the background)"""
    return [
        (case, 1, False),
        (case, 1, True),
        (case, 2, True),
        (replace(case, tensor=2, sequence=True), 2, True),
        (case, 2, False),
    ]


def kill_and_resume(folder: Path, runs: int, seconds: float, seed: int) -> Resumes:
    """Runs that are killed three times each at random steps; compared with one on the same grid that never stopped:
    every step's groups, loss and gradient norm, and at the end weights, masters and moments, all to the bit."""
    chance, ways = random.Random(seed), ways_to_resume(tiny_case(folder / "model"))
    whole: dict[str, tuple[dict[int, str], dict[str, str]]] = {}
    result, end = Resumes(), time.monotonic() + seconds
    while result.runs < runs and time.monotonic() < end:
        case, ranks, background = ways[result.runs % len(ways)]
        on = name_of(case, ranks)
        if on not in whole:
            whole[on] = follow(case, ranks, folder / f"whole {on}", 2, False, None)
            counts = Counter(group for line in whole[on][0].values() for group in line.split()[0].split(","))
            if set(counts.values()) != {EPOCHS} or len(counts) != GROUPS or len(whole[on][1]) != ranks:
                result.different.append(f"{on}: the run that never stopped used groups unequally: {counts}")
        run_dir, every = folder / f"run-{result.runs}", chance.choice((1, 2, 3))
        steps: dict[int, str] = {}
        last: dict[str, str] = {}
        for attempt in range(60):
            kill_after = (chance.randint(1, 5), chance.uniform(0, 0.2)) if attempt < 3 else None
            before = bool(checkpoint.checkpoints(run_dir))
            lines, last = follow(case, ranks, run_dir, every, background, kill_after)
            result.resumes += before
            result.how[f"{on}, {'in the background' if background else 'at once'}"] += before
            for step, line in lines.items():
                if whole[on][0][step] != line:
                    result.different.append(f"run {result.runs}, step {step}: {line} is not {whole[on][0][step]}")
            steps.update(lines)
            if last:
                break
        if last != whole[on][1] or steps.keys() != whole[on][0].keys():
            result.different.append(f"run {result.runs} ({on}): the end is another one")
        result.runs += 1
    return result


def follow(
    case: Case, ranks: int, run_dir: Path, every: int, background: bool, kill_after: tuple[int, float] | None
) -> tuple[dict[int, str], dict[str, str]]:
    """Run to the end, or to the kill so many steps and then so many seconds later: (what each step said, by rank the
    digest at the end or nothing)."""
    children, reading = start(case, ranks, train_on, run_dir, every, background)
    lines = []
    while (line := said_line(reading)) is not None:
        lines.append(line)
        if kill_after is not None and sum(line.startswith("step") for line in lines) >= kill_after[0]:
            lines += said(reading, kill_after[1])
            break
    for child in children:
        os.kill(child, signal.SIGKILL)
    for child in children:
        os.waitpid(child, 0)
    lines += said(reading, 1)
    os.close(reading)
    assert lines, "the run failed to start"
    steps = {int(line.split()[1]): line.split(maxsplit=2)[2] for line in lines if line.startswith("step")}
    ends = dict(line.split()[1:] for line in lines if line.startswith("end"))
    return steps, ends if len(ends) == ranks else {}
