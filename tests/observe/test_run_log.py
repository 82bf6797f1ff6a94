"""The log of a run: metrics.jsonl, the progress line, TensorBoard, W&B, and what a bad disk does to them."""

import errno
import io
import json
import math
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from megadpo.config import Config, DataConfig, LogConfig, ModelConfig
from megadpo.config.decode import load_config
from megadpo.errors import MachineError, StorageError
from megadpo.files import storage_errors, write_text
from megadpo.objectives import DPO
from megadpo.objectives.listwise import RRHF
from megadpo.objectives.unpaired import KTO
from megadpo.observe import trackers, versions
from megadpo.observe.log import RunLog, truncate_after, write_run_files
from megadpo.observe.progress import Screen, Terminal
from megadpo.observe.quiet import quiet
from megadpo.observe.speed import TimeLeft, clock, short
from megadpo.observe.tokens import group_text
from megadpo.observe.trackers import check_trackers


def record(step: int, **more: float) -> dict[str, float | int]:
    return {
        "step": step,
        "loss": 0.5,
        "rewards/margins": 0.25,
        "rewards/accuracies": 0.75,
        "pairs_per_second": 3.14,
        "tokens_per_second": 12345.6,
    } | more


def config_in(folder: Path, **log: object) -> Config:
    return Config(str(folder), ModelConfig("model"), DataConfig(("pairs.jsonl",)), log=LogConfig(**log))  # type: ignore[arg-type]


def console(terminal: bool, width: int = 120) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=width, highlight=False, _environ={})


def written(to: Console) -> str:
    assert isinstance(to.file, io.StringIO)
    return to.file.getvalue()


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# ---- metrics.jsonl


def test_one_object_a_step(tmp_path):
    with RunLog(tmp_path, 2, config_in(tmp_path), enabled=True, console=console(False)) as log:
        log.resume(0)
        log.step(record(1))
        assert records(tmp_path) == [record(1)], "on the disk at once"
        log.step(record(2, loss=math.nan, grad_norm=math.inf))
        log.step({"step": 2, "eval_loss": 0.6, "eval_rewards/accuracies": 0.5})
    assert records(tmp_path) == [
        record(1),
        record(2, loss=None, grad_norm=None),
        {"step": 2, "eval_loss": 0.6, "eval_rewards/accuracies": 0.5},
    ]
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


def test_every_step_stands_once_after_a_resume(tmp_path):
    with RunLog(tmp_path, 6, config_in(tmp_path), enabled=True, console=console(False)) as log:
        log.resume(0)
        for step in range(1, 6):
            log.step(record(step))
            log.step({"step": step, "eval_loss": 0.1})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # killed in the middle of a write
    with RunLog(tmp_path, 6, config_in(tmp_path), enabled=True, console=console(False)) as log:
        log.resume(3)
        for step in range(4, 7):
            log.step(record(step, loss=0.1))
    steps = [entry["step"] for entry in records(tmp_path) if "loss" in entry]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert [entry["loss"] for entry in records(tmp_path) if "loss" in entry] == [0.5] * 3 + [0.1] * 3
    assert [entry["step"] for entry in records(tmp_path) if "eval_loss" in entry] == [1, 2, 3]


def test_truncating_nothing(tmp_path):
    truncate_after(tmp_path / "metrics.jsonl", 3)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_other_ranks_write_nothing(tmp_path, capfd):
    with RunLog(tmp_path / "run", 2, config_in(tmp_path, tensorboard=True), enabled=False) as log:
        log.resume(0)
        log.step(record(1))
        log.line("hello")
        log.banner(["a", "b"])
        with log.phase("reference", 10) as done:
            done(10)
    assert not (tmp_path / "run").exists()
    assert capfd.readouterr() == ("", "")


# ---- the terminal


