"""How a job begins, ends and comes back, in a real SLURM. A stand-in takes the place of training."""

import os
import time
from pathlib import Path

import pytest
from box import Cluster, Run, stand_in, until, write_run

from megadpo.cli import main
from megadpo.launch.status import read_status

SAVES = """
#TRAIN
[ "$start" = 2 ] && { end 0; exit 0; }
[ "$rank" = 0 ] || { trap 'exit 0' USR1 TERM INT; sleeping; }
trap 'save 2; end 138; exit 0' USR1
trap 'save 2; end 143; exit 0' TERM
trap 'save 2; end 130; exit 0' INT
"""


def launch(tmp_path: Path, body: str, *options: str, nodes: int = 2) -> Run:
    """Submit a job of one stand-in per node."""
    run = write_run(tmp_path / "run")
    program = stand_in(tmp_path / "python", body)
    where = ["--nodes", str(nodes), "--gpus-per-node", "1", "--python", program]
    assert main(["launch", run.file, *where, *options]) == 0
    return run


def running(run: Run, starts: int = 1) -> None:
    """Wait until the stand-ins of a start have their traps."""
    until(f"start {starts}", lambda: run.events().count(("start", None)) >= starts)
    time.sleep(1.5)


def test_a_run_that_ends_well(inside: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = launch(
        tmp_path, '#TRAIN\n[ "$rank" = 0 ] && end 0; env | grep -E "^(MASTER|NCCL|OMP)" ; exit 0', "--cpus", "3"
    )
    told = capsys.readouterr().out
    assert f"submitted job {run.number}: 2 nodes x 1 processes" in told
    assert f"scancel --signal=INT {run.number}" in told
    job = inside.ended(run.number)
    assert (job["JobState"], job["ExitCode"], job["NumNodes"]) == ("COMPLETED", "0:0", "2")
    assert run.events() == [("start", None), ("end", 0)]
    log = run.log()
    for line in ("0: MASTER_ADDR=n1", "1: MASTER_ADDR=n1", "1: NCCL_DEBUG=WARN", "1: OMP_NUM_THREADS=3", "finished"):
        assert line in log
    assert read_status(run.folder).exit_code == 0


def test_a_mistake_is_not_tried_again(inside: Cluster, tmp_path: Path) -> None:
    run = launch(tmp_path, "#TRAIN\nend 2; exit 2")
    job = inside.ended(run.number)
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("FAILED", "2:0", "0")
    assert run.events() == [("start", None), ("end", 2)]
    status = read_status(run.folder)
    assert (status.state, status.exit_code, status.restarts) == ("stopped", 2, 0)


def test_numbers_that_are_not_finite_are_not_tried_again(inside: Cluster, tmp_path: Path) -> None:
    run = launch(tmp_path, "#TRAIN\nend 3; exit 3", "--max-restarts", "2")
    job = inside.ended(run.number)
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("FAILED", "3:0", "0")
    assert run.events() == [("start", None), ("end", 3)]


def test_a_signal_is_not_lost_where_saving_fails(inside: Cluster, tmp_path: Path) -> None:
    """SLURM says it once: after a crash the job must not run into its time limit in the same allocation."""
    body = """
    #TRAIN
    [ "$start" = 2 ] && { [ "$rank" = 0 ] && end 0; exit 0; }
    [ "$rank" = 0 ] && trap 'end 1; exit 1' USR1
    sleeping
    """
    run = launch(tmp_path, body)
    running(run)
    inside.run("scancel", "--batch", "--signal=USR1", run.number)
    job = inside.ended(run.number)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), run.log()
    assert run.events() == [("start", None), ("end", 1), ("start", None), ("end", 0)]


@pytest.mark.slow
def test_a_signal_is_not_lost_in_the_preflight(inside: Cluster, tmp_path: Path) -> None:
    body = """
    preflight() { [ -e "$run/again" ] && exit 0; touch "$run/again"; sleeping; }
    #TRAIN
    [ "$rank" = 0 ] && end 0; exit 0
    """
    run = launch(tmp_path, body, "--preflight")
    until("the preflight runs", lambda: (run.folder / "again").exists())
    time.sleep(1.5)
    inside.run("scancel", "--batch", "--signal=USR1", run.number)
    job = inside.ended(run.number)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), run.log()
    assert run.events() == [("start", None), ("end", 0)]


@pytest.mark.slow
def test_failures_are_tried_again_a_few_times(inside: Cluster, tmp_path: Path) -> None:
    """One rank fails and the other would sleep for minutes: srun ends it. No checkpoint comes, so the job gives up."""
    body = '#TRAIN\n[ "$rank" = 0 ] && sleeping; echo "rank $rank fails"; exit 7'
    run = launch(tmp_path, body, "--max-restarts", "1")
    job = inside.ended(run.number)
    assert (job["JobState"], job["Restarts"]) == ("FAILED", "0")
    assert job["ExitCode"] != "0:0"
    assert [event for event, _ in run.events()] == ["start", "end", "start", "end", "gave up"]
    assert "gave up: 2 starts without a new checkpoint (none)" in run.log()
    assert "1: rank 1 fails" in run.log()
    assert read_status(run.folder).restarts == 1


@pytest.mark.slow
def test_progress_renews_the_patience(inside: Cluster, tmp_path: Path) -> None:
    body = '#TRAIN\n[ "$rank" = 0 ] || exit 0; save "$start"; [ "$start" -ge 3 ] && { end 0; exit 0; }; end 1; exit 1'
    run = launch(tmp_path, body, "--max-restarts", "0")
    assert inside.ended(run.number)["JobState"] == "COMPLETED"
    assert [code for event, code in run.events() if event == "end"] == [1, 1, 0]


