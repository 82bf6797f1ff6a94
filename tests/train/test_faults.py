"""Faults put into whole runs: each ends or goes on as docs/reliability.md says. `make soak` runs and counts all."""

import json
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from megadpo import checkpoint
from megadpo.cli import main
from train.test_run import metrics, run_file, when_step

STEPS = 6


@dataclass(frozen=True)
class Run:
    """A short run with a checkpoint at every second step, in this process's children."""

    folder: Path
    path: Path

    @property
    def run_dir(self) -> Path:
        return self.folder / "run"

    def train(self, *overrides: str) -> int:
        return main(["train", str(self.path), *overrides])

    def pids(self) -> list[int]:
        """Process ids of the ranks, by rank."""
        return [int((self.run_dir / f"pid-{rank}").read_text()) for rank in range(2)]


@pytest.fixture
def run(tmp_path: Path, shared: Path) -> Run:
    path = run_file(
        tmp_path,
        shared,
        train={"max_steps": STEPS, "save_steps": 2, "save_total_limit": 3, "hang_timeout": 50},
        parallel={"tensor_model_parallel_size": 1, "data_parallel_size": 2},
        batch={"global_batch_size": 4},
    )
    return Run(tmp_path, path)


OF_A_KIND = ("death", "signum", "where")
"""Parameters of a test whose values are different faults; others have the same fault in other places or settings."""
AGAIN = ("restarts_end_where", "without_the_batch", "batches_are_bounded", "by_the_drift_limit")
"""Tests of what follows on a fault that another test has, or on none."""


@pytest.fixture(autouse=True)
def kind(request: pytest.FixtureRequest, record_property: Callable[[str, object], None]) -> None:
    """Which fault this test is of: `make soak` counts kinds, not tests."""
    name = request.node.originalname
    if not any(part in name for part in AGAIN):
        values = request.node.callspec.params if hasattr(request.node, "callspec") else {}
        record_property("fault", " ".join([name, *(str(values[each]) for each in OF_A_KIND if each in values)]))


@contextmanager
def in_step(number: int, rank: int | None, act: Callable[[Any], Any], once: Path | None = None) -> Iterator[None]:
    """Call act(context) in a rank (None: in all) as it begins to train on step `number`; with `once`, only until that
    file is there. Ranks are forked from here, so what is replaced here is replaced there."""
    import megadpo.train.loop as loop

    original = loop.train_step

    def step(state: Any, batches: Any, objective: Any, reference: Any, context: Any, *more: Any) -> Any:
        if state.step + 1 == number and rank in (None, context.rank) and not (once and once.exists()):
            if once:
                once.touch()
            act(context)
        return original(state, batches, objective, reference, context, *more)

    loop.train_step = step
    try:
        yield
    finally:
        loop.train_step = original


@contextmanager
def slow_saves() -> Iterator[None]:
    """Inside, what is written in the background takes longer than a step."""
    import megadpo.checkpoint.saving as saving

    original = saving._low_priority

    def and_wait() -> None:
        original()
        time.sleep(1)

    saving._low_priority = and_wait
    try:
        yield
    finally:
        saving._low_priority = original


few, many = pytest.param, partial(pytest.param, marks=pytest.mark.slow)


def one_of(names: Iterable[str]) -> list[Any]:
    """The first in `make test`, all in `make test-long` and `make soak`."""
    first, *others = names
    return [few(first), *(many(name) for name in others)]


def steps_once(run: Run, last: int = STEPS) -> None:
    assert [r["step"] for r in metrics(run.run_dir)] == list(range(1, last + 1))


# ---- a rank dies: told with its rank, and with --max-restarts the run goes on


