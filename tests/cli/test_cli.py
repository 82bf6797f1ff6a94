"""The command line: one line for a mistake, the right exit code, and nothing imported before it is needed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megadpo import cli
from megadpo.errors import ConfigError, DataError
from megadpo.files import write_text

ROOT = Path(__file__).resolve().parents[2]
GOOD = "run_dir: run\nmodel: {path: model}\ndata: {train: pairs.jsonl, cache_dir: cache}\n"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(GOOD)
    for name in [*os.environ]:
        if name.startswith("SLURM_") or name in ("RANK", "WORLD_SIZE"):
            monkeypatch.delenv(name)
    return tmp_path


@pytest.fixture
def job(monkeypatch):
    """Put a trivial job in the place of training."""

    def put(run) -> None:
        monkeypatch.setattr(cli, "_train_rank", run)
        monkeypatch.setattr(cli, "_import_training", lambda: None)

    return put


def megadpo(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "megadpo.cli", *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def refused(capsys, *arguments: str) -> str:
    """The line on standard error of a command that exits with 2."""
    try:
        code = cli.main(arguments)
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert err.startswith("megadpo: error: ")
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), "required: COMMAND; see megadpo --help"),
        (("trian", "run.yaml"), "invalid choice: 'trian' (choose from 'train', 'prepare', 'eval'"),
        (("train",), "required: run.yaml; see megadpo train --help"),
        (("train", "nothing.yaml"), "nothing.yaml: no such file"),
        (("train", "run.yaml", "seed=x"), 'command line: seed = "x": must be a whole number'),
        (("train", "run.yaml", "seed"), "an override is key=value"),
        (
            ("train", "run.yaml", "--train.max_steps=3"),
            "unknown option --train.max_steps=3; settings are given as",
        ),
        (("eval", "run.yaml", "--checkpoint", "x", "sed=1"), "sed: unknown key; did you mean seed?"),
        (("export", "run", "out", "more"), "unexpected 'more'"),
        (("export", "nowhere", "out"), "has no run.yaml; give the run_dir of a training run"),
        (("export", "nowhere", "out", "--dtype", "int8"), "argument --dtype: invalid choice: 'int8' (choose from"),
        (("import", "nowhere", "out"), "nowhere is not a folder: give a Hugging Face model folder"),
        (("import", "nowhere", "out", "--processes", "0"), "argument --processes: 0 is not between 0 and 1e9"),
        (("import", "nowhere", "out", "--processes", "x"), "argument --processes: invalid int value: 'x'"),
        (("import", "x", "out", "--verify", "--verify-text", "no"), "--verify-text no: cannot be read as text"),
        (("inspect", "run.yaml", "--group", "x"), "argument --group: invalid int value: 'x'"),
        (("inspect", "run.yaml", "--eval"), "data.eval is not given in the run file"),
        (("inspect", "run.yaml", "--eval", "--batch", "0"), "--batch shows the batches of training"),
        (("inspect", "run.yaml", "--batch", "-1"), "--batch -1: must be NUMBER or STEP:NUMBER"),
        (("inspect", "run.yaml", "--batch", "1:2:3"), "--batch 1:2:3: must be NUMBER or STEP:NUMBER"),
        (("inspect", "run.yaml", "--batch", "0", "--group", "1"), "not allowed with argument --batch"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(capsys, arguments, expected):
    assert expected in refused(capsys, *arguments)


def test_overrides_on_both_sides_of_an_option(capsys, monkeypatch):
    seen = []
    monkeypatch.setattr(cli, "_start", lambda config, job: seen.append((config, job)) or 0)
    assert cli.main(["eval", "run.yaml", "seed=1", "--checkpoint", "here", "batch.global_batch_size=2"]) == 0
    config, job = seen[0]
    assert (config.seed, config.batch.global_batch_size) == (1, 2)
    assert job.args == ("here", False)


def test_training_gets_config_and_rank_and_gives_the_exit_code(job):
    job(lambda config, rank: 10 * rank.world_size + config.seed)
    assert cli.main(["train", "run.yaml", "seed=3", "parallel.data_parallel_size=2"]) == 23


def test_a_mistake_found_in_the_ranks_is_told_once(capfd, job):
    def run(config, rank):
        raise DataError("pairs.jsonl:3: no JSON; mend the line")

    job(run)
    assert cli.main(["train", "run.yaml", "parallel.data_parallel_size=2"]) == 2
    assert capfd.readouterr().err == "megadpo: error: pairs.jsonl:3: no JSON; mend the line\n"


def test_a_fault_in_a_rank_is_told_with_its_traceback(capfd, job):
    def run(config, rank):
        if rank.rank == 1:
            raise ValueError("odd")
        time.sleep(60)

    job(run)
    assert cli.main(["train", "run.yaml", "parallel.data_parallel_size=2"]) == 1
    lines = capfd.readouterr().err.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-2] == "ValueError: odd"
    assert lines[-1].startswith("megadpo: error: rank 1 failed with ValueError")


def test_a_fault_outside_the_ranks_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(cli, "_config", lambda options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["train", "run.yaml"])


def test_trackers_are_checked_before_anything_starts(capsys, job, monkeypatch):
    job(lambda config, rank: pytest.fail("started"))
    monkeypatch.setattr("megadpo.observe.trackers._installed", lambda package: False)
    assert "pip install 'megadpo[logging]'" in refused(capsys, "train", "run.yaml", "log.tensorboard=true")
    assert not Path("run").exists()


def test_under_torchrun_one_rank_of_a_machine_speaks(capsys, monkeypatch):
    for name, value in {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "x",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    for rank, lines in (("0", 1), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert cli.main(["train", "run.yaml", "sed=1"]) == 2
        assert capsys.readouterr().err.count("\n") == lines


def test_schema(capsys):
    assert cli.main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out)["required"] == ["run_dir", "model", "data"]


def test_several_mistakes_get_a_line_each(capsys):
    assert cli.main(["train", "run.yaml", "seed=x", "sed=1"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "megadpo: error: run.yaml has 2 problems"
    assert len(lines) == 3


# ---- commands over real data


def test_prepare_and_inspect(shared, capsys):
    data = shared / "data" / "stories_pairs_eval.jsonl"
    settings = [f"model.path={shared / 'models' / 'stories260k'}", f"data.train={data}"]
    assert cli.main(["prepare", "run.yaml", *settings]) == 0
    assert "68 rows read as trl_standard, 68 groups kept" in capsys.readouterr().out
    assert cli.main(["inspect", "run.yaml", "--group", "3", *settings]) == 0
    lines = capsys.readouterr().out.splitlines()
    first = json.loads(data.read_text().splitlines()[3])
    assert lines[0] == "group 3 of 68: stories_pairs_eval.jsonl:4"
    assert lines[1].startswith("prompt: ")
    assert lines[3].startswith("chosen: ")
    assert lines[5].startswith("rejected: ")
    words = lines[2].strip().removeprefix("<s>").replace("|", "").replace("\u2581", " ").strip()
    assert words == first["prompt"].strip()
    assert lines[4].endswith("</s>")
    assert "group 68" in refused(capsys, "inspect", "run.yaml", "--group", "68", *settings)


# ---- as a process of its own


def test_help_and_version_come_without_torch(folder):
    code = (
        "import sys; from megadpo import cli\n"
        "try: cli.main(sys.argv[1:])\n"
        "except SystemExit as stop: assert not stop.code, stop.code\n"
        "assert 'torch' not in sys.modules and 'megatron' not in sys.modules\n"
    )
    for option in ("--help", "--version"):
        done = subprocess.run(
            [sys.executable, "-c", code, option], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert "megadpo" in done.stdout


def test_a_mistake_comes_without_megatron(folder):
    code = (
        "import sys; from megadpo import cli\n"
        "assert cli.main(['train', 'run.yaml', 'sed=1']) == 2\n"
        "assert 'megatron' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "megadpo: error: command line: sed: unknown key; did you mean seed?\n"


def test_exit_codes_of_the_process(folder):
    done = megadpo("train", "run.yaml", "model.path=")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "megadpo: error: command line: model.path = null: must be text\n"


SLOW = """
import sys, time
from pathlib import Path
from megadpo import cli
from megadpo.parallel.stop import StopSignal

