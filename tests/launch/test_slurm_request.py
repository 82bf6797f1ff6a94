"""What is asked of SLURM: refused before anything is submitted, or turned into an argument list. No SLURM here."""

import shlex
import sys
from pathlib import Path

import pytest
import yaml
from tiny import write_llama

from megadpo import cli
from megadpo.launch import slurm
from megadpo.launch.slurm import Request, limit_seconds

SBATCH = """#!/bin/sh
printf '%s\\n' "$@" > {folder}/arguments
env > {folder}/environment
{act}
"""


@pytest.fixture(autouse=True)
def run_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_llama(tmp_path / "model")
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"run_dir": "runs/a b", "model": {"path": "model"}, "data": {"train": "x.jsonl"}}))
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    (tmp_path / "bin").mkdir()
    return path


def put(folder: Path, name: str, act: str) -> None:
    """A command of SLURM that notes its arguments and does `act`."""
    path = folder / "bin" / name
    path.write_text(SBATCH.format(folder=folder, act=act))
    path.chmod(0o755)


def refused(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    assert cli.main(["launch", "run.yaml", *options]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    return err


CASES = [
    (("--nodes", "0"), "--nodes 0: must be at least 1"),
    (("--gpus-per-node", "-1"), "--gpus-per-node -1: must be at least 1"),
    (("--gpus-per-node", "1", "--processes-per-node", "1"), "give one of the two"),
    (("--container-mounts", "/data"), "--container-mounts: does nothing without --container-image"),
    (("--partition", "gpu; rm -rf /"), "--partition 'gpu; rm -rf /': must be letters"),
    (("--job-name", "a\nb"), "--job-name 'a\\nb': must be letters"),
    (("--time", "tomorrow"), "--time 'tomorrow': must be minutes, h:mm:ss, or days-hours"),
    (("--time", "6"), "--time 6: leaves no time to train"),
    (("--max-restarts", "-1"), "--max-restarts -1: must be at least 0"),
    (("--sbatch", "output=x"), "--sbatch output=x: output is set by megadpo launch"),
    (("--sbatch", "outp=x"), "--sbatch outp=x: outp is set by megadpo launch"),
    (("--sbatch", "Mem=x"), "--sbatch 'Mem=x': must be KEY=VALUE"),
    (("--sbatch", "comment=a\nb"), "must be KEY=VALUE"),
    (("--sbatch=--mem=0",), "must be KEY=VALUE"),
    (("parallel.tensor_model_parallel_size=2", "--nodes", "3"), "= 2 processes for one replica and 3 were started"),
    (("parallel.data_parallel_size=2", "--nodes", "3"), "data 2 = 2 processes and 3 were started"),
    (("parallel.pipeline_model_parallel_size=4", "--nodes", "4"), "4 stages for 3 layers"),
    (("parallel.tensor_model_parallel_size=3", "--nodes", "3"), "sizes that fit this model: 1, 2, 4"),
    (("batch.global_batch_size=4", "--nodes", "8"), "fewer groups per update than the 8 data-parallel replicas"),
    (('run_dir="a\\tb"',), "SLURM takes no such character in a path"),
    (("data.train=https://me:hunter@host/x.jsonl",), "looks like a key or a password"),
]


@pytest.mark.parametrize(("options", "expected"), CASES)
def test_refused_before_it_is_submitted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], expected: str
) -> None:
    put(tmp_path, "sbatch", "echo 17")
    said = refused(capsys, *options)
    assert expected in said
    assert "hunter" not in said
    assert not (tmp_path / "arguments").exists()


