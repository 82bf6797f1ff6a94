"""A slice of `make soak`: kill -9 while saving, and while training."""

from pathlib import Path

from trials import kill_and_resume, kill_at_every_call, kill_during_save, kill_small_saves

FILES = {"__0_0.distcp": b"weights" * 500, "common.pt": b"common", ".metadata": b"where", "metadata.json": b"{}"}


def test_killed_at_every_call_of_a_save(tmp_path: Path) -> None:
    result = kill_at_every_call(tmp_path, FILES, ["two whole"])
    assert result.kills > 20
    assert not result.lost
    assert not result.damaged
    assert any("removed.partial" in found for found in result.found), "retention was struck too"


def test_killed_at_random_instants_of_small_saves(tmp_path: Path) -> None:
    result = kill_small_saves(tmp_path, FILES, most=50, seconds=5, seed=0)
    assert result.kills >= 3
    assert not result.lost
    assert not result.damaged


def test_killed_at_random_instants_of_real_saves(tmp_path: Path) -> None:
    result = kill_during_save(tmp_path, kills=5, seconds=8, seed=0)
    assert result.kills >= 1
    assert not result.lost
    assert not result.damaged


def test_killed_and_resumed_it_is_the_same_to_the_bit(tmp_path: Path) -> None:
    result = kill_and_resume(tmp_path, runs=2, seconds=8, seed=0)
    assert result.runs >= 1
    assert not result.different
