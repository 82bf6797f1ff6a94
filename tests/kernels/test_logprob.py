"""linear_logprob on one rank: every back end against float64, values and gradients, kind and unkind inputs."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import GRADIENT, LOGPROB, Inputs, Place, answer, assert_near, inputs, relative, truth
from megadpo_kernels import LogitOptions, VocabShard, chunked, gemm, linear_logprob

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CAPPED = LogitOptions(multiplier=0.7, soft_cap=5.0, temperature=1.3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [LogitOptions(), CAPPED, LogitOptions(temperature=0.6)], ids=str)
def test_against_float64(place: Place, dtype: torch.dtype, options: LogitOptions) -> None:
    """Log-probability and entropy; 23 rows in chunks of 7; 101 columns: one whole block of the kernel and a part."""
    given = inputs(23, 32, 101, scale=2).to(place.device, dtype)
    got = answer(given, place.backend, options=options, entropy=True)
    assert_near(got, truth(given, options, entropy=True), GRADIENT[dtype])
    got = answer(given, place.backend, options=options)
    assert_near(got, truth(given, options), GRADIENT[dtype])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_many_rows_have_narrow_slopes(place: Place, dtype: torch.dtype) -> None:
    """A chunk whose slope is 16 bits wide, then one of a few rows whose slope comes in two parts."""
    rows = gemm.FEW + 6
    assert gemm.slope_dtype(rows, dtype) == dtype
    given = inputs(rows + 5, 16, 101, scale=2).to(place.device, dtype)
    for entropy in (False, True):
        got = answer(given, place.backend, entropy=entropy, chunk=rows)
        assert_near(got, truth(given, entropy=entropy), GRADIENT[dtype])


@pytest.mark.parametrize("cap", [5.0, 30.0, 1000.0])
def test_soft_caps_keep_their_digits(place: Place, cap: float) -> None:
    """Far over the logits a cap leaves almost only them: 1000 (1 - small) / (1 + small) would be off by 1e-4."""
    given, options = inputs(23, 32, 101, scale=3).to(place.device, torch.float32), LogitOptions(soft_cap=cap)
    assert_near(answer(given, place.backend, options=options), truth(given, options), GRADIENT[torch.float32])


@pytest.mark.parametrize("vocab", [1, 2, 15, 16, 64, 65, 128])
def test_any_vocabulary(place: Place, vocab: int) -> None:
    given = inputs(5, 8, vocab).to(place.device, torch.float32)
    want = truth(given)
    got = answer(given, place.backend)
    assert float((got.logprob_N - want.logprob_N).abs().max()) <= 2e-5
    assert float((got.hidden - want.hidden).norm()) <= 3e-6 * max(float(want.hidden.norm()), 1)


@pytest.mark.parametrize("offset", [90.0, -90.0])
def test_logits_beyond_80(place: Place, offset: float) -> None:
    """exp of them overflows, or is 0, in float32. One direction of hidden carries the offset. Inputs are multiples of
    1/16: products of such are exact, so that what is seen is the error of the head and not that of the product, which
    at logits of 100 is 2e-5 in float32."""
    given = inputs(11, 16, 67, scale=3)
    hidden, weight = (x.mul(16).round().div(16) for x in (given.hidden_ND, given.weight_VD))
    hidden[:, 0], weight[:, 0] = 1.0, offset
    given = replace(given, hidden_ND=hidden, weight_VD=weight).to(place.device, torch.float32)
    exact = given.hidden_ND.double() @ given.weight_VD.double().t()
    assert torch.equal((given.hidden_ND @ given.weight_VD.t()).double(), exact)
    assert float(exact.abs().min()) > 78
    assert_near(answer(given, place.backend), truth(given), GRADIENT[torch.float32])


def test_wild_logits(lean: Place) -> None:
    """Several hundred in both directions: nothing overflows, and the error is that of the product alone. A logit's
    error e moves a log-probability by up to 2e and a slope by up to 2e of itself."""
    given = inputs(11, 16, 67, scale=200).to(lean.device, torch.float32)
    exact = (given.hidden_ND.double() @ given.weight_VD.double().t()).cpu()
    product = 2 * float(((given.hidden_ND @ given.weight_VD.t()).cpu() - exact).abs().max())
    got, want = answer(given, lean.backend), truth(given)
    assert_near(got, want, GRADIENT[torch.float32] + product, LOGPROB + product)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("far", [10, 22])
def test_probability_near_one(place: Place, dtype: torch.dtype, far: float) -> None:
    """A probability rounded to bfloat16 before 1 is subtracted would leave no gradient of the target at all. Rounded to
    float32 it would leave four digits at 0.998, and none at 1 - 1e-8: the others' probabilities are added up instead.
    """
    given = inputs(6, 40, 40, scale=0.3)
    weight = torch.eye(40)
    given = replace(given, hidden_ND=given.hidden_ND + far * weight[given.targets_N], weight_VD=weight)
    given = given.to(place.device, dtype)
    for entropy in (False, True):
        want = truth(given, entropy=entropy)
        assert float(want.logprob_N.exp().min()) > 0.99
        assert_near(answer(given, place.backend, entropy=entropy), want, GRADIENT[dtype])


def test_padding_has_no_probability_and_no_gradient(place: Place) -> None:
    given = inputs(9, 8, 50)
    padded = replace(given, weight_VD=torch.cat([given.weight_VD, torch.full((14, 8), 7.0)]))
    padded = padded.to(place.device, torch.float32)
    got = answer(padded, place.backend, shard=VocabShard(0, 50, None))
    want = truth(given)
    assert float((got.logprob_N - want.logprob_N).abs().max()) <= 2e-5
    assert got.weight[50:].eq(0).all()
    assert relative(got.weight[:50], want.weight) < 3e-6
    assert relative(got.hidden, want.hidden) < 3e-6


def test_a_target_in_the_padding_has_probability_zero(place: Place) -> None:
    given = inputs(3, 8, 50).to(place.device, torch.float32)
    targets = torch.tensor([4, 47, -1], device=place.device)
    shard = VocabShard(0, 45, None)
    logprob = linear_logprob(given.hidden_ND, given.weight_VD, targets, shard, backend=place.backend)
    assert logprob.isinf().tolist() == [False, True, True]


def test_no_rows(place: Place) -> None:
    x = torch.zeros(0, 8, requires_grad=True, device=place.device)
    w = torch.randn(20, 8, device=place.device, requires_grad=True)
    targets = torch.zeros(0, dtype=torch.int64, device=place.device)
    logprob = linear_logprob(x, w, targets, VocabShard(0, 20, None), backend=place.backend)
    logprob.sum().backward()
    assert logprob.shape == (0,)
    assert w.grad.eq(0).all()


def test_rows_do_not_depend_on_each_other(place: Place) -> None:
    """A row of NaN is reported in its own place: values and input gradients of the others keep every bit."""
    given = inputs(9, 8, 30).to(place.device, torch.float32)
    hidden = given.hidden_ND.clone()
    hidden[2] = torch.nan
    clean, dirty = answer(given, place.backend), answer(replace(given, hidden_ND=hidden), place.backend)
    assert dirty.logprob_N.isnan().nonzero().tolist() == [[2]]
    assert dirty.hidden[2].isnan().all()
    assert dirty.weight.isnan().all(), "the gradient of a NaN must not pass for a number"
    keep = torch.tensor([0, 1, 3, 4, 5, 6, 7, 8])
    assert torch.equal(clean.logprob_N[keep], dirty.logprob_N[keep])
    assert torch.equal(clean.hidden[keep], dirty.hidden[keep])


def test_rows_without_upstream_gradient(place: Place) -> None:
    given = inputs(10, 8, 30).to(place.device, torch.float32)
    upstream = given.upstream_N.clone()
    upstream[::2] = 0
    given = replace(given, upstream_N=upstream)
    got = answer(given, place.backend)
    assert got.hidden[::2].eq(0).all()
    assert_near(got, truth(given), 3e-6)


def test_equal_rows_give_equal_bits(place: Place) -> None:
    """Also in different chunks of the same size."""
    given = inputs(4, 16, 90)
    twice = Inputs(*(torch.cat([getattr(given, n)] * 2) if n != "weight_VD" else given.weight_VD for n in vars(given)))
    got = answer(twice.to(place.device, torch.float32), place.backend, chunk=4)
    assert torch.equal(got.logprob_N[:4], got.logprob_N[4:])
    assert torch.equal(got.hidden[:4], got.hidden[4:])


@pytest.mark.parametrize("chunk", [1, 5, 64])
def test_the_chunk_does_not_matter(lean: Place, chunk: int) -> None:
    given = inputs(23, 16, 101).to(lean.device, torch.float32)
    assert_near(answer(given, lean.backend, chunk=chunk), truth(given), 3e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kept_logits_give_the_same_bits(lean: Place, dtype: torch.dtype) -> None:
    """None kept, some of the chunks, all. And twice the same call."""
    given = inputs(23, 16, 101).to(lean.device, dtype)
    chunk_bytes = 7 * 112 * 4
    answers = [answer(given, lean.backend, cache_bytes=size) for size in (0, 0, 2 * chunk_bytes, 2**20)]
    for other in answers[1:]:
        assert torch.equal(answers[0].logprob_N, other.logprob_N)
        assert torch.equal(answers[0].hidden, other.hidden)
        assert torch.equal(answers[0].weight, other.weight)


@pytest.mark.parametrize(("chunks_kept", "computed_again"), [(0, 4), (1, 3), (2.5, 2), (4, 0)])
def test_kept_logits_are_not_computed_again(
    lean: Place, chunks_kept: float, computed_again: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """23 rows in chunks of 7: four products forward, and backward only those of the chunks that were not kept."""
    products = []
    original = gemm.logits_into
    monkeypatch.setattr(gemm, "logits_into", lambda *given: products.append(len(given[0])) or original(*given))
    given = inputs(23, 16, 101).to(lean.device, torch.float32)
    answer(given, lean.backend, chunk=7, cache_bytes=int(chunks_kept * 7 * 112 * 4))
    assert products[:4] == [7, 7, 7, 2]
    assert len(products) == 4 + computed_again


def test_the_sum_over_ranks_runs_beside_the_last_weight_product(lean: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is begun after the last chunk's hidden gradient and waited for after that chunk's weight gradient."""
    order = []

    def start_sum(partial: torch.Tensor, shard: VocabShard) -> Callable[[], torch.Tensor]:
        order.append("start")
        return lambda: order.append("wait") or partial

    monkeypatch.setattr(chunked, "start_sum", start_sum)
    for name in ("hidden_gradient", "add_weight_gradient"):
        original = getattr(gemm, name)

        def noted(*given: torch.Tensor, _name: str = name, _original: Callable = original) -> Any:
            order.append(_name)
            return _original(*given)

        monkeypatch.setattr(gemm, name, noted)
    answer(inputs(12, 16, 101).to(lean.device, torch.float32), lean.backend, chunk=7)
    hidden, weight = "hidden_gradient", "add_weight_gradient"
    assert order == [hidden, weight, hidden, "start", weight, "wait"]


