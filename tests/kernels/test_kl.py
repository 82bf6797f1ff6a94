"""KL between two heads and the collision probability against float64: values, gradients, and split over ranks."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import GRADIENT, LOGPROB, Inputs, Place, answer, inputs, relative
from distributed import run_ranks
from megadpo_kernels import LogitOptions, VocabShard, linear_kl, linear_logprob_collision

CAPPED = LogitOptions(multiplier=0.7, soft_cap=5.0, temperature=1.3)


def two_heads(vocab: int, dtype: torch.dtype = torch.float32) -> tuple[Inputs, Inputs]:
    """Of different hidden sizes; every distribution of one is near or far from the other's."""
    policy, other = inputs(21, 16, vocab, scale=2), inputs(21, 24, vocab, scale=2, seed=1)
    return policy.to(torch.device("cpu"), dtype), other.to(torch.device("cpu"), dtype)


def log_softmax(given: Inputs, options: LogitOptions) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x, w = (t.detach().cpu().double().requires_grad_() for t in (given.hidden_ND, given.weight_VD))
    z = x @ w.t() * options.multiplier
    if options.soft_cap is not None:
        z = options.soft_cap * torch.tanh(z / options.soft_cap)
    return (z / options.temperature).log_softmax(-1), x, w


def truth(policy: Inputs, other: Inputs, options: LogitOptions) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """KL(other || policy) and the gradients to the policy, in float64."""
    ours, x, w = log_softmax(policy, options)
    theirs = log_softmax(other, options)[0].detach()
    kl = (theirs.exp() * (theirs - ours)).sum(-1)
    kl.backward(policy.upstream_N.double())
    return kl.detach(), x.grad, w.grad


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [LogitOptions(), CAPPED], ids=str)
def test_against_float64(backend: Any, dtype: torch.dtype, options: LogitOptions) -> None:
    policy, other = two_heads(101, dtype)
    x, w = policy.hidden_ND.clone().requires_grad_(), policy.weight_VD.clone().requires_grad_()
    y, u = other.hidden_ND.clone().requires_grad_(), other.weight_VD.clone().requires_grad_()
    kl = linear_kl(x, w, y, u, VocabShard(0, 101, None), options=options, backend=backend, chunk=8)
    kl.backward(policy.upstream_N)
    want, want_x, want_w = truth(policy, other, options)
    assert kl.dtype == torch.float32
    assert float((kl.detach() - want).abs().max()) <= LOGPROB
    assert relative(x.grad, want_x) <= GRADIENT[dtype]
    assert relative(w.grad, want_w) <= GRADIENT[dtype]
    assert y.grad is None
    assert u.grad is None


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_equal_heads_are_exactly_zero_apart(backend: Any) -> None:
    """Also at logits of hundreds. (The reference's gradient is float64's rounding away from 0.)"""
    policy, _ = two_heads(101)
    x, w = (policy.hidden_ND * 50).requires_grad_(), policy.weight_VD
    kl = linear_kl(x, w, x.detach(), w, VocabShard(0, 101, None), backend=backend)
    kl.sum().backward()
    assert kl.eq(0).all()
    assert x.grad.abs().max() <= (0 if backend == "chunked" else 1e-12)