@pytest.mark.parametrize(("objective", "what"), [(DPO(), "pairs"), (KTO(), "responses"), (RRHF(), "lists")])
def test_the_step_line_says_what_a_group_is(tmp_path, objective, what):
    plain = console(False)
    with RunLog(tmp_path, 1, replace(config_in(tmp_path), objective=objective), enabled=True, console=plain) as log:
        log.resume(0)
        log.step(record(1))
    assert f"3.140 {what}/s" in written(plain)


def test_plain_lines_where_no_terminal_is(tmp_path):
    plain = console(False)
    with RunLog(tmp_path, 30, config_in(tmp_path), enabled=True, console=plain) as log:
        log.banner(["model  x", "grid  y"])
        log.resume(0)
        for step in range(1, 31):
            log.step(record(step))
        log.step({"step": 30, "eval_loss": 0.6, "eval_rewards/accuracies": 0.5})
        log.line("saved")
    lines = written(plain).splitlines()
    numbers = "loss 0.500  margin 0.250  acc 0.750  3.140 pairs/s  12.3k tok/s"
    assert lines[:2] == ["model  x", "grid  y"]
    assert lines[2].startswith(f"step 1/30  {numbers}  0:0")
    assert lines[3:] == [
        f"step 30/30  {numbers}",
        "step 30, held-out data  loss 0.600  acc 0.500",
        "saved",
    ], "the first and the last step only: all of it took less than ten seconds"


def test_the_last_numbers_of_a_run_that_is_stopped(tmp_path):
    plain = console(False)
    with RunLog(tmp_path, 30, config_in(tmp_path), enabled=True, console=plain) as log:
        log.resume(0)
        log.step(record(1))
        log.step(record(2))
    assert [line.split("  ")[0] for line in written(plain).splitlines()] == ["step 1/30", "step 2/30"]


def test_plain_lines_come_every_ten_seconds():
    time = [0.0]
    plain = console(False)
    screen = Screen(plain, now=lambda: time[0])
    with screen.task("step", 100) as task:
        for step in range(1, 51):
            time[0] += 1
            task.to(step, ["x"])
    assert [line.split()[1] for line in written(plain).splitlines()] == [
        "1/100",
        "11/100",
        "21/100",
        "31/100",
        "41/100",
    ]
    assert written(plain).splitlines()[-1] == "step 41/100  x  0:59 left"


@pytest.mark.parametrize("width", [60, 84, 120, 160])
def test_one_line_on_a_terminal(tmp_path, width):
    terminal = console(True, width)
    with RunLog(tmp_path, 1000, config_in(tmp_path), enabled=True, console=terminal) as log:
        log.resume(100)
        log.step(record(101))
        shown = written(terminal)
        log.line("saved")
    assert "step 101/1,000" in shown
    assert "loss 0.500" in shown
    assert "acc 0.750" in shown
    assert ("tok/s" in shown) == (width > 60), "the least important leaves where there is no room"
    assert "left" in shown
    assert "\n" not in shown.rstrip("\n")
    assert "\x1b[?25h" in written(terminal), "the cursor is shown again"
    assert "saved" in written(terminal)


def test_a_phase_inside_training(tmp_path):
    terminal = console(True)
    with RunLog(tmp_path, 10, config_in(tmp_path), enabled=True, console=terminal) as log:
        with log.phase("reference", 640) as done:
            done(64)
            done(640)
        log.resume(0)
        log.step(record(1))
        with log.phase("held-out data", None) as done:
            done(3)
        log.step(record(2))
    text = written(terminal)
    assert "reference 64/640" in text
    assert "held-out data 3" in text
    assert "step 2/10" in text


def test_a_lost_terminal_does_not_stop_the_run(tmp_path):
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    gone = Terminal(Gone())
    with RunLog(tmp_path, 2, config_in(tmp_path), enabled=True, console=gone) as log:
        log.line("x")
        log.resume(0)
        log.step(record(1))
        log.step(record(2))
    assert len(records(tmp_path)) == 2


