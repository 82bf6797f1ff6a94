"""A run as a SLURM job: checked here, frozen in the run folder, submitted with sbatch. Argument lists, no shell."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megadpo.config import Config
from megadpo.config.check import check_grid, check_world
from megadpo.config.decode import to_yaml
from megadpo.convert.families import read_shape
from megadpo.errors import ConfigError, MachineError
from megadpo.files import storage_errors, write_text
from megadpo.parallel.squeue import job_state

FOLDER = "slurm"
"""Folder of the run folder with what was submitted, and what the job writes about itself."""
FILES = ("train.sbatch", "env.sh", "preflight.py")
OURS = (
    *("nodes", "ntasks", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "job-name", "partition", "account"),
    *("time", "qos", "constraint", "output", "error", "open-mode", "requeue", "no-requeue", "signal", "chdir", "wrap"),
    *("array", "parsable", "export", "wait", "test-only", "no-kill", "input", "quiet", "help", "version", "usage"),
)
"""Options of sbatch that --sbatch may not touch: they have their own option, or the job script, or who submits it,
counts on them. sbatch takes the beginning of a name for the whole."""
UNITS = {"days": 86400, "hours": 3600, "minutes": 60, "seconds": 1}
TIME_FORMS = (
    r"(?P<minutes>\d+)",
    r"(?P<minutes>\d+):(?P<seconds>\d+)",
    r"(?P<hours>\d+):(?P<minutes>\d+):(?P<seconds>\d+)",
    r"(?P<days>\d+)-(?P<hours>\d+)(:(?P<minutes>\d+)(:(?P<seconds>\d+))?)?",
)
EARLY = 60
"""Seconds by which SLURM may send the signal before its time."""


@dataclass(frozen=True)
class Request:
    """What is asked of SLURM. None: the site's default."""

    nodes: int = 1
    gpus_per_node: int | None = None
    processes_per_node: int | None = None
    """On nodes without GPUs; with GPUs there is one process for each."""
    cpus: int | None = None
    """CPU cores per process."""
    partition: str | None = None
    account: str | None = None
    time: str | None = None
    """Time limit as SLURM writes it."""
    qos: str | None = None
    constraint: str | None = None
    job_name: str | None = None
    container_image: str | None = None
    container_mounts: str | None = None
    python: str | None = None
    """Interpreter on the nodes; this one where not given, python3 in a container."""
    save_before: int = 300
    """Seconds before the time limit at which the ranks are told to save."""
    max_restarts: int = 3
    """Starts in a row without a new checkpoint, after the first, before the job gives up."""
    preflight: bool = False
    sbatch: tuple[str, ...] = ()
    """More options of sbatch: KEY=VALUE, or KEY alone."""

    @property
    def tasks_per_node(self) -> int:
        return self.gpus_per_node or self.processes_per_node or 1

    @property
    def world_size(self) -> int:
        return self.nodes * self.tasks_per_node


def have_slurm() -> bool:
    return shutil.which("sbatch") is not None


def check(config: Config, request: Request) -> None:
    """Raise one ConfigError with all that is wrong with the request, and with the grid on so many processes."""
    found = [*_request_problems(request), *grid_problems(config, request.world_size)]
    if found:
        raise ConfigError("\n".join(found))


def grid_problems(config: Config, world_size: int) -> list[str]:
    """What of grid and batch does not fit so many processes; sizes of the model count where its folder is here."""
    model = Path(config.model.path).expanduser()
    if (model / "config.json").is_file():
        shape = read_shape(model)
        found = check_grid(
            config,
            num_attention_heads=shape.num_attention_heads,
            num_query_groups=shape.num_query_groups,
            num_layers=shape.num_layers,
            ffn_hidden_size=shape.ffn_hidden_size,
            world_size=world_size,
            kv_channels=shape.kv_channels,
        )
    else:
        found = check_world(config.parallel, world_size)
    grid = config.parallel
    replicas = world_size // (grid.tensor_model_parallel_size * grid.pipeline_model_parallel_size)
    if not found and config.batch.global_batch_size < replicas:
        found.append(
            f"batch.global_batch_size = {config.batch.global_batch_size}: fewer groups per update than the {replicas} "
            f"data-parallel replicas of {world_size} processes, so some would never train; raise it, or ask for fewer "
            "nodes"
        )
    return found


