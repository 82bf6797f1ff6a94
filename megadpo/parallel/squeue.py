"""What SLURM's queue says of a job."""

from __future__ import annotations

import shutil
import subprocess

ANSWER = 30
"""Seconds that SLURM gets for an answer."""


def job_state(job: str) -> tuple[str | None, str | None]:
    """(state, reason or nodes) of a job that waits or runs; (None, None) where it is gone or SLURM is not here."""
    if shutil.which("squeue") is None:
        return None, None
    command = ["squeue", "--noheader", f"--jobs={job}", "--format=%T|%R"]  # gives no job that has ended
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=ANSWER)
    except subprocess.TimeoutExpired:
        return "UNKNOWN", f"squeue gave no answer in {ANSWER} s"
    if done.returncode and "Invalid job id" not in done.stderr:  # which it says of a job that is long gone
        return "UNKNOWN", " ".join(done.stderr.split())
    state, bar, where = done.stdout.strip().partition("|")
    return (state, where.strip("()")) if bar else (None, None)