def run(config, rank):
    with StopSignal() as stop:
        Path(f"ready-{rank.rank}").touch()
        while not stop.requested:
            time.sleep(0.02)
        Path(f"saved-{rank.rank}").touch()
        return stop.exit_code

cli._train_rank, cli._import_training = run, lambda: None
sys.exit(cli.main(["train", "run.yaml", "parallel.data_parallel_size=2"]))
"""


@pytest.mark.parametrize("to_all", [False, True])
def test_ctrl_c_saves_and_exits_with_130(folder, to_all):
    """to_all: as a terminal sends it, to every process of the foreground group."""
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW], env=os.environ | {"PYTHONPATH": str(ROOT)}, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    while not all(Path(f"ready-{rank}").exists() for rank in range(2)):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    (os.killpg if to_all else os.kill)(process.pid, signal.SIGINT)
    assert process.communicate(timeout=30) == (b"", b"")
    assert process.returncode == 130
    assert all(Path(f"saved-{rank}").exists() for rank in range(2))


def test_a_run_folder_is_needed_for_an_export(capsys):
    write_text(Path("run/run.yaml"), GOOD)
    assert "has no complete checkpoint yet; train first" in refused(capsys, "export", "run", "out")


def test_errors_have_the_exit_code_of_their_kind(capsys, monkeypatch):
    class SpecialError(ConfigError):
        exit_code = 9

    def command(options):
        raise SpecialError("x")

    monkeypatch.setattr(cli, "_schema", command)
    assert cli.main(["schema"]) == 9
    assert capsys.readouterr().err == "megadpo: error: x\n"
