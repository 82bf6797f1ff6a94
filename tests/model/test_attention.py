"""The layout that the one-call kernels get describes the same attention as the segment-by-segment path."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from megadpo_kernels.prefix import duplicate
from tiny import random_groups

from megadpo.convert.shape import ModelShape, Scores, Window
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


def by_segment(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, params: StreamParams, window: int | None = None):
    return sdpa(q, k, v, zip(params.segments, params.masks[window], strict=True), None)


def gathered(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: Varlen, window: int | None = None
) -> torch.Tensor:
    """What a variable-length kernel with bottom-right causal alignment and flash attention's (window - 1, 0) computes:
    [T, heads, W] and twice [K, groups, W] -> [T, heads, W]."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    parts = []
    bounds = zip(layout.cu_queries.tolist(), layout.cu_keys.tolist(), strict=True)
    (q0, k0), *rest = bounds
    for q1, k1 in rest:
        scores = torch.einsum("qhw,khw->hqk", q[q0:q1], k[k0:k1]) / q.shape[-1] ** 0.5
        distance = torch.arange(q1 - q0)[:, None] + (k1 - k0) - (q1 - q0) - torch.arange(k1 - k0)
        mask = (distance >= 0) & (distance <= (k1 - k0 if window is None else window - 1))
        parts.append(torch.einsum("hqk,khw->qhw", scores.masked_fill(~mask, -torch.inf).softmax(-1), v[k0:k1]))
        q0, k0 = q1, k1
    return torch.cat(parts)


def one_call(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, params: StreamParams, window: int | None = None
) -> torch.Tensor:
    k, v = (duplicate(x[:, 0], params.varlen.copies) for x in (k, v))
    return gathered(q[:, 0], k, v, params.varlen, window)[:, None]


@pytest.mark.parametrize("responses", [1, 2, 4])
@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("window", [None, 1, 4])
def test_both_layouts_are_the_same_attention(responses: int, share: bool, window: int | None) -> None:
    """Values and gradients, grouped queries, ragged lengths, padding."""
    groups = random_groups(7, responses=responses)
    batch = pack(groups, range(7), 400, None, share)
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(400, 1, heads, 8, generator=generator, dtype=torch.float64) for heads in (4, 2, 2)]
    results = []
    for function, backend in ((by_segment, "sdpa"), (one_call, "varlen")):
        q, k, v = (x.clone().requires_grad_() for x in tensors)
        output = function(q, k, v, stream_params(batch, backend, window), window)[: batch.used]
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
    output = by_segment(q, k, v, stream_params(batch, "sdpa"))
    assert output.eq(0).all()
    output.sum().backward()
    assert q.grad.eq(0).all()
    layout = varlen_layout(batch.segments, 64, torch.device("cpu"))
    assert layout.cu_queries.tolist() == [0, 64]


def test_choice() -> None:
    """Where a kernel would not compute the model exactly, another is taken."""
    plain = ModelShape("llama", 2, 8, 8, 2, 2, 4, 9, 9, 1e-5, 1e4, None, False)
    windowed = replace(plain, window=Window(4, (True, False)))
    capped = replace(windowed, scores=Scores(soft_cap=50.0))
    cuda, half = torch.device("cuda"), torch.bfloat16
    assert choose_backend(torch.device("cpu"), half, plain) == "sdpa"
    assert choose_backend(cuda, torch.float32, plain) == "sdpa"
    assert choose_backend(cuda, half, plain) in ("te", "varlen")
    assert choose_backend(cuda, half, windowed) == "varlen"
    assert choose_backend(cuda, half, capped) == "sdpa"