def split(device: torch.device, valid: int, rows: int) -> list[tuple[torch.Tensor, ...]]:
    """Whole and split by rows: (KL, gradient to hidden and weight, collision)."""
    group = dist.group.WORLD
    policy, other = two_heads(valid)
    scored = torch.tensor([3, 3, *range(19)])
    results = []
    for sequence in (False, True):

        def mine(x: torch.Tensor, cut: bool = sequence) -> torch.Tensor:
            return x.chunk(group.size())[group.rank()] if cut else x

        def part(given: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
            x = torch.cat([given.hidden_ND, given.hidden_ND[:3]])  # 24 rows, to be split evenly
            w = torch.cat([given.weight_VD, torch.full((rows - valid, given.weight_VD.shape[1]), 5.0)])
            return mine(x).clone().requires_grad_(), mine(w, True).clone().requires_grad_()

        (x, w), (_, u), y = part(policy), part(other), other.hidden_ND[scored]
        shard = VocabShard(group.rank() * len(w), valid, group, sequence)
        kl = linear_kl(x, w, y, u, shard, rows_N=scored, chunk=8)
        kl.backward(policy.upstream_N)
        targets = policy.targets_N
        collision = [
            linear_logprob_collision(x, w, targets, shard, rows_N=scored, chunk=8, backend=b)[1].detach()
            for b in ("reference", "chunked", "triton")
        ]
        results.append((kl.detach(), x.grad, w.grad, *collision))
    return results


@pytest.mark.parametrize(("valid", "rows"), [(101, 104), (30, 120)])
def test_split_over_ranks(valid: int, rows: int) -> None:
    """Padded; and with a second rank that has not one real column. One row is scored twice, some not at all."""
    first, second = run_ranks(2, split, valid, rows)
    policy, other = two_heads(valid)
    scored = torch.tensor([3, 3, *range(19)])
    picked = [Inputs(g.hidden_ND[scored], g.weight_VD, g.targets_N, policy.upstream_N) for g in (policy, other)]
    want, want_x, want_w = truth(*picked, LogitOptions())
    want_x = torch.zeros(24, 16, dtype=torch.float64).index_add(0, scored, want_x)
    want_collision = log_softmax(picked[0], LogitOptions())[0].exp().square().sum(-1)
    for sequence, (a, b) in enumerate(zip(first, second, strict=True)):
        assert all(torch.equal(a[i], b[i]) for i in (0, 3, 4, 5)), "ranks disagree"
        assert float((a[0] - want).abs().max()) <= LOGPROB
        hidden = torch.cat([a[1], b[1]]) if sequence else a[1]
        assert relative(hidden, want_x) <= GRADIENT[torch.float32]
        weight = torch.cat([a[2], b[2]])
        assert relative(weight[:valid], want_w) <= GRADIENT[torch.float32]
        assert weight[valid:].eq(0).all()
        for collision in a[3:]:
            assert relative(collision, want_collision) <= GRADIENT[torch.float32]


def test_collision_has_no_gradient_and_leaves_the_log_probability_alone(place: Place) -> None:
    given = inputs(13, 16, 101, scale=2).to(place.device, torch.float32)
    want = answer(given, place.backend)
    x, w = given.hidden_ND.clone().requires_grad_(), given.weight_VD.clone().requires_grad_()
    shard = VocabShard(0, 101, None)
    logprob, collision = linear_logprob_collision(
        x, w, given.targets_N, shard, backend=place.backend, chunk=7, cache_bytes=0
    )
    assert not collision.requires_grad
    (logprob * collision).backward(given.upstream_N)
    exact = log_softmax(given, LogitOptions())[0].detach().exp().square().sum(-1)
    assert relative(collision.cpu(), exact) <= GRADIENT[torch.float32]
    assert torch.equal(logprob.detach().cpu(), want.logprob_N)
    logprob = linear_logprob_collision(x, w, given.targets_N, shard, backend=place.backend, chunk=7)[0]
    x.grad = w.grad = None
    logprob.backward(given.upstream_N)
    assert torch.equal(x.grad.cpu(), want.hidden)
    assert torch.equal(w.grad.cpu(), want.weight)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"backend": "triton"}, "linear_kl has reference and chunked"),
        ({"chunk": 0}, "at least 1 row"),
        ({"chunk": 0, "backend": "reference"}, "at least 1 row"),
    ],
)
def test_what_cannot_work_is_refused(change: dict, words: str) -> None:
    policy, other = two_heads(30)
    heads = (policy.hidden_ND, policy.weight_VD, other.hidden_ND, other.weight_VD)
    with pytest.raises(ValueError, match=words):
        linear_kl(*heads, VocabShard(0, 30, None), **change)
    with pytest.raises(ValueError, match="need the same"):
        linear_kl(*heads[:3], other.weight_VD[:-1], VocabShard(0, 30, None))
