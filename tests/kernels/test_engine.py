"""The head inside Megatron-Core: every back end gives the training the same numbers, and the weight gradient reaches
the gradient buffer whole, once, on every kind of stage."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import run_ranks
from megadpo_kernels import main_grad
from model.test_attention import gathered
from tiny import random_groups, write_llama
from train.engine import Case, assemble, run, worst

from megadpo.data.packing import Budget
from megadpo.errors import MachineError
from megadpo.model import attention, build

VOCAB = 67
NOISE = 1e-5


@pytest.fixture(scope="module", params=["untied", "tied"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = write_llama(tmp_path_factory.mktemp("llama"), layers=2, vocab=VOCAB, tied=request.param == "tied")
    return Case(folder, random_groups(11, vocab=VOCAB), budget=Budget(64), batch=6)


def run_not_fused(device: torch.device, cases: list[Case]) -> list[dict[str, Any]]:
    """The weight gradient goes through autograd, as if the head did not know of `main_grad`."""

    def of(weight: torch.Tensor) -> main_grad.WeightGradient:
        return main_grad.WeightGradient(weight, torch.zeros_like(weight, dtype=torch.float32), False)

    main_grad.WeightGradient.of = staticmethod(of)  # this rank's process ends with the test
    return run(device, cases)


def run_fused(device: torch.device, cases: list[Case]) -> list[dict[str, Any]]:
    """Fails unless every head of this rank that was trained was trained the fused way."""
    original, fused = main_grad.WeightGradient.of, []

    def of(weight: torch.Tensor) -> main_grad.WeightGradient:
        found = original(weight)
        fused.append(found.fused)
        return found

    main_grad.WeightGradient.of = staticmethod(of)
    results = run(device, cases)
    assert all(fused)
    return [{**result, "heads": len(fused)} for result in results]


def layouts(base: Case, world: int) -> list[Case]:
    if world == 1:
        return [base, replace(base, resident=True)]
    return [
        replace(base, tensor=2),
        replace(base, tensor=2, sequence=True),
        replace(base, pipeline=2),
        replace(base, overlap=True),
        replace(base, distributed=True, overlap=True, bucket_size=500),
    ]


def compare(got: list[dict[str, Any]], want: list[dict[str, Any]], *names: str) -> None:
    for a, b in zip(got[0]["sums"], want[0]["sums"], strict=True):
        assert a.loss == pytest.approx(b.loss, rel=NOISE)
    for what in names:
        difference, name = worst(assemble(got, what, VOCAB), assemble(want, what, VOCAB))
        assert difference < NOISE, f"{what}: {name} differs by {difference:.1e}"


@pytest.mark.parametrize("world", [1, 2])
def test_fused_weight_gradient(base: Case, world: int) -> None:
    """Against the gradient that autograd delivers to Megatron's own hook: tied and not, on all kinds of grids."""
    cases = layouts(base, world)
    fused, plain = run_ranks(world, run_fused, cases), run_ranks(world, run_not_fused, cases)
    assert any(rank[0]["heads"] for rank in fused), "nothing was measured"
    for index, case in enumerate(cases):
        got, want = ([rank[index] for rank in results] for results in (fused, plain))
        compare(got, want, "weights", *([] if case.distributed else ["gradients"]))


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_every_back_end_trains_alike(base: Case, backend: Any) -> None:
    """The first update by `chunked` (which test_grid.py holds to account) and by the others: loss, every gradient and
    every updated weight."""
    cases = [replace(base, tensor=2, steps=1), replace(base, tensor=2, sequence=True, steps=1)]
    want = run_ranks(2, run, [replace(case, logprob_backend="chunked") for case in cases])
    got = run_ranks(2, run, [replace(case, logprob_backend=backend) for case in cases])
    for index, case in enumerate(cases):
        ours, theirs = [rank[index] for rank in got], [rank[index] for rank in want]
        compare(ours, theirs, "gradients")
        same_update(case, ours, theirs)


def same_update(case: Case, got: list[dict[str, Any]], want: list[dict[str, Any]]) -> None:
    """Weights agree to float32 rounding once each side's Adam step, from its own gradient, is taken off.

    Without that they may be 2e-5 apart: Adam's first step is the rate times g / (|g| + 1e-8), and one element of the
    tied model here has g = 1e-9 where the tensor's root mean square is 3e-2. A difference of 9e-9 between two back ends
    (within the rounding of the sum that g is) moves such a weight by a tenth of the rate. So the difference of the
    steps is computed from the gradients, which `compare` holds to account, and nothing else may differ.
    """

    def steps(results: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        scale = min(1.0, 1.0 / (results[0]["grad_norms"][0] + 1e-6))  # clipped at 1
        clipped = {key: gradient * scale for key, gradient in assemble(results, "gradients", VOCAB).items()}
        return {key: -case.learning_rate * g / (g.abs() + 1e-8) for key, g in clipped.items()}

    def before(results: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        taken = steps(results)
        return {key: weight - taken[key] for key, weight in assemble(results, "weights", VOCAB).items()}

    difference, name = worst(before(got), before(want))
    assert difference < 2e-7, f"weights less Adam's step: {name} differs by {difference:.1e}"


def run_varlen(device: torch.device, cases: list[Case]) -> list[dict[str, Any]]:
    """Attention as on a GPU: keys and values gathered once for the stream, then one call. The call itself is written
    out in torch; the gather and its backward pass are the ones that the GPU runs."""

    def one_call(_: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: attention.Varlen) -> torch.Tensor:
        return gathered(q, k, v, layout)

    build.choose_backend = lambda *_: ("varlen", "test")  # this rank's process ends with the test
    attention.SegmentAttention._varlen = one_call
    return run(device, cases)


def test_gathered_prompts_train_alike(base: Case) -> None:
    """Against attention that reads the prompt where it stands: the copies' gradients all reach it. (test_attention.py
    has the same with torch's gather.)"""
    case = replace(base, steps=1, logprob_backend="triton")
    [[want]], [[got]] = run_ranks(1, run, [replace(case, logprob_backend="chunked")]), run_ranks(1, run_varlen, [case])
    compare([got], [want], "gradients")


def refused(device: torch.device, case: Case) -> str:
    import os

    os.environ.pop("TRITON_INTERPRET", None)
    with pytest.raises(MachineError) as caught:
        run(device, [case])
    return str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton runs on this GPU")
def test_a_back_end_that_cannot_run_is_refused(tmp_path: Path) -> None:
    case = Case(write_llama(tmp_path / "llama", vocab=VOCAB), random_groups(3), logprob_backend="triton")
    [message] = run_ranks(1, refused, case)
    assert message.startswith("model.logprob_backend = triton on cpu: ")
    assert "\n" not in message