def test_backward_twice(lean: Place) -> None:
    """The first pass writes over the kept logits; the second must not use them."""
    given = inputs(9, 8, 30).to(lean.device, torch.float32)
    x, w = given.hidden_ND.requires_grad_(), given.weight_VD
    logprob = linear_logprob(x, w, given.targets_N, VocabShard(0, 30, None), backend=lean.backend, cache_bytes=2**20)
    [first] = torch.autograd.grad(logprob, x, given.upstream_N, retain_graph=True)
    [second] = torch.autograd.grad(logprob, x, given.upstream_N)
    assert torch.equal(first, second)


def test_scored_rows_of_a_stream(place: Place) -> None:
    """In any order, one of them twice, some not at all."""
    given = inputs(12, 8, 30)
    rows = torch.tensor([3, 4, 5, 3, 9, 11, 0])
    picked = Inputs(given.hidden_ND[rows], given.weight_VD, given.targets_N[:7], given.upstream_N[:7])
    want = truth(picked)
    want_hidden = torch.zeros(12, 8, dtype=torch.float64).index_add(0, rows, want.hidden)
    there = given.to(place.device, torch.float32)
    x = there.hidden_ND.requires_grad_()
    logprob = linear_logprob(
        x,
        there.weight_VD,
        there.targets_N[:7],
        VocabShard(0, 30, None),
        rows_N=rows.to(place.device),
        backend=place.backend,
    )
    logprob.backward(there.upstream_N[:7])
    assert float((logprob.detach().cpu() - want.logprob_N).abs().max()) < 2e-5
    assert relative(x.grad.cpu(), want_hidden) < 3e-6


