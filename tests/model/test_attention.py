"""The layout that the one-call kernels get describes the same attention as the segment-by-segment path."""

import numpy as np
import pytest
import torch
from megadpo_kernels.prefix import duplicate
from tiny import random_groups

from megadpo.data.batch import pack
from megadpo.model.attention import (
    PADDING_PIECE,
    StreamParams,
    Varlen,
    choose_backend,
    sdpa,
    stream_params,
    varlen_layout,
)


def gathered(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: Varlen) -> torch.Tensor:
    """What a variable-length kernel with bottom-right causal alignment computes: [T, heads, W] and twice [K, groups, W]
    -> [T, heads, W]."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    parts = []
    bounds = zip(layout.cu_queries.tolist(), layout.cu_keys.tolist(), strict=True)
    (q0, k0), *rest = bounds
    for q1, k1 in rest:
        scores = torch.einsum("qhw,khw->hqk", q[q0:q1], k[k0:k1]) / q.shape[-1] ** 0.5
        mask = torch.ones(q1 - q0, k1 - k0, dtype=torch.bool).tril(k1 - k0 - (q1 - q0))
        parts.append(torch.einsum("hqk,khw->qhw", scores.masked_fill(~mask, -torch.inf).softmax(-1), v[k0:k1]))
        q0, k0 = q1, k1
    return torch.cat(parts)


def one_call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, params: StreamParams) -> torch.Tensor:
    k, v = (duplicate(x[:, 0], params.varlen.copies) for x in (k, v))
    return gathered(q[:, 0], k, v, params.varlen)[:, None]


@pytest.mark.parametrize("responses", [1, 2, 4])
@pytest.mark.parametrize("share", [True, False])
def test_both_layouts_are_the_same_attention(responses: int, share: bool) -> None:
    """Values and gradients, grouped queries, ragged lengths, padding."""
    groups = random_groups(7, responses=responses)
    batch = pack(groups, range(7), 400, None, share)
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(400, 1, heads, 8, generator=generator, dtype=torch.float64) for heads in (4, 2, 2)]
    results = []
    for function, backend in ((lambda *x: sdpa(*x, None), "sdpa"), (one_call, "varlen")):
        q, k, v = (x.clone().requires_grad_() for x in tensors)
        output = function(q, k, v, stream_params(batch, backend))[: batch.used]
        (output * torch.arange(1.0, output.numel() + 1).view_as(output).sin()).sum().backward()
        results.append([output.detach(), q.grad[: batch.used], k.grad[: batch.used], v.grad[: batch.used]])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)


def test_padding_is_cut_small_and_covers_the_stream() -> None:
    batch = pack(random_groups(2), [0], 1000, None)
    layout = varlen_layout(batch.segments, 1000, torch.device("cpu"))
    assert layout.cu_queries[-1] == 1000
    assert layout.longest_query == PADDING_PIECE
    sizes = np.diff(layout.cu_queries.numpy())
    assert (sizes > 0).all()
    assert (layout.copies.rows_K.numpy() < 1000).all()


def test_an_empty_micro_batch_reaches_every_input() -> None:
    batch = pack(random_groups(2), [], 64, None)
    q, k, v = (torch.randn(64, 1, heads, 8, requires_grad=True) for heads in (4, 2, 2))
    output = sdpa(q, k, v, stream_params(batch, "sdpa"), None)
    assert output.eq(0).all()
    output.sum().backward()
    assert q.grad.eq(0).all()
    layout = varlen_layout(batch.segments, 64, torch.device("cpu"))
    assert layout.cu_queries.tolist() == [0, 64]


def test_choice() -> None:
    assert choose_backend(torch.device("cpu"), torch.bfloat16) == "sdpa"
    assert choose_backend(torch.device("cuda"), torch.float32) == "sdpa"
    assert choose_backend(torch.device("cuda"), torch.bfloat16) in ("te", "varlen")