DEATHS: dict[str, tuple[Callable[[Any], Any], int, str]] = {
    "SIGKILL": (lambda context: os.kill(os.getpid(), signal.SIGKILL), 137, "rank 1 was killed by SIGKILL"),
    "SIGSEGV": (lambda context: os.kill(os.getpid(), signal.SIGSEGV), 139, "rank 1 was killed by SIGSEGV"),
    "SIGBUS": (lambda context: os.kill(os.getpid(), signal.SIGBUS), 135, "rank 1 was killed by SIGBUS"),
    "SIGABRT": (lambda context: os.abort(), 134, "rank 1 was killed by SIGABRT"),
    "exit": (lambda context: os._exit(7), 1, "rank 1 ended with exit code 7"),
    "exception": (lambda context: 1 / 0, 1, "rank 1 failed with ZeroDivisionError"),
    "out of memory": (lambda context: bytearray(1 << 60), 1, "rank 1 failed with MemoryError"),
    "peer closes its sockets": (lambda context: os.closerange(3, 200), 1, r"rank \d"),
}


@pytest.mark.parametrize("death", one_of(DEATHS))
def test_a_rank_dies_and_the_run_goes_on(run: Run, death: str, capfd: pytest.CaptureFixture[str]) -> None:
    act, code, message = DEATHS[death]
    with in_step(4, 1, act, once=run.folder / "happened"):
        assert run.train("--max-restarts", "1") == 0
    error = capfd.readouterr().err
    assert re.search(rf"{message}.*restart 1 of 1, from step-00000002", error), error
    steps_once(run)
    assert code


@pytest.mark.slow
def test_restarts_end_where_there_is_no_progress(run: Run, capfd: pytest.CaptureFixture[str]) -> None:
    """The same fault in the same place: started again once, of the five times that are allowed."""
    with in_step(4, 0, lambda context: os._exit(7)):
        assert run.train("--max-restarts", "5") == 1
    error = capfd.readouterr().err
    assert error.count("restart 1 of 5") == 1
    assert "restart 2 of 5" not in error
    assert "no checkpoint was saved since the restart before" in error


# ---- a rank hangs


def hold_python_s_lock(context: Any) -> None:
    """A call into C that never lets go of it."""
    import ctypes

    ctypes.PyDLL(None).sleep(600)


HANGS: dict[str, Callable[[Any], Any]] = {
    "sleeps while the others are in a collective": lambda context: time.sleep(600),
    "SIGSTOP": lambda context: os.kill(os.getpid(), signal.SIGSTOP),
    "waits for a lock": lambda context: threading.Event().wait(),
    "waits for data that never comes": lambda context: os.read(os.pipe()[0], 1),
}


@pytest.mark.parametrize("hang", one_of(HANGS))
def test_a_hang_is_noticed_with_everyone_s_stack(
    run: Run, hang: str, capfd: pytest.CaptureFixture[str], record_property: Callable[[str, object], None]
) -> None:
    """With a limit of 4 s, so that the test is short; the limit of the run file's default is tested by `make soak`."""
    seconds: list[float] = []

    def act(context: Any) -> None:
        (run.folder / "began").write_text(str(time.monotonic()))
        HANGS[hang](context)

    limit = float(os.environ.get("MEGADPO_TEST_HANG_TIMEOUT", "4"))
    with in_step(4, 1, act, once=run.folder / "happened"):
        assert run.train(f"train.hang_timeout={limit}") == 75
        seconds.append(time.monotonic() - float((run.folder / "began").read_text()))
    error = capfd.readouterr().err
    assert "made no progress" in error
    assert error.count("\n") == 1
    for rank in range(2):
        log = (run.run_dir / "logs" / f"rank-{rank}.log").read_text()
        assert "Current thread" in log or "Thread 0x" in log, f"rank {rank} left no stack"
        assert "train_step" in log or "step" in log
    record_property("seconds", seconds[0])
    assert seconds[0] < limit + 10
    assert run.train() == 0
    steps_once(run)


def act_once(run: Run, act: Callable[[], Any]) -> None:
    """In the rank that comes here first, and only at the first start."""
    if not (run.folder / "happened").exists():
        (run.folder / "happened").touch()
        (run.folder / "began").write_text(str(time.monotonic()))
        act()


def stop_a_helper() -> None:
    import multiprocessing

    os.kill(multiprocessing.active_children()[0].pid or 0, signal.SIGSTOP)


