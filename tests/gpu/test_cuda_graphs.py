"""Real CUDA graphs: a step with them equals the same step without. What they do to memory and to Python's part of a
step is in tests/train/test_graphs.py, on any machine."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families_table import COMMON, write
from models import VOCAB, small
from needs import gpus, wheel
from processes import on_gpus
from tiny import random_groups
from train.engine import Case, assemble, build, run, worst

from megadpo.data.packing import Budget
from megadpo.model.fp8 import recipe_problem
from megadpo.parallel.context import grid

LAYERS = ["without Transformer Engine", "with it"]


def counted(device: torch.device, cases: list[Case]) -> dict[str, Any]:
    """The results, and how many graphs ran."""
    replay, ran = torch.cuda.CUDAGraph.replay, [0]

    def count(graph: Any) -> None:
        ran[0] += 1
        replay(graph)

    torch.cuda.CUDAGraph.replay = count
    return {"results": run(device, cases), "ran": ran[0]}


def compare(case: Case, scopes: tuple[str, ...], without_te: bool, vocab: int = VOCAB, world: int = 1) -> None:
    """Three times without graphs, once with them: to the last bit, but for kernels that add up in an order of chance
    (the attention's backward pass, the embedding's). How far these go shows in the three; with graphs it may be twice
    as far."""
    ranks = on_gpus(world, counted, [case, case, case, replace(case, graphs=scopes)], without_te=without_te)
    plain, graphed = (
        [[rank["results"][i] for rank in ranks] for i in range(3)],
        [rank["results"][3] for rank in ranks],
    )
    assert ranks[0]["ran"] > 0
    assert ranks[0]["ran"] % (2 * sum(graphed[0]["micro_batches"])) == 0, "forward and backward"
    for what in ("weights",) if case.distributed else ("gradients", "weights"):
        want, *again = (assemble(results, what, vocab) for results in plain)
        noise = max(worst(other, want)[0] for other in again)
        off, name = worst(assemble(graphed, what, vocab), want)
        assert off <= 2 * noise, f"{what}: {name} differs by {off:.1e}, without graphs by {noise:.1e}"
    assert graphed[0]["sums"][0] == plain[0][0]["sums"][0], "the first forward pass adds nothing up by chance"


@pytest.mark.parametrize("layers", LAYERS)
def test_steps(layers: str, tmp_path: Path) -> None:
    if layers == "with it":
        wheel("transformer_engine")
    compare(small(tmp_path, distributed=False), ("mlp",), without_te=layers != "with it")


@pytest.mark.parametrize("layers", LAYERS)
def test_steps_with_experts(layers: str, tmp_path: Path) -> None:
    if layers == "with it":
        wheel("transformer_engine")
    vocab = int(COMMON["vocab_size"])
    store = random_groups(16, vocab=vocab, longest_prompt=60, longest_response=40)
    case = Case(write("deepseek_v3", tmp_path / "deepseek_v3"), store, dtype="bfloat16", budget=Budget(512))
    compare(case, ("mlp", "moe_router"), layers != "with it", vocab)


@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise", "mxfp8"])
def test_steps_in_fp8(recipe: str, tmp_path: Path) -> None:
    """Weights are cast inside the graph. (With delayed scaling they would be cast with other scales: refused.)"""
    wheel("transformer_engine")
    if problem := recipe_problem(recipe, torch.cuda.get_device_capability(), torch.version.cuda or "0"):
        pytest.skip(problem)
    options = {"fp8_format": "hybrid", "fp8_recipe": recipe}
    case = small(tmp_path, distributed=False, resident=True, evaluated=True, model_options=options)
    compare(case, ("mlp",), without_te=False)


@pytest.mark.parametrize("layout", [{"tensor": 2, "sequence": True}, {"pipeline": 2}, {"overlap": True}], ids=str)
@pytest.mark.parametrize("layers", LAYERS)
def test_steps_on_two_gpus(layers: str, layout: dict[str, Any], tmp_path: Path) -> None:
    gpus(2)
    if layers == "with it":
        wheel("transformer_engine")
    compare(small(tmp_path, bucket_size=50_000, **layout), ("mlp",), layers != "with it", world=2)


def memory(device: torch.device, case: Case) -> list[int]:
    """Bytes that torch holds: before the model, after it, after a second one with graphs."""
    found = [torch.cuda.memory_reserved(device)]
    kept = []
    for one in (case, replace(case, graphs=("mlp",))):
        with grid(one.parallel, device, 1) as context:
            kept.append(build(one, context))
            torch.cuda.empty_cache()
            found.append(torch.cuda.memory_reserved(device))
    return found


def test_graphs_keep_memory(tmp_path: Path) -> None:
    """At least what a layer leaves between its passes: the input, the output and the MLP's two halves of 512 rows."""
    [[start, plain, graphed]] = on_gpus(1, memory, small(tmp_path))
    assert graphed - plain - (plain - start) >= 4 * 512 * (2 * 256 + 2 * 512) * 2
