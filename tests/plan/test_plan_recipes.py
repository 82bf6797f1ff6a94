"""Grids and figures in launch/recipes: what the planner says today."""

import re
import shlex
from pathlib import Path

import pytest

from megadpo import cli
from megadpo.config.decode import load_config
from megadpo.observe.gpus import GIB
from megadpo.plan import command
from megadpo.plan.grids import Candidate
from megadpo.plan.profile import rank_numbers
from megadpo.plan.search import Plan

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ("llama3-8b-dpo", "llama3-70b-dpo", "llama3-405b-dpo")
FIGURES = re.compile(
    r"([\d.]+) s per update, (\d+) pairs/s, (\d+) % MFU, ([\d.]+) GiB on the fullest rank, ([\d.]+) hour"
)


def said(name: str) -> tuple[list[str], tuple[float, ...]]:
    """The command in a recipe's comment, and the figures under it."""
    comment = [line for line in (ROOT / f"launch/recipes/{name}.yaml").read_text().splitlines() if line.startswith("#")]
    start = next(number for number, line in enumerate(comment) if line.startswith("#   megadpo plan"))
    line = " ".join(part.lstrip("# ").rstrip("\\") for part in comment[start : start + 2])
    found = FIGURES.search("\n".join(comment))
    assert found is not None
    return shlex.split(line)[1:], tuple(float(figure) for figure in found.groups())


def look(name: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Candidate, command.Search]:
    """The recipe's own grid, and the search that its command makes."""
    monkeypatch.chdir(ROOT)
    arguments, _ = said(name)
    options, overrides = cli._parser().parse_known_args(arguments)
    config = load_config(options.run_file, overrides)
    search, _ = command.search_of(
        config, command.Request(options.gpus, options.gpu, groups=options.groups), rank_numbers
    )
    recipe = load_config(options.run_file, [])
    grid = recipe.parallel
    tensor, pipeline = grid.tensor_model_parallel_size, grid.pipeline_model_parallel_size
    tokens = recipe.batch.micro_batch_tokens
    assert tokens is not None
    one = Candidate(
        tensor, pipeline, grid.virtual_pipeline_model_parallel_size, options.gpus // tensor // pipeline, 1,
        grid.sequence_parallel, tokens, recipe.model.recompute, recipe.reference.mode,
    )  # fmt: skip
    return one, search


def figures(plan: Plan) -> tuple[float, ...]:
    how = plan.estimate
    return (
        round(how.step, 2),
        round(how.pairs_per_second),
        round(100 * how.mfu),
        round(plan.memory.total / GIB, 1),
        round(plan.hours, 1),
    )


@pytest.mark.parametrize(
    "name", [name if "70b" in name else pytest.param(name, marks=pytest.mark.slow) for name in RECIPES]
)
def test_the_figures_are_the_planners(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    one, search = look(name, monkeypatch)
    plan = search.look_at(one)
    assert isinstance(plan, Plan)
    [plan], _ = search._confirmed([plan], 1)
    assert figures(plan) == said(name)[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_the_grid_is_the_planners_first(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    one, search = look(name, monkeypatch)
    best = search.run().best[0]
    assert best.candidate.ways == one.ways
    assert figures(best)[0] == said(name)[1][0]
