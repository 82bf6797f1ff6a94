"""The test cluster, once for all tests here; CI fails without it, other machines skip."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from box import ROOT, Cluster, missing


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    reason = missing()
    if reason and os.environ.get("CI"):
        pytest.fail(reason)
    if reason:
        pytest.skip(reason)
    box = Cluster.start(tmp_path_factory.mktemp("slurm") / "cluster", nodes=3, DOWN_AFTER="5")
    try:
        yield box
    finally:
        box.stop()


@pytest.fixture
def inside(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """SLURM's commands are found, and megadpo is this checkout on every node."""
    for name in [*os.environ]:
        if name.startswith(("SLURM_", "SBATCH_")) or name in ("RANK", "WORLD_SIZE", "OMP_NUM_THREADS"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PATH", f"{cluster.folder / 'tools'}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'kernels'}")
    monkeypatch.chdir(tmp_path)
    return cluster