def hang_while_tokenising(run: Run, patch: pytest.MonkeyPatch) -> None:
    """One of two tokenising processes is stopped; the first rank waits for what it has."""
    import megadpo.data.processes as processes
    from megadpo.data.store import StoreWriter

    patch.setattr(processes, "SMALL", 0)
    patch.setattr(processes, "CHUNK", 8)
    add, added = StoreWriter.add, iter(range(10**6))

    def and_stop(self: Any, groups: Any) -> None:
        add(self, groups)
        if next(added) == 3:  # two signs of progress have shown how far apart they are
            act_once(run, stop_a_helper)

    patch.setattr(StoreWriter, "add", and_stop)


def hang_while_loading(run: Run, patch: pytest.MonkeyPatch) -> None:
    import megadpo.convert.importer as importer

    fill, filled = importer.fill, iter(range(10**6))

    def and_sleep(*arguments: Any) -> None:
        fill(*arguments)
        if torch.distributed.get_rank() == 1 and next(filled) == 3:
            act_once(run, lambda: time.sleep(600))

    patch.setattr(importer, "fill", and_sleep)


def hang_while_scoring(run: Run, patch: pytest.MonkeyPatch) -> None:
    import megadpo.train.score as scoring

    score, scored = scoring.score, iter(range(10**6))

    def and_sleep(*arguments: Any) -> Any:
        if torch.distributed.get_rank() == 1 and next(scored) == 4:
            act_once(run, lambda: time.sleep(600))
        return score(*arguments)

    patch.setattr("megadpo.train.run.groups_per_pass", lambda config: 4)
    patch.setattr(scoring, "score", and_sleep)


EARLY_HANGS = {
    "loading": (hang_while_loading, "loading "),
    "tokenising": (hang_while_tokenising, "tokenising data.train"),
    "scoring": (hang_while_scoring, "the reference's log-probabilities"),
}


