"""linear_logprob against plain float64 torch: values and gradients, on one rank and split over two."""

import pytest
import torch
from distributed import run_ranks
from megadpo_kernels import VocabShard, linear_logprob


def inputs(rows: int, hidden: int, vocab: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, hidden, generator=generator)
    w = torch.randn(vocab, hidden, generator=generator)
    targets = torch.randint(0, vocab, (rows,), generator=generator)
    upstream = torch.randn(rows, generator=generator)
    return x, w, targets, upstream


def truth(x: torch.Tensor, w: torch.Tensor, targets: torch.Tensor, upstream: torch.Tensor) -> tuple[torch.Tensor, ...]:
    x, w = x.double().requires_grad_(), w.double().requires_grad_()
    logprob = (x @ w.t()).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    logprob.backward(upstream.double())
    return logprob.detach(), x.grad, w.grad


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want).norm() / want.norm().clamp(min=1e-30))


@pytest.mark.parametrize("chunk", [1, 7, 64])
@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
def test_one_rank(chunk: int, scale: float) -> None:
    """scale 30 gives logits of several hundred: exp would overflow without the maximum."""
    x, w, targets, upstream = inputs(23, 16, 101)
    x = (x * scale).requires_grad_()
    w.requires_grad_()
    logprob = linear_logprob(x, w, targets, VocabShard(0, 101, None), chunk)
    logprob.backward(upstream)
    want, want_x, want_w = truth(x.detach(), w.detach(), targets, upstream)
    assert logprob.dtype == torch.float32
    torch.testing.assert_close(logprob.detach().double(), want, atol=1e-5 * max(scale, 1) ** 1.5, rtol=1e-6)
    assert relative(x.grad, want_x) < 3e-6 * max(scale, 1)
    assert relative(w.grad, want_w) < 3e-6 * max(scale, 1)


def test_padding_has_no_probability_and_no_gradient() -> None:
    x, w, targets, upstream = inputs(9, 8, 50)
    padded = torch.cat([w, torch.full((14, 8), 7.0)]).requires_grad_()
    logprob = linear_logprob(x, padded, targets, VocabShard(0, 50, None))
    logprob.backward(upstream)
    want, _, want_w = truth(x, w, targets, upstream)
    torch.testing.assert_close(logprob.detach().double(), want, atol=1e-5, rtol=0)
    assert padded.grad[50:].eq(0).all()
    assert relative(padded.grad[:50], want_w) < 3e-6


def test_no_rows() -> None:
    x, w = torch.zeros(0, 8, requires_grad=True), torch.randn(20, 8, requires_grad=True)
    logprob = linear_logprob(x, w, torch.zeros(0, dtype=torch.int64), VocabShard(0, 20, None))
    logprob.sum().backward()
    assert logprob.shape == (0,)
    assert w.grad.eq(0).all()


def test_rows_do_not_depend_on_each_other() -> None:
    """One row of NaN stays one row of NaN."""
    x, w, targets, _ = inputs(6, 8, 30)
    clean = linear_logprob(x, w, targets, VocabShard(0, 30, None))
    x[2] = torch.nan
    dirty = linear_logprob(x, w, targets, VocabShard(0, 30, None))
    assert dirty[2].isnan()
    keep = torch.tensor([0, 1, 3, 4, 5])
    assert torch.equal(clean[keep], dirty[keep])


def split(device: torch.device, rows: int, vocab: int, padded: int) -> tuple[torch.Tensor, ...]:
    group = torch.distributed.group.WORLD
    x, w, targets, upstream = inputs(rows, 16, vocab)
    w = torch.cat([w, torch.full((padded - vocab, 16), 5.0)])
    part = padded // group.size()
    start = group.rank() * part
    x.requires_grad_()
    mine = w[start : start + part].clone().requires_grad_()
    logprob = linear_logprob(x, mine, targets, VocabShard(start, vocab, group), chunk=5)
    logprob.backward(upstream)
    torch.distributed.all_reduce(x.grad)
    return logprob.detach(), x.grad, mine.grad


# the last: all real tokens are on the first rank, the second has not one valid column
@pytest.mark.parametrize(("vocab", "padded"), [(64, 64), (101, 102), (30, 60)])
def test_two_ranks(vocab: int, padded: int) -> None:
    results = run_ranks(2, split, 17, vocab, padded)
    want, want_x, want_w = truth(*inputs(17, 16, vocab))
    assert torch.equal(results[0][0], results[1][0]), "ranks disagree"
    torch.testing.assert_close(results[0][0].double(), want, atol=2e-5, rtol=0)
    assert relative(results[0][1], want_x) < 3e-6
    whole = torch.cat([results[0][2], results[1][2]])
    assert relative(whole[:vocab], want_w) < 3e-6
    assert whole[vocab:].eq(0).all()


def test_bfloat16_is_no_worse_than_the_plain_path() -> None:
    x, w, targets, upstream = inputs(40, 64, 300)
    x, w = (x * 0.3).bfloat16(), w.bfloat16()
    want, want_x, want_w = truth(x, w, targets, upstream)

    def measure(function: object) -> tuple[float, float, float]:
        a, b = x.clone().requires_grad_(), w.clone().requires_grad_()
        logprob = function(a, b)
        logprob.float().backward(upstream)
        return (float((logprob.double() - want).abs().max()), relative(a.grad, want_x), relative(b.grad, want_w))

    ours = measure(lambda a, b: linear_logprob(a, b, targets, VocabShard(0, 300, None)))
    plain = measure(lambda a, b: (a @ b.t()).log_softmax(-1).gather(1, targets[:, None])[:, 0])
    assert all(a <= 1.1 * b for a, b in zip(ours, plain, strict=True)), (ours, plain)