def test_what_libraries_print_is_not_pulled_onto_the_terminal(tmp_path):
    """rich would put sys.stdout, a rank's log file, above its progress line."""
    before = sys.stdout
    with RunLog(tmp_path, 2, config_in(tmp_path), enabled=True, console=console(True)) as log:
        log.resume(0)
        log.step(record(1))
        assert sys.stdout is before


def test_time_left():
    left = TimeLeft(100, window=4)
    assert left.seconds() is None
    left.mark(0, 0.0)
    left.mark(1, 60.0)  # a slow start
    assert left.seconds() == 99 * 60
    for step in range(2, 12):
        left.mark(step, 60.0 + 2 * step)
    assert left.seconds() == 89 * 2
    left.mark(100, 500.0)
    assert left.seconds() == 0


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (252, "4:12"), (3852, "1:04:12"), (183600, "2d 03:00:00"), (59.6, "1:00")],
)
def test_clock(seconds, text):
    assert clock(seconds) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0.6931, "0.693"),
        (-12.345, "-12.3"),
        (8192, "8,192"),
        (1.2e-5, "1.2e-05"),
        (0, "0.000"),
        (math.nan, "nan"),
    ],
)
def test_short(number, text):
    assert short(number) == text


# ---- trackers


def test_tensorboard(tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = config_in(tmp_path, tensorboard=True)
    with RunLog(tmp_path, 4, config, enabled=True, console=console(False)) as log:
        log.resume(0)
        for step in (1, 2, 3):
            log.step(record(step))
    with RunLog(tmp_path, 4, config, enabled=True, console=console(False)) as log:
        log.resume(1)  # steps 2 and 3 are done again
        for step in (2, 3):
            log.step(record(step, loss=0.1))
        log.step({"step": 3, "eval_loss": 0.2})
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    loss = [(event.step, round(event.value, 3)) for event in events.Scalars("loss")]
    assert loss == [(1, 0.5), (2, 0.1), (3, 0.1)]
    assert "rewards/margins" in events.Tags()["scalars"]
    assert [event.step for event in events.Scalars("eval_loss")] == [3]


def test_wandb_offline(tmp_path, monkeypatch, capfd):
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    config = config_in(tmp_path, wandb_project="tests", wandb_mode="offline", run_name="one")
    for start in (0, 1):
        with quiet(), RunLog(tmp_path, 2, config, enabled=True, console=console(False)) as log:
            log.resume(start)
            log.step(record(start + 1, grad_norm=math.nan))
    runs = list((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(runs) == 2
    assert len({run.name for run in runs}) == 1, "a run that goes on keeps its id"
    assert runs[0].name == f"run-{(tmp_path / 'wandb-id.txt').read_text().strip()}.wandb"
    assert all(run.stat().st_size > 0 for run in runs)
    assert capfd.readouterr() == ("", "")


def test_a_missing_tracker_is_told_before_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(trackers, "_installed", lambda package: False)
    with pytest.raises(
        MachineError, match=r"tensorboard is missing; install it with: pip install 'megadpo\[logging\]'"
    ):
        check_trackers(LogConfig(tensorboard=True))
    with pytest.raises(MachineError, match="wandb is missing"):
        check_trackers(LogConfig(wandb_project="x"))
    check_trackers(LogConfig())


def test_a_folder_named_wandb_is_not_the_package(tmp_path, monkeypatch):
    (tmp_path / "nopackage").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert not trackers._installed("nopackage")
    assert trackers._installed("json")


def test_wandb_without_a_key(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(MachineError, match=r"no key for Weights & Biases.*wandb login"):
        check_trackers(LogConfig(wandb_project="x"))


# ---- run files


def test_run_files(tmp_path):
    config = config_in(tmp_path / "run")
    write_run_files(tmp_path / "run", config)
    assert load_config(tmp_path / "run" / "run.yaml", []) == config
    found = json.loads((tmp_path / "run" / "versions.json").read_text())
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["torch"]
    assert found["megatron-core"].startswith("0.16")
    assert {
        "transformer-engine",
        "apex",
        "transformers",
        "megadpo",
        "cuda",
        "nvidia-driver",
        "devices",
    } <= set(found)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["run.yaml", "versions.json"]


def test_no_secret_in_any_file_of_a_run(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "canary" * 8)
    monkeypatch.setenv("HF_TOKEN", "hf_canary" + "x" * 24)
    config = Config(
        str(tmp_path), ModelConfig("m"), DataConfig(("https://me:canary@host/pairs.jsonl",)),
        log=LogConfig(tensorboard=True),
    )  # fmt: skip
    write_run_files(tmp_path, config)
    with RunLog(tmp_path, 1, config, enabled=True, console=console(False)) as log:
        log.resume(0)
        log.step(record(1))
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or b"canary" not in path.read_bytes(), path


@pytest.mark.parametrize(("folder", "expected"), [("multi_tensor_apply", "NVIDIA"), (None, "not NVIDIA's")])
def test_whose_apex_it_is(tmp_path, monkeypatch, folder, expected):
    """PyPI has another package of that name; neither is imported to tell."""
    package = tmp_path / "apex"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    if folder:
        (package / folder).mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    found = versions.versions()
    warnings = versions.package_warnings(found)
    if folder:
        assert not warnings
        assert not str(found["apex"]).startswith(versions.NOT_NVIDIAS)
    else:
        assert str(found["apex"]).startswith(expected)
        assert "pip uninstall apex" in warnings[0]


def test_no_apex_no_warning():
    assert versions.package_warnings(versions.versions()) == []


# ---- the disk


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "the disk is full: free some space, or set run_dir to another place"),
        (errno.EROFS, "the file system is read-only"),
        (errno.EACCES, "no permission"),
        (errno.EDQUOT, "the quota is used up"),
        (errno.EIO, "Input/output error"),
    ],
)
def test_what_the_disk_refuses(number, words):
    with (
        pytest.raises(StorageError, match=rf"^/runs/x: cannot be written; {words}"),
        storage_errors(Path("/runs/x")),
    ):
        raise OSError(number, os.strerror(number))


def test_a_full_disk_while_metrics_are_written(tmp_path):
    with RunLog(tmp_path, 2, config_in(tmp_path), enabled=True, console=console(False)) as log:
        log.resume(0)
        assert log._file is not None
        log._closing.pop_all()
        log._file = open("/dev/full", "w")  # noqa: SIM115
        with pytest.raises(StorageError, match=r"metrics\.jsonl: cannot be written; the disk is full"):
            log.step(record(1))


def test_a_run_folder_that_is_a_file(tmp_path):
    (tmp_path / "run").write_text("")
    with (
        RunLog(tmp_path / "run", 2, config_in(tmp_path), enabled=True, console=console(False)) as log,
        pytest.raises(StorageError, match="run"),
    ):
        log.resume(0)


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    target = tmp_path / "run.yaml"
    write_text(target, "before")
    monkeypatch.setattr(os, "replace", lambda *paths: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    with pytest.raises(StorageError, match=r"run\.yaml"):
        write_text(target, "after")
    assert target.read_text() == "before"
    assert list(tmp_path.iterdir()) == [target]


# ---- tokens of a group


def test_tokens_of_a_group():
    words = {1: "<s>", 2: "_hi", 3: "\n", 4: "</s>"}
    text = group_text("group 0", [1, 2], [[2, 4], [3, 4]], words.__getitem__)
    assert text.plain.splitlines() == [
        "group 0",
        "prompt: 2 tokens, not scored",
        "  <s>|_hi",
        "chosen: 2 tokens, scored",
        "  _hi|</s>",
        "rejected: 2 tokens, scored",
        "  \\n|</s>",
    ]
    scored = [text.plain[span.start : span.end] for span in text.spans if "bold" in str(span.style)]
    assert scored == ["_hi", "</s>", "\\n", "</s>"]
    assert "_hi:2|</s>:4" in group_text("g", [1], [[2, 4]], words.__getitem__, ids=True).plain