def limit_seconds(text: str) -> int | None:
    """Seconds of a time limit in SLURM's forms ("90", "90:00", "1:30:00", "2-12", "2-12:30:00"); None: no such form."""
    for form in TIME_FORMS:
        match = re.fullmatch(form, text)
        if match:
            return sum(int(count) * UNITS[unit] for unit, count in match.groupdict(default="0").items())
    return None


def _request_problems(request: Request) -> list[str]:
    counts = {
        "--nodes": request.nodes,
        "--gpus-per-node": request.gpus_per_node,
        "--processes-per-node": request.processes_per_node,
        "--cpus": request.cpus,
        "--save-before": request.save_before,
    }
    found = [f"{name} {count}: must be at least 1" for name, count in counts.items() if count is not None and count < 1]
    if request.max_restarts < 0:
        found.append(f"--max-restarts {request.max_restarts}: must be at least 0")
    if request.gpus_per_node is not None and request.processes_per_node is not None:
        found.append("--gpus-per-node and --processes-per-node: give one of the two; each GPU has its own process")
    if request.container_mounts and not request.container_image:
        found.append("--container-mounts: does nothing without --container-image; name an image or leave it out")
    words = {
        "--partition": request.partition,
        "--account": request.account,
        "--qos": request.qos,
        "--job-name": request.job_name,
    }
    for name, word in words.items():
        if word is not None and not re.fullmatch(r"[\w.,@-]+", word):
            found.append(f"{name} {word!r}: must be letters, digits and . , _ - @")
    return [*found, *_time_problems(request), *_extra_problems(request)]


def _time_problems(request: Request) -> list[str]:
    if request.time is None:
        return []
    seconds = limit_seconds(request.time)
    if seconds is None:
        return [f"--time {request.time!r}: must be minutes, h:mm:ss, or days-hours such as 2-12"]
    if seconds and seconds <= request.save_before + EARLY:  # 0 is SLURM's "no limit"
        return [
            f"--time {request.time}: leaves no time to train, for the ranks are told to save {request.save_before} s "
            f"before it, and SLURM may be {EARLY} s early; ask for more time, or lower --save-before"
        ]
    return []


def _extra_problems(request: Request) -> list[str]:
    found = []
    for option in request.sbatch:
        key, _, value = option.partition("=")
        if not re.fullmatch(r"[a-z][a-z0-9-]*", key) or not value.isprintable():
            found.append(f"--sbatch {option!r}: must be KEY=VALUE with a long option of sbatch, without its dashes")
        elif any(name.startswith(key) for name in OURS):
            found.append(f"--sbatch {option}: {key} is set by megadpo launch; see megadpo launch --help")
    return found


# ---- the job


def job_files() -> Path:
    """The folder with train.sbatch, env.sh and preflight.py: in the installed package, or in a checkout."""
    packaged = Path(__file__).parent / "files"
    return packaged if packaged.is_dir() else Path(__file__).parents[2] / "launch"