@pytest.mark.parametrize("phase", one_of(EARLY_HANGS))
def test_a_hang_before_training_is_noticed(
    run: Run,
    phase: str,
    capfd: pytest.CaptureFixture[str],
    record_property: Callable[[str, object], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Within the limit of a step, with stacks, and the same command goes on."""
    hang, doing = EARLY_HANGS[phase]
    limit = float(os.environ.get("MEGADPO_TEST_HANG_TIMEOUT", "4"))
    with monkeypatch.context() as patch:
        hang(run, patch)
        assert run.train(f"train.hang_timeout={limit}", "data.num_proc=2") == 75
        seconds = time.monotonic() - float((run.folder / "began").read_text())
    assert "made no progress" in capfd.readouterr().err
    logs = [(run.run_dir / "logs" / f"rank-{rank}.log") for rank in range(2)]
    text = "".join(log.read_text() for log in logs if log.exists())
    assert f"hung: {doing}" in text
    assert "Current thread" in text or "Thread 0x" in text
    if phase == "tokenising":
        assert "_process_worker" in text, "the stack of the process that hung"
    record_property("seconds", seconds)
    assert seconds < limit + 10
    assert run.train("data.num_proc=2") == 0
    steps_once(run)


def in_a_child(*arguments: str) -> int:
    """The exit code of a command that ends its process."""
    child = os.fork()
    if child == 0:
        os._exit(main(list(arguments)))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("name", one_of(["prepare", "import", "export"]))
def test_commands_of_one_process_notice_a_hang(
    run: Run, shared: Path, name: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 75 and the stack, and the same command goes on."""
    import megadpo.convert.exporter as exporter
    import megadpo.convert.to_checkpoint as to_checkpoint
    import megadpo.data.processes as processes
    from megadpo.data.store import StoreWriter

    stories, imported, again = shared / "models" / "stories260k", run.folder / "imported", run.folder / "again"
    command, doing, place, called = {
        "prepare": (["prepare", str(run.path)], "tokenising data.train", StoreWriter, "add"),
        "import": (["import", str(stories), str(imported)], f"importing {stories}", to_checkpoint, "fill"),
        "export": (["export", str(imported), str(again)], f"exporting to {again}", exporter, "_hf_tensors"),
    }[name]
    if name == "export":
        assert main(["import", str(stories), str(imported)]) == 0
    monkeypatch.setattr(processes, "CHUNK", 8)
    calls, original = iter(range(10**6)), getattr(place, called)

    def and_sleep(*arguments: Any) -> Any:
        if next(calls) == 3:
            time.sleep(600)
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(place, called, and_sleep)
        patch.setattr("megadpo.parallel.watchdog.START", 20.0)
        patch.setattr("megadpo.conversion.DEFAULT", 2.0)
        began = time.monotonic()
        assert in_a_child(*command, *(["train.hang_timeout=2"] if name == "prepare" else [])) == 75
        assert time.monotonic() - began < 60
    error = capfd.readouterr().err
    assert f"hung: {doing} has taken" in error
    assert "and_sleep" in error
    assert main(command) == 0


@pytest.mark.slow
def test_who_holds_python_s_lock_is_ended_too(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """No thread of Python's can run then; faulthandler's timer can."""
    monkeypatch.setattr("megadpo.parallel.watchdog.BEHIND", 1.0)
    with in_step(4, 1, hold_python_s_lock, once=run.folder / "happened"):
        assert run.train("train.hang_timeout=4") in (1, 75)
    assert "hold_python_s_lock" in (run.run_dir / "logs" / "rank-1.log").read_text()
    assert run.train() == 0
    steps_once(run)


# ---- asked to stop


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_asked_to_stop(run: Run, signum: signal.Signals) -> None:
    def ask(context: Any) -> None:
        os.kill(os.getppid(), signum)
        time.sleep(0.3)

    with in_step(3, 0, ask, once=run.folder / "happened"):
        assert run.train() == 128 + signum
    newest = checkpoint.latest(run.run_dir)
    assert newest is not None
    assert not checkpoint.damage(newest)
    assert run.train() == 0
    steps_once(run)


# ---- numbers that are not finite


@contextmanager
def poisoned(groups: set[int], rank: int, value: float, where: str) -> Iterator[None]:
    """Micro-batches with any of these groups give `value` on this rank: in the loss, in one gradient, or in the
    reference's log-probabilities."""
    import megadpo.train.step as step

    original = step.objective_of

    def objective_of(objective: Any, shared: Any) -> Any:
        inner = original(objective, shared)

        def on_last_stage(batch: Any, logprob_N: Any) -> Any:
            if torch.distributed.get_rank() == rank and groups & set(batch.groups):
                if where == "reference":
                    batch.reference_S.fill_(value)
                loss, count, totals = inner(batch, logprob_N)
                if where == "loss":
                    loss, totals = loss * value, torch.cat([totals[:1] * value, totals[1:]])
                if where == "gradient" and loss.requires_grad:
                    loss.register_hook(lambda gradient: gradient * value)
                return loss, count, totals
            return inner(batch, logprob_N)

        return on_last_stage

    step.objective_of = objective_of
    try:
        yield
    finally:
        step.objective_of = original


def groups_of_step(run: Run, number: int) -> list[int]:
    """The groups that step `number` trains on: the order is a function of seed and epoch."""
    from megadpo.data.packing import take

    return [int(group) for group in take(600, 4 * (number - 1), 4, 0, True)]


@pytest.mark.parametrize(
    ("where", "value"),
    [
        few("loss", float("nan")),
        few("gradient", float("inf")),
        many("loss", float("inf")),
        many("reference", float("nan")),
    ],
)
def test_stop_names_rank_and_groups(run: Run, where: str, value: float, capfd: pytest.CaptureFixture[str]) -> None:
    bad = groups_of_step(run, 3)
    with poisoned(set(bad), 1, value, where), slow_saves():
        # what the step before began to write in the background is finished first
        assert run.train(f"train.async_save={'true' if where == 'loss' else 'false'}") == 3
    error = capfd.readouterr().err
    assert error.count("\n") == 1
    assert re.search(r"step 3: the (loss|gradient norm) is (nan|inf|-inf)", error), error
    assert f"rank 1: the {where} of group" in error
    assert "rank 0:" not in error
    named = {int(number) for number in re.findall(r"(\d+) \(\S*stories_pairs_train\.jsonl:\d+\)", error)}
    assert named
    assert named <= set(bad)
    newest = checkpoint.latest(run.run_dir)
    assert newest is not None
    assert newest.name == "step-00000002", "nothing was saved after it"
    assert [r["step"] for r in metrics(run.run_dir)] == [1, 2]


@pytest.mark.parametrize("policy", one_of(["rewind", "skip"]))
def test_go_on_without_the_batch(run: Run, policy: str, capfd: pytest.CaptureFixture[str]) -> None:
    """The weights are those of a run that never saw the batch's update, to the bit; and so after a kill."""
    bad = set(groups_of_step(run, 4))
    with poisoned(bad, 1, float("nan"), "loss"):
        assert run.train(f"train.on_nonfinite={policy}") == 0
        assert f"{policy}: this batch is left out" in capfd.readouterr().out
        records = metrics(run.run_dir)
        steps_once(run)
        assert [r.get("skipped") for r in records] == [None] * 3 + [1] + [None] * 2
        newest = checkpoint.latest(run.run_dir)
        assert newest is not None
        assert json.loads((newest / "state.json").read_text())["skipped"] == 1
        assert json.loads((newest / "state.json").read_text())["consumed"] == 4 * STEPS, "it counts as used"
        assert (newest.parent / "step-00000004").is_dir(), "a batch that was left out is saved after, where it is due"
        with in_step(6, 0, lambda context: os._exit(7), once=run.folder / "happened"):
            other = f"run_dir={run.folder / 'other'}"
            assert run.train(f"train.on_nonfinite={policy}", other, "--max-restarts=1") == 0
        again = metrics(run.folder / "other")
        assert [(r["step"], r.get("loss")) for r in again] == [(r["step"], r.get("loss")) for r in records]


@pytest.mark.slow
def test_left_out_batches_are_bounded(run: Run, capfd: pytest.CaptureFixture[str]) -> None:
    with poisoned(set(range(600)), 0, float("nan"), "loss"):
        assert run.train("train.on_nonfinite=skip", "train.max_skipped=2") == 3
    assert "2 batches were left out before" in capfd.readouterr().err
    with poisoned(set(range(600)), 0, float("nan"), "loss"):
        assert run.train("train.on_nonfinite=rewind", f"run_dir={run.folder / 'b'}") == 3
    assert "no checkpoint yet to go back to" in capfd.readouterr().err


@pytest.mark.slow
def test_a_fault_that_does_not_come_again_is_the_machine_s(run: Run, capfd: pytest.CaptureFixture[str]) -> None:
    import megadpo.train.step as step

    original = step.total

    def total(results: Any, objective: Any, context: Any) -> Any:
        totals = original(results, objective, context)
        if (run.run_dir / "metrics.jsonl").exists() and len(metrics(run.run_dir)) == 2 and context.data_size == 1:
            totals[0] = float("nan")
        return totals

    step.total = total
    try:
        assert run.train("parallel.data_parallel_size=1") == 3
    finally:
        step.total = original
    assert "computed again it is finite: a fault of this machine is likely" in capfd.readouterr().err


# ---- files


def test_the_store_changes_under_the_run(run: Run, capfd: pytest.CaptureFixture[str]) -> None:
    def write(context: Any) -> None:
        [store] = (run.folder / "cache").glob("*/groups.arrow")
        with store.open("r+b") as file:
            file.seek(100)
            file.write(b"x")

    with in_step(3, 0, write, once=run.folder / "happened"), slow_saves():
        assert run.train("train.async_save=true") == 2
    assert "groups.arrow: changed while the run was reading it" in capfd.readouterr().err
    newest = checkpoint.latest(run.run_dir)
    assert newest is not None, "what was being written is finished first"
    assert newest.name == "step-00000002"
    assert run.train() == 2, "and its checksum does not fit any more"
    assert "groups.arrow: damaged: its SHA-256" in capfd.readouterr().err


@pytest.mark.slow
def test_a_stop_by_the_drift_limit_waits_for_the_checkpoint(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """As all do that end every rank together; here without FP8."""
    from megadpo.errors import NumericsError
    from megadpo.train.drift import DriftWatch

    def over(self: Any, log: Any, record: dict[str, Any]) -> None:
        if record["step"] == 3:
            raise NumericsError("step 3: too far")
        log.step(record)

    with monkeypatch.context() as patch, slow_saves():
        patch.setattr(DriftWatch, "log_step", over)
        assert run.train("train.async_save=true") == 3
    newest = checkpoint.latest(run.run_dir)
    assert newest is not None
    assert newest.name == "step-00000002"
    assert not checkpoint.damage(newest)


@pytest.mark.slow
def test_half_a_line_of_metrics_and_a_lost_pointer(run: Run) -> None:
    with in_step(4, 0, lambda context: os._exit(7), once=run.folder / "happened"):
        assert run.train() == 1
    with (run.run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    (run.run_dir / "checkpoints" / "latest").unlink()
    assert run.train() == 0
    steps_once(run)


@pytest.mark.slow
def test_a_damaged_checkpoint_is_passed_over(run: Run, capfd: pytest.CaptureFixture[str]) -> None:
    assert run.train() == 0
    before = metrics(run.run_dir)
    newest = checkpoint.latest(run.run_dir)
    assert newest is not None
    shard = max(newest.glob("*.distcp"), key=lambda path: path.stat().st_size)
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    capfd.readouterr()
    assert run.train() == 0
    assert re.search(r"WARNING\s+\S+/step-00000006/\S+: damaged", capfd.readouterr().out)
    assert [(r["step"], r["loss"]) for r in metrics(run.run_dir)] == [(r["step"], r["loss"]) for r in before]


@pytest.mark.slow
def test_a_disk_that_is_too_small(run: Run, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Told before anything is written, with what is needed; what was saved before goes on once there is room."""
    real = shutil.disk_usage
    with monkeypatch.context() as patch:

        def usage(path: Any) -> Any:
            count = len(checkpoint.checkpoints(run.run_dir))
            return real(path)._replace(free=1000) if count else real(path)

        patch.setattr("megadpo.checkpoint.saving.shutil.disk_usage", usage)
        assert run.train() == 2
    error = capfd.readouterr().err
    assert re.search(r"the disk is full: the checkpoint takes 0\.\d+ GB and 0\.000 GB are free", error), error
    assert [path.name for path in checkpoint.checkpoints(run.run_dir)] == ["step-00000002"]
    assert not list((run.run_dir / "checkpoints").glob("*.partial"))
    assert run.train() == 0
    steps_once(run)


@pytest.mark.parametrize("mode", one_of(["true", "false"]))
def test_a_disk_that_fails_while_it_is_written(run: Run, mode: str, capfd: pytest.CaptureFixture[str]) -> None:
    """In the background too: told by all ranks together at the next step."""
    import resource

    def limit(context: Any) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    # by step 5 the save of step 2 is done, that of step 4 perhaps; that of step 6 fails
    with in_step(5, 0, limit, once=run.folder / "happened"):
        assert run.train(f"train.async_save={mode}") == 2
    error = capfd.readouterr().err
    assert "cannot be written by rank 0; the file would be larger than allowed" in error
    names = [path.name for path in checkpoint.checkpoints(run.run_dir)]
    assert names[0] == "step-00000002"
    assert names[1:] == ["step-00000004"] or (mode == "true" and not names[1:])
    assert not list((run.run_dir / "checkpoints").glob("*.partial"))
    assert run.train() == 0
    steps_once(run)


# ---- a real disk: a small file system in memory, where the tests may mount one


@pytest.fixture
def disk(run: Run) -> Iterator[Path]:
    """A file system of 64 MB in the place of the run's checkpoints; change it with `remount`."""
    place = run.run_dir / "checkpoints"
    place.mkdir(parents=True)
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64m", "none", str(place)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"cannot mount a file system here: {done.stderr.strip()}; run the tests as root")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def remount(disk: Path, *options: str) -> None:
    subprocess.run(["mount", "-o", ",".join(["remount", *options]), str(disk)], check=True)


def no_room_left(disk: Path) -> None:
    """Room for a quarter of a checkpoint or less beside what is there."""
    used = shutil.disk_usage(disk).used
    remount(disk, f"size={used + used // 8}")


@pytest.mark.parametrize(
    ("told", "mode"), [few("by a write", "false"), many("before", "false"), many("by a write", "true")]
)
def test_a_disk_that_is_really_full(
    run: Run, disk: Path, told: str, mode: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From step 5 on; by then one save is done, or two."""
    with monkeypatch.context() as patch:
        if told == "by a write":  # a file system that does not say how much is free, or a quota
            patch.setattr("megadpo.checkpoint.saving.Saving._enough_room", lambda self: None)
        with in_step(5, 0, lambda context: no_room_left(disk), once=run.folder / "happened"):
            assert run.train(f"train.async_save={mode}") == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1
    assert "the disk is full: " + ("free some space" if told == "by a write" else "the checkpoint takes") in error
    whole = checkpoint.checkpoints(run.run_dir)
    assert whole[0].name == "step-00000002"
    assert not any(checkpoint.damage(path) for path in whole)
    assert not list(disk.glob("*.partial"))
    remount(disk, "size=64m")
    assert run.train() == 0
    steps_once(run)


@pytest.mark.slow
def test_a_disk_that_becomes_read_only(run: Run, disk: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with in_step(4, 0, lambda context: remount(disk, "ro"), once=run.folder / "happened"):
        assert run.train() == 2
    assert "the file system is read-only: mount it for writing" in capfd.readouterr().err
    assert [path.name for path in checkpoint.checkpoints(run.run_dir)] == ["step-00000002"]
    remount(disk, "rw")
    assert run.train() == 0
    steps_once(run)


@pytest.mark.slow
def test_a_run_folder_on_a_read_only_disk(run: Run, disk: Path, capfd: pytest.CaptureFixture[str]) -> None:
    remount(disk, "ro")
    assert run.train(f"run_dir={disk / 'run'}") == 2
    error = capfd.readouterr().err
    assert "the file system is read-only: mount it for writing" in error
    assert error.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("by", [-1e6, 1e6])
def test_a_clock_that_jumps(run: Run, by: float, monkeypatch: pytest.MonkeyPatch) -> None:
    real = time.time

    def jump(context: Any) -> None:
        time.time = lambda: real() + by

    with in_step(3, None, jump):
        assert run.train() == 0
    steps_once(run)
    assert all(r["seconds"] > 0 for r in metrics(run.run_dir))


# ---- two starts


def test_a_second_start_and_one_after_a_kill(run: Run, capfd: pytest.CaptureFixture[str]) -> None:
    """While one trains, another in its run folder is refused and does it no harm. Its launcher killed, the next one
    goes on at once."""
    with in_step(3, 0, lambda context: time.sleep(600), once=run.folder / "happened"):
        child = os.fork()
        if child == 0:
            os.setpgid(0, 0)
            os._exit(run.train())
    end = time.monotonic() + 200
    while checkpoint.latest(run.run_dir) is None and time.monotonic() < end:
        time.sleep(0.05)
    before = (run.run_dir / "metrics.jsonl").read_bytes()
    (run.run_dir / "checkpoints" / "step-00000009.partial").mkdir()
    capfd.readouterr()
    assert run.train() == 2
    error = capfd.readouterr().err
    assert re.search(r"run_dir = \S+/run: process \d+ on \S+, started .*, trains in it already", error), error
    assert error.count("\n") == 1
    assert (run.run_dir / "checkpoints" / "step-00000009.partial").is_dir()
    assert (run.run_dir / "metrics.jsonl").read_bytes() == before
    assert (run.run_dir / "logs" / "rank-1.log").exists(), "logs that are empty so far are the other's to write"
    os.kill(child, signal.SIGKILL)
    assert run.train() == 0
    os.waitpid(child, 0)
    assert "no longer lives: this start takes" in capfd.readouterr().out
    steps_once(run)
    assert not (run.run_dir / "owner.json").exists()


@pytest.mark.slow
def test_the_launcher_is_killed(run: Run) -> None:
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        os._exit(run.train())
    when_step(run.run_dir, 3, lambda: os.kill(child, signal.SIGKILL)).join()
    os.waitpid(child, 0)
    assert run.train() == 0
    steps_once(run)