def test_a_frozen_head_and_a_frozen_body(lean: Place) -> None:
    """As under low-rank adapters (the weight is frozen), or where only the head is trained."""
    given = inputs(9, 8, 30).to(lean.device, torch.float32)
    want = truth(given)
    for trained in ("hidden", "weight"):
        x, w = given.hidden_ND.clone(), given.weight_VD.clone()
        (x if trained == "hidden" else w).requires_grad_()
        linear_logprob(x, w, given.targets_N, VocabShard(0, 30, None), backend=lean.backend).backward(given.upstream_N)
        got, other = (x.grad, w.grad) if trained == "hidden" else (w.grad, x.grad)
        assert other is None
        assert relative(got.cpu(), getattr(want, trained)) < 3e-6


def test_bfloat16_is_no_worse_than_the_plain_path() -> None:
    given = inputs(40, 64, 300, scale=2).to(CPU, torch.bfloat16)
    want = truth(given)
    ours = answer(given, "chunked")
    x, w = given.hidden_ND.requires_grad_(), given.weight_VD.requires_grad_()
    plain = (x @ w.t()).log_softmax(-1).gather(1, given.targets_N[:, None])[:, 0]
    plain.float().backward(given.upstream_N)
    error, plain_error = ((a.double() - want.logprob_N).abs().max() for a in (ours.logprob_N, plain))
    assert error < plain_error / 100
    assert relative(ours.hidden, want.hidden) <= relative(x.grad, want.hidden)
    assert relative(ours.weight, want.weight) <= relative(w.grad, want.weight)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_ND": torch.zeros(4, 9)}, "the same D"),
        ({"hidden_ND": torch.zeros(4, 8).bfloat16()}, "bfloat16 and torch.float32"),
        ({"targets_N": torch.zeros(3, dtype=torch.int64)}, r"need int64 \[4\]"),
        ({"targets_N": torch.zeros(4)}, "torch.float32"),
    ],
)
def test_wrong_inputs(change: dict, words: str) -> None:
    given = replace(inputs(4, 8, 30), **change)
    with pytest.raises(ValueError, match=words):
        linear_logprob(given.hidden_ND, given.weight_VD, given.targets_N, VocabShard(0, 30, None))