@pytest.mark.slow
def test_ranks_that_die_without_a_word_have_not_finished(inside: Cluster, tmp_path: Path) -> None:
    """srun gives 0, and nobody wrote that the run is finished."""
    run = launch(tmp_path, "#TRAIN\nexit 0", "--max-restarts", "0")
    job = inside.ended(run.number)
    assert (job["JobState"], job["ExitCode"]) == ("FAILED", "1:0")


def test_told_ahead_of_the_time_limit_it_saves_and_goes_on(inside: Cluster, tmp_path: Path) -> None:
    """SIGUSR1 to the batch script, as --signal sends it. Two launches into one run folder are refused meanwhile."""
    run = launch(tmp_path, SAVES + "sleeping")
    running(run)
    assert main(["launch", run.file]) == 2
    inside.run("scancel", "--batch", "--signal=USR1", run.number)
    job = inside.ended(run.number)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1")
    assert run.events() == [("start", None), ("end", 138), ("start", None), ("end", 0)]
    assert "start from checkpoint step-00000002" in run.log()


@pytest.mark.slow
def test_a_users_stop_saves_and_ends(inside: Cluster, tmp_path: Path) -> None:
    run = launch(tmp_path, SAVES + "sleeping")
    running(run)
    inside.run("scancel", "--signal=INT", run.number)
    job = inside.ended(run.number)
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("FAILED", "130:0", "0")
    assert (run.folder / "checkpoints" / "step-00000002").is_dir()


def test_a_cancelled_job_saves_and_does_not_come_back(inside: Cluster, tmp_path: Path) -> None:
    run = launch(tmp_path, SAVES + "sleeping")
    running(run)
    inside.run("scancel", run.number)
    job = inside.ended(run.number)
    assert (job["JobState"], job["Restarts"]) == ("CANCELLED", "0")
    assert (run.folder / "checkpoints" / "step-00000002").is_dir()
    time.sleep(2)
    assert inside.state(run.number) == "CANCELLED"


def test_preempted_it_saves_and_comes_back(inside: Cluster, tmp_path: Path) -> None:
    run = launch(tmp_path, SAVES + "sleeping", nodes=3)
    running(run)
    inside.run("sbatch", "--partition=urgent", "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap=sleep 2")
    job = inside.ended(run.number)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1")
    assert run.events() == [("start", None), ("end", 143), ("start", None), ("end", 0)]


def test_a_node_dies_and_the_job_goes_on_elsewhere(inside: Cluster, tmp_path: Path) -> None:
    run = launch(tmp_path, "#TRAIN\n[ $start = 2 ] && { end 0; exit 0; }\nsave 1; sleeping")
    running(run)
    try:
        inside.act("kill", "2")
        job = inside.ended(run.number)
        assert (job["JobState"], job["Restarts"], job["NodeList"]) == ("COMPLETED", "1", "n[1,3]")
        assert run.events()[-2:] == [("start", None), ("end", 0)]
        assert "start from checkpoint step-00000001" in run.log()
        assert read_status(run.folder).restarts == 1
    finally:
        inside.act("start", "2")
    until("n2 is back", lambda: "3" in inside.run("sinfo", "-h", "-p", "main", "-t", "idle", "-o", "%D"))


@pytest.mark.slow
def test_a_node_that_is_not_fit_is_left_out(inside: Cluster, tmp_path: Path) -> None:
    body = """
    preflight() { [ "$SLURM_STEP_NODELIST" = "n[1-2]" ] || exit 0; echo n1 >"$run/slurm/bad-nodes"; exit 1; }
    #TRAIN
    end 0; exit 0
    """
    run = launch(tmp_path, body, "--preflight")
    job = inside.ended(run.number)
    assert (job["JobState"], job["NodeList"], job["ExcNodeList"]) == ("COMPLETED", "n[2-3]", "n1")
    assert "preflight: n1 not fit" in run.log()


@pytest.mark.slow
def test_the_real_time_limit(inside: Cluster, tmp_path: Path) -> None:
    """SLURM sends the signal up to a minute early, and checks now and then only; so after one to two minutes of three,
    when the ranks are there. (One that comes before they are: tests/launch/test_batch_script.py.)"""
    run = launch(tmp_path, SAVES + "sleeping", "--time", "3", "--save-before", "59")
    job = inside.ended(run.number)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1")
    assert run.events() == [("start", None), ("end", 138), ("start", None), ("end", 0)]


@pytest.mark.slow
def test_signals_reach_the_ranks_where_slurm_tracks_by_cgroup(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inside: Cluster
) -> None:
    """As on most clusters: there a signal goes to the tasks themselves, not to their children."""
    monkeypatch.setenv("PATH", os.environ["PATH"].replace(str(inside.folder), str(tmp_path / "cluster")))
    box = Cluster.start(tmp_path / "cluster", 2, PROCTRACK="cgroup")
    try:
        run = launch(tmp_path, SAVES + "sleeping")
        running(run)
        box.run("scancel", "--batch", "--signal=USR1", run.number)
        assert box.ended(run.number)["Restarts"] == "1"
        assert run.events() == [("start", None), ("end", 138), ("start", None), ("end", 0)]
    finally:
        box.stop()
        for folder in Path("/sys/fs/cgroup/freezer").glob("slurm_n*"):
            for inner in sorted(folder.rglob("*/"), reverse=True):
                inner.rmdir()
            folder.rmdir()
