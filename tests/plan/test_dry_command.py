"""`megadpo plan --dry-run` from a folder that has a config.json and nothing else."""

import json
from pathlib import Path

import pytest
import yaml
from tiny import write_llama

from megadpo.cli import main

GRID = ("parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2")


@pytest.fixture
def run_file(tmp_path: Path) -> str:
    folder = write_llama(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    settings = {"run_dir": str(tmp_path / "run"), "model": {"path": str(folder)}, "data": {"train": "nobody/has-this"}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings | {"data": settings["data"] | {"max_length": 64}}))
    return str(tmp_path / "run.yaml")


def test_a_rank_is_described(run_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", run_file, "--dry-run", "--gpus", "16", "--rank", "15", "--json", *GRID]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["world_size"], found["rank"], found["stage"]) == (16, 15, 1)
    assert found["memory"]["total"] == sum(size for part, size in found["memory"].items() if part != "total")
    assert {(one["group"], one["ranks"]) for one in found["collectives"]} >= {
        ("tensor", 2),
        ("pipeline", 2),
        ("data", 4),
    }
    assert "data.train is not here" in found["assumptions"][0]
    assert main(["plan", run_file, "--dry-run", "--gpus", "16", *GRID, "model.cuda_graphs=[mlp]"]) == 0
    text = capsys.readouterr().out
    assert "rank 0 of 16: pipeline stage 0 of 2, tensor rank 0 of 2, data rank 0 of 4" in text
    assert "reduce_scatter   data" in text
    assert "what CUDA graphs hold is added" in text
    assert (
        main(
            ["plan", run_file, "--dry-run", "--gpus", "16", "--rank", "15", "--json", *GRID, "model.cuda_graphs=[mlp]"]
        )
        == 0
    )
    graphed = json.loads(capsys.readouterr().out)["memory"]
    more = graphed.pop("activations") - found["memory"].pop("activations")
    assert more > 0
    assert graphed.pop("total") == found["memory"].pop("total") + more
    assert graphed == found["memory"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--dry-run", "--gpus", "8", "--rank", "8"], "--rank 8: 8 GPUs have the ranks 0 to 7"),
        (["--dry-run", "--gpus", "6", *GRID], "6"),
        (["--gpus", "8"], "--gpu is not given"),
        (["--dry-run", "--gpus", "-8"], "--gpus -8: must be at least 1"),
        (["--dry-run", "--gpus", "8", "--svg", "x.svg"], "--svg: only goes without --dry-run"),
        (["--dry-run", "--gpus", "8", "--price", "2"], "--price: only goes without --dry-run"),
        (["--dry-run", "--gpus", "8", "--top", "15"], "--top: only goes without --dry-run"),
        (["--dry-run", "--gpus", "8", "--gpu", "h200"], "--gpu: only goes without --dry-run"),
        (["--dry-run", "--gpus", "8", "--all"], "--all: only goes without --dry-run"),
        (["--gpus", "8", "--gpu", "h200", "--rank", "0"], "--rank: only goes with --dry-run"),
    ],
)
def test_mistakes_are_one_line(run_file: str, given: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", run_file, *given]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
