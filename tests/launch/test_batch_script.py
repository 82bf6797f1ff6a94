"""launch/train.sbatch with stand-ins for SLURM's commands: what a real cluster shows only now and then."""

import os
import subprocess
from pathlib import Path

from megadpo.launch.slurm import job_files

STANDINS = {
    # the signal falls between the script's last look for one and the start of the ranks
    "rm": 'case "$*" in *"/end") kill -USR1 "$(cat pid)"; sleep 0.3 ;; esac; exec /bin/rm "$@"',
    "srun": "echo srun >>called",
    "scontrol": 'echo "scontrol $1" >>called; [ "$1" = requeue ] || echo n1',
    "squeue": "echo RUNNING",
    "getent": "exit 0",
}


def test_a_signal_just_before_the_ranks_start_is_not_lost(tmp_path: Path) -> None:
    """SLURM says it once: ranks that start and never hear of it would run into the time limit."""
    tools, folder = tmp_path / "bin", tmp_path / "run" / "slurm"
    tools.mkdir()
    folder.mkdir(parents=True)
    for name, body in STANDINS.items():
        (tools / name).write_text(f"#!/bin/bash\n{body}\n")
        (tools / name).chmod(0o755)
    (folder / "env.sh").write_text("")
    command = 'echo $$ >pid; exec bash "$@"'
    script = [str(job_files() / "train.sbatch"), str(folder), "python3", "3", "0"]
    environment = os.environ | {
        "PATH": f"{tools}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "17",
        "SLURM_JOB_NODELIST": "n1",
        "SLURM_NTASKS": "2",
    }
    done = subprocess.run(
        ["bash", "-c", command, "_", *script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
    )
    called = (tmp_path / "called").read_text().splitlines()
    assert "scontrol requeue" in called, done.stdout + done.stderr
    assert "srun" not in called
    assert done.returncode == 138