@pytest.mark.parametrize("backend", ["reference", "chunked", "triton"])
def test_wrong_rows_and_limits(backend: str) -> None:
    """The same from every back end."""
    given = inputs(4, 8, 30)
    arguments = (given.hidden_ND, given.weight_VD, given.targets_N, VocabShard(0, 30, None))
    rows = torch.arange(4)
    for change, words in (
        ({"rows_N": rows.float()}, r"rows_N is torch.float32 \[4\]: need int64 \[N\]"),
        ({"rows_N": rows.int()}, "rows_N is torch.int32"),
        ({"rows_N": rows > 0}, "rows_N is torch.bool"),
        ({"rows_N": rows[:, None]}, r"rows_N is torch.int64 \[4, 1\]"),
        ({"rows_N": rows + 1}, "rows_N goes from 1 to 4: the stream has 4 rows"),
        ({"rows_N": rows - 1}, "rows_N goes from -1 to 2"),
        ({"chunk": 0}, "chunk = 0"),
        ({"cache_bytes": -1}, "cache_bytes = -1"),
    ):
        with pytest.raises(ValueError, match=words):
            linear_logprob(*arguments, backend=backend, **change)


@pytest.mark.parametrize(("start", "valid"), [(0, 0), (-1, 30), (5, 30)])
def test_wrong_shards(start: int, valid: int) -> None:
    with pytest.raises(ValueError, match=f"start = {start}"):
        VocabShard(start, valid, None)


def test_wrong_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    given = inputs(4, 8, 30)
    arguments = (given.hidden_ND, given.weight_VD, given.targets_N, VocabShard(0, 30, None))
    with pytest.raises(ValueError, match="temperature = 0"):
        LogitOptions(temperature=0)
    with pytest.raises(ValueError, match="chunk = 0"):
        linear_logprob(*arguments, chunk=0)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="choose chunked"):
        linear_logprob(*arguments, backend="triton")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="not installed"):
        linear_logprob(*arguments, backend="triton")
    assert linear_logprob(*arguments).shape == (4,), "everything else works without Triton"