def test_submitted_as_an_argument_list(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run folder with a blank and a comment with quotes stay one argument each; another job's variables stay out."""
    put(tmp_path, "sbatch", "echo '17;cluster'")
    monkeypatch.setenv("SLURM_NTASKS", "99")
    monkeypatch.setenv("RANK", "3")
    options = ["--nodes", "2", "--gpus-per-node", "4", "--time", "1:00:00", "--account", "me", "--qos", "high"]
    more = ["--sbatch", "exclusive", "--sbatch", "comment=a 'b' $(c)", "--max-restarts", "7", "--preflight"]
    image = ["--container-image", "nvcr.io#nvidia/pytorch:x", "--container-mounts", "/data:/data"]
    assert cli.main(["launch", "run.yaml", "seed=5", *options, *more, *image]) == 0
    run_dir = tmp_path / "runs" / "a b"
    assert (tmp_path / "arguments").read_text().splitlines() == [
        "--parsable",
        "--requeue",
        "--open-mode=append",
        "--job-name=a-b",
        "--nodes=2",
        "--ntasks=8",
        "--ntasks-per-node=4",
        "--gpus-per-node=4",
        "--account=me",
        "--time=1:00:00",
        "--qos=high",
        "--signal=B:USR1@300",
        f"--output={run_dir}/logs/slurm-%j.log",
        f"--chdir={tmp_path}",
        "--exclusive",
        "--comment=a 'b' $(c)",
        f"{run_dir}/slurm/train.sbatch",
        f"{run_dir}/slurm",
        "python3",
        "7",
        "1",
        "--container-image=nvcr.io#nvidia/pytorch:x",
        "--container-mounts=/data:/data",
    ]
    environment = (tmp_path / "environment").read_text().splitlines()
    assert not [line for line in environment if line.startswith(("SLURM_", "RANK="))]
    assert "seed: 5" in (run_dir / "slurm" / "run.yaml").read_text()
    assert {path.name for path in (run_dir / "slurm").iterdir()} == {*slurm.FILES, "run.yaml", "job"}
    assert "submitted job 17: 2 nodes x 4 processes" in capsys.readouterr().out


def test_a_dry_run_submits_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["launch", "run.yaml", "--nodes", "2", "--dry-run"]) == 0
    first, *script = capsys.readouterr().out.splitlines()
    command = shlex.split(first.removeprefix("# "))
    assert command[0] == "sbatch"
    assert sys.executable in command
    assert script[0] == "#!/bin/bash"
    assert not (tmp_path / "runs").exists()


def test_what_slurm_says_is_passed_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(tmp_path, "sbatch", "echo 'sbatch: error: invalid partition specified: x' >&2; exit 1")
    said = refused(capsys, "--partition", "x")
    assert "SLURM refuses the job (sbatch: error: invalid partition specified: x)" in said


def test_one_job_per_run_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(tmp_path, "sbatch", "echo 17")
    assert cli.main(["launch", "run.yaml"]) == 0
    capsys.readouterr()
    put(tmp_path, "squeue", "echo 'PENDING|(Resources)'")
    assert "job 17 (PENDING) trains in it already" in refused(capsys)
    put(tmp_path, "squeue", "echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1")
    assert "job 17 (UNKNOWN) trains in it already" in refused(capsys), "who cannot be asked may be training"
    put(tmp_path, "squeue", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    assert cli.main(["launch", "run.yaml"]) == 0


def test_without_a_number_nothing_was_submitted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(tmp_path, "sbatch", "echo 'Usage: sbatch [OPTIONS...]'")
    assert "sbatch gave no job number but 'Usage: sbatch [OPTIONS...]'" in refused(capsys)


def test_without_slurm_it_trains_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = []
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(cli, "_start", lambda config, *_: started.append(config.parallel.data_parallel_size) or 0)
    assert cli.main(["launch", "run.yaml"]) == 0
    assert cli.main(["launch", "run.yaml", "--nodes", "2", "--processes-per-node", "3"]) == 0
    assert started == [None, 6]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 5400), ("1:30", 90), ("2:00:05", 7205), ("1-6", 108000), ("1-6:30", 109800), ("0-0:0:9", 9), ("1h", None)],
)
def test_time_limits(text: str, seconds: int | None) -> None:
    assert limit_seconds(text) == seconds


def test_one_process_where_nothing_is_asked() -> None:
    assert Request().world_size == 1
    assert Request(nodes=3, gpus_per_node=8).world_size == 24
