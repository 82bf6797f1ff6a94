"""linear_logprob split over tensor-parallel ranks, with the whole stream or its rows on each: the same numbers."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import GRADIENT, LOGPROB, Inputs, inputs, relative, truth
from distributed import run_ranks
from megadpo_kernels import Backend, LogitOptions, VocabShard, gemm, linear_logprob, linear_logprob_entropy

OPTIONS = LogitOptions(multiplier=0.9, soft_cap=8.0)
BACKENDS: list[Backend] = ["reference", "chunked", "triton"]
SCORED, STREAM = 21, 24


@dataclass(frozen=True)
class Split:
    """A vocabulary of `valid` tokens in `rows` rows, split over the ranks."""

    valid: int
    rows: int
    dtype: torch.dtype = torch.float32


def given(case: Split) -> tuple[Inputs, torch.Tensor]:
    """The stream, and which of its rows are scored, one of them twice. Targets include the first and the last token of
    every rank's part, and the last of all."""
    whole = inputs(STREAM, 16, case.valid, scale=2).to(torch.device("cpu"), case.dtype)
    generator = torch.Generator().manual_seed(1)
    rows = torch.randperm(STREAM, generator=generator)[:SCORED].sort().values
    rows[4] = rows[3]
    edges = torch.arange(0, case.valid, max(case.rows // 4, 1))
    targets = whole.targets_N.clone()
    ends = torch.cat([edges, edges - 1, torch.tensor([case.valid - 1])]).clamp(min=0)
    assert len(ends) <= SCORED
    targets[: len(ends)] = ends
    return Inputs(whole.hidden_ND, whole.weight_VD, targets[:SCORED], whole.upstream_N[:SCORED]), rows


@contextmanager
def counted() -> Iterator[dict[str, list]]:
    """Shapes of what each collective moves."""
    seen: dict[str, list] = {}
    originals = {}
    for name in ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor", "broadcast", "all_gather"):
        originals[name] = getattr(dist, name)

        def call(*args: Any, _name: str = name, **kwargs: Any) -> Any:
            seen.setdefault(_name, []).append(list(args[0].shape))
            return originals[_name](*args, **kwargs)

        setattr(dist, name, call)
    try:
        yield seen
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def split(device: torch.device, cases: list[Split]) -> list[dict[str, Any]]:
    """Every case x sequence parallelism x back end, in the same ranks."""
    group = dist.group.WORLD
    results = []
    for case in cases:
        whole, scored = given(case)
        padding = torch.full((case.rows - case.valid, 16), 5.0, dtype=case.dtype)
        weight = torch.cat([whole.weight_VD, padding]).chunk(group.size())[group.rank()]
        for sequence in (False, True):
            hidden = whole.hidden_ND.chunk(group.size())[group.rank()] if sequence else whole.hidden_ND
            shard = VocabShard(group.rank() * len(weight), case.valid, group, sequence)
            for backend in BACKENDS:
                x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
                with counted() as forward:
                    logprob, entropy = linear_logprob_entropy(
                        x, w, whole.targets_N, shard, rows_N=scored, options=OPTIONS, backend=backend, chunk=8
                    )
                with counted() as backward:
                    (logprob + 2 * entropy).backward(whole.upstream_N)
                if sequence and backend != "reference" and case == CASES[1]:
                    again_x, again_w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
                    again, spread = linear_logprob_entropy(
                        again_x, again_w, whole.targets_N, shard, rows_N=scored, options=OPTIONS, backend=backend,
                        chunk=8, cache_bytes=0,
                    )  # fmt: skip
                    (again + 2 * spread).backward(whole.upstream_N)
                    assert torch.equal(again, logprob), "a second run, with logits computed again, has other bits"
                    assert torch.equal(again_x.grad, x.grad)
                    assert torch.equal(again_w.grad, w.grad)
                results.append(
                    {
                        "what": (case, sequence, backend),
                        "logprob": logprob.detach(),
                        "entropy": entropy.detach(),
                        "hidden": x.grad,
                        "weight": w.grad,
                        "forward": forward,
                        "backward": backward,
                    }
                )
    return results


CASES = [
    Split(64, 64),
    Split(101, 104),  # padded
    Split(30, 120),  # all real tokens are on the first rank (of 2), or the first of 4: others have not one column
    Split(101, 104, torch.bfloat16),
]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_split_gives_the_same(world: int) -> None:
    everyone = run_ranks(world, split, CASES)
    for parts in zip(*everyone, strict=True):
        case, sequence, backend = parts[0]["what"]
        name = f"{case}, sequence parallel {sequence}, {backend}, {world} ranks"
        for part in parts[1:]:
            assert torch.equal(parts[0]["logprob"], part["logprob"]), f"ranks disagree: {name}"
            assert torch.equal(parts[0]["entropy"], part["entropy"]), f"ranks disagree: {name}"
            if not sequence:
                assert torch.equal(parts[0]["hidden"], part["hidden"]), f"ranks disagree: {name}"
        whole, scored = given(case)
        picked = Inputs(whole.hidden_ND[scored], whole.weight_VD, whole.targets_N, whole.upstream_N)
        want = truth(picked, OPTIONS, entropy=True)
        want_hidden = torch.zeros(STREAM, 16, dtype=torch.float64).index_add(0, scored, want.hidden)
        tolerance = GRADIENT[case.dtype]
        hidden = torch.cat([part["hidden"] for part in parts]) if sequence else parts[0]["hidden"]
        weight = torch.cat([part["weight"] for part in parts])
        assert float((parts[0]["logprob"] - want.logprob_N).abs().max()) <= LOGPROB, name
        assert float((parts[0]["entropy"] - want.entropy_N).abs().max()) <= LOGPROB, name
        assert relative(hidden, want_hidden) <= tolerance, name
        assert relative(weight[: case.valid], want.weight) <= tolerance, name
        assert weight[case.valid :].eq(0).all(), name
        if backend != "reference" and world > 1:
            stream = [[STREAM, 16]] if sequence else []
            assert parts[0]["forward"] == {"all_gather_into_tensor": [*stream, [world * 4, SCORED]]}, name
            over = {"reduce_scatter_tensor": [[STREAM // world, 16]]} if sequence else {"all_reduce": [[STREAM, 16]]}
            assert parts[0]["backward"] == over, name


@dataclass(frozen=True)
class Narrow:
    """bfloat16 operands whose gradient a few numbers carry: few rows, or targets that are nearly sure."""

    rows: int
    vocab: int
    scale: float
    seed: int
    sure: float

    @property
    def given(self) -> Inputs:
        wide = inputs(self.rows, 64, self.vocab, scale=self.scale, seed=self.seed)
        hidden = wide.hidden_ND + self.sure / 64 * wide.weight_VD[wide.targets_N]
        return replace(wide, hidden_ND=hidden).to(torch.device("cpu"), torch.bfloat16)


NARROW = [
    Narrow(rows, vocab, scale, seed, sure)
    for rows in (1, 64, 65)
    for vocab in (120, 1440)
    for scale in (1.0, 4.0)
    for seed in (0, 1)
    for sure in (0.0, 4.0, 8.0)
]


def narrow(device: torch.device) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Hidden's gradient, and that of this rank's part of the weight."""
    group, found = dist.group.WORLD, []
    for case in NARROW:
        whole = case.given
        weight = whole.weight_VD.chunk(group.size())[group.rank()]
        shard = VocabShard(group.rank() * len(weight), case.vocab, group)
        x, w = whole.hidden_ND.requires_grad_(), weight.clone().requires_grad_()
        linear_logprob(x, w, whole.targets_N, shard).backward(whole.upstream_N)
        found.append((x.grad, w.grad))
    return found


@pytest.mark.parametrize("world", [1, 3, 4])
def test_few_numbers_carry_a_bfloat16_gradient(world: int) -> None:
    """No rounding that others average out: hidden's gradient is rounded once, after the sum over the ranks, and so is
    the weight's. Then no number is off by more than 2^-8 of itself, on any number of ranks."""
    everyone = run_ranks(world, narrow)
    for case, *parts in zip(NARROW, *everyone, strict=True):
        want = truth(case.given)
        for got, true in ((parts[0][0], want.hidden), (torch.cat([weight for _, weight in parts]), want.weight)):
            limit = GRADIENT[torch.bfloat16] if case.rows > gemm.FEW else 2**-8
            assert relative(got, true) <= limit, f"{case}, {world} ranks"