def sbatch_command(config: Config, request: Request) -> list[str]:
    """The argument list that submits the job. Raises ConfigError for a path that sbatch cannot take."""
    folder = run_folder(config) / FOLDER
    for path in (folder, Path.cwd()):
        if not str(path).isprintable():
            raise ConfigError(f"{str(path)!r}: SLURM takes no such character in a path; use another folder")
    name = request.job_name or re.sub(r"[^\w.-]", "-", folder.parent.name)
    asked = {
        "job-name": name,
        "nodes": request.nodes,
        "ntasks": request.world_size,
        "ntasks-per-node": request.tasks_per_node,
        "gpus-per-node": request.gpus_per_node,
        "cpus-per-task": request.cpus,
        "partition": request.partition,
        "account": request.account,
        "time": request.time,
        "qos": request.qos,
        "constraint": request.constraint,
        "signal": f"B:USR1@{request.save_before}",
        "output": str(folder.parent / "logs").replace("%", "%%") + "/slurm-%j.log",
        "chdir": str(Path.cwd()),
    }
    options = [f"--{key}={value}" for key, value in asked.items() if value is not None]
    container = {"container-image": request.container_image, "container-mounts": request.container_mounts}
    return [
        "sbatch",
        "--parsable",
        "--requeue",
        "--open-mode=append",
        *options,
        *(f"--{option}" for option in request.sbatch),
        str(folder / "train.sbatch"),
        str(folder),
        request.python or ("python3" if request.container_image else sys.executable),
        str(request.max_restarts),
        str(int(request.preflight)),
        *(f"--{key}={value}" for key, value in container.items() if value is not None),
    ]


def submit(config: Config, request: Request) -> str:
    """Freeze the run file and the job's files in the run folder and submit; returns the job's number.

    Raises MachineError where SLURM refuses, ConfigError where a job trains in this run folder already.
    """
    folder = run_folder(config) / FOLDER
    command = sbatch_command(config, request)
    frozen = to_yaml(config)
    there = job_of(folder.parent)
    state = job_state(there)[0] if there else None
    if there and state:
        raise ConfigError(
            f"run_dir = {config.run_dir}: job {there} ({state}) trains in it already; wait for it, end it with "
            f"scancel --signal=INT {there}, or give another run_dir"
        )
    with storage_errors(folder):
        (folder.parent / "logs").mkdir(parents=True, exist_ok=True)
        folder.mkdir(exist_ok=True)
        for name in ("unproductive", "excluded", "end"):
            (folder / name).unlink(missing_ok=True)  # what an earlier job counted
    write_text(folder / "run.yaml", frozen)
    for name in FILES:
        write_text(folder / name, (job_files() / name).read_text(encoding="utf-8"))
    done = subprocess.run(command, env=clean_environment(os.environ), capture_output=True, text=True, check=False)
    if done.returncode:
        said = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise MachineError(f"SLURM refuses the job ({said}); change what is asked for. It was: {shlex.join(command)}")
    job = done.stdout.strip().split(";")[0]
    if not job.isdecimal():
        raise MachineError(f"sbatch gave no job number but {job[:80]!r}. It was: {shlex.join(command)}")
    write_text(folder / "job", job + "\n")
    return job


def clean_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Without the variables of another job: submitted from inside one, they would change the new job's steps."""
    foreign = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return {
        name: value
        for name, value in environment.items()
        if name == "SLURM_CONF" or not (name.startswith("SLURM_") or name in foreign)
    }


def submitted(config: Config, request: Request, job: str) -> list[str]:
    """What to tell the user of a submitted job."""
    run_dir = run_folder(config)
    return [
        f"submitted job {job}: {request.nodes} nodes x {request.tasks_per_node} processes",
        f"  progress       megadpo status {run_dir}",
        f"  metrics        {run_dir / 'metrics.jsonl'}",
        f"  job's log      {run_dir / 'logs' / f'slurm-{job}.log'}",
        f"  rank logs      {run_dir / 'logs'}/rank-*.log",
        f"  save and end   scancel --signal=INT {job}",
        f"  save, requeue  scancel --batch --signal=USR1 {job}",
        f"  end at once    scancel {job}",
    ]


# ---- asking SLURM


def run_folder(config: Config) -> Path:
    return Path(config.run_dir).expanduser().resolve()


def job_of(run_dir: Path) -> str | None:
    """Number of the job that was last submitted for a run folder."""
    path = run_dir / FOLDER / "job"
    return path.read_text(encoding="utf-8").strip() if path.is_file() else None
