"""A slice of `make soak`: kill -9 while saving, and while training."""

from pathlib import Path

from distributed import run_ranks
from trials import SCENES, kill_and_resume, kill_at_every_call, kill_at_random


def test_killed_before_calls_of_a_save(tmp_path: Path) -> None:
    """Every ninth call; `make soak` takes every one."""
    [result] = run_ranks(1, kill_at_every_call, tmp_path, ["1"], SCENES[:1], 60.0, 9)
    assert result.kills >= 10
    assert not result.lost
    assert not result.damaged
    assert not result.unfinished
    assert any("removed.partial" in found for found in result.found), "retention was struck too"
    assert any("latest partial" in found for found in result.found), "and the writing of a checkpoint"


def test_killed_at_random_instants_of_saves(tmp_path: Path) -> None:
    [result] = run_ranks(1, kill_at_random, tmp_path, ["1", "data"], 12, 15.0, 0)
    assert result.kills >= 3
    assert result.how.total() == result.kills
    assert not result.lost
    assert not result.damaged


def test_killed_and_resumed_it_is_the_same_to_the_bit(tmp_path: Path) -> None:
    result = kill_and_resume(tmp_path, runs=3, seconds=8, seed=0)
    assert result.runs >= 1
    assert not result.different
