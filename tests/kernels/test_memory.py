"""Bytes that the head allocates beyond its inputs, counted from torch's own record of every allocation."""

import sys
from collections.abc import Callable

import pytest
import torch
from bench_kernels import peak_bytes
from cases import Inputs, inputs
from megadpo_kernels import VocabShard, linear_logprob

ROWS, VOCAB = 4096, 32000


@pytest.fixture(scope="module")
def given() -> Inputs:
    return inputs(ROWS, 16, VOCAB)


def peak(logprob_of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], given: Inputs) -> int:
    """Most bytes alive at once during forward and backward, over what was there before."""
    x, w = given.hidden_ND.clone().requires_grad_(), given.weight_VD.clone().requires_grad_()
    return peak_bytes(lambda: logprob_of(x, w).backward(given.upstream_N), torch.device("cpu"))


def naive(given: Inputs) -> int:
    return peak(lambda x, w: (x @ w.t()).log_softmax(-1).gather(1, given.targets_N[:, None])[:, 0], given)


def test_a_quarter_of_the_plain_path(given: Inputs) -> None:
    """As the trainer calls it. The plain path holds two or three of logits, log-softmax and gradient at once."""
    shard = VocabShard(0, VOCAB, None)
    plain = naive(given)
    ours = peak(lambda x, w: linear_logprob(x, w, given.targets_N, shard, backend="chunked"), given)
    assert plain >= 2 * 4 * ROWS * VOCAB, "the record misses allocations"
    assert ours <= plain / 4, f"{ours / 2**20:.0f} of {plain / 2**20:.0f} MiB"


def test_never_the_logits_of_all_rows(given: Inputs) -> None:
    """Small chunks and nothing kept: little more than the weight's gradient."""
    shard = VocabShard(0, VOCAB, None)
    lean = peak(
        lambda x, w: linear_logprob(x, w, given.targets_N, shard, backend="chunked", chunk=64, cache_bytes=0), given
    )
    assert lean <= 4 * 64 * VOCAB * 3 + 2 * given.weight_VD.nbytes + 4 * given.hidden_ND.nbytes


def test_a_bench_row_of_everything(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """tools/bench_kernels.py measures what is here and says why for what is not."""
    import bench_kernels

    monkeypatch.setattr(bench_kernels, "CPU_SHAPES", (bench_kernels.Shape("tiny", 16, 8, 64),))
    monkeypatch.setattr(sys, "argv", ["bench_kernels.py", "--device", "cpu", "--repeats", "1"])
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    bench_kernels.main()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| megadpo")]
    assert len(lines) == 7 + 3  # log-probabilities; and the loss of pairs by each back end
    for line in lines:
        measured, limit = (line.split("|")[column].strip() for column in (3, 6))
        assert limit == "-", "the goals are for larger shapes"
        assert ("not measured: " in line) == (measured == "-"), line
        assert measured == "-" or float(measured) >= 0
