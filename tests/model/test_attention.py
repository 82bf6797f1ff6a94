"""The layout that the one-call kernels get describes the same attention as the segment-by-segment path."""

import sys
from dataclasses import replace
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.nn.attention.varlen  # nothing else may have
from megadpo_kernels.prefix import duplicate
from megatron.core.transformer import TransformerConfig
from tiny import random_groups

from megadpo.convert.shape import ModelShape, Scores, Window
from megadpo.data.batch import pack
from megadpo.model import attention
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


def test_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a kernel would not compute the model exactly, another is taken."""
    plain = ModelShape("llama", 2, 8, 8, 2, 2, 4, 9, 9, 1e-5, 1e4, None, False)
    windowed = replace(plain, window=Window(4, (True, False)))
    capped = replace(windowed, scores=Scores(soft_cap=50.0))
    cuda, half = torch.device("cuda"), torch.bfloat16
    assert choose_backend(torch.device("cpu"), half, plain)[0] == "sdpa"
    assert choose_backend(cuda, torch.float32, plain)[0] == "sdpa"
    assert choose_backend(cuda, half, capped)[0] == "sdpa"
    for te, of_plain in ((True, "te"), (False, "varlen")):
        monkeypatch.setattr(attention.mcore_fixes, "have_te", lambda te=te: te)
        assert choose_backend(cuda, half, plain)[0] == of_plain
        assert choose_backend(cuda, half, windowed)[0] == "varlen"
    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", lambda query, key, value, scale: None)
    backend, why = choose_backend(cuda, half, plain)
    assert backend == "sdpa"
    assert "no Transformer Engine" in why
    assert "enable_gqa, window_size" in why


def called(monkeypatch: pytest.MonkeyPatch, backend: str, window: int | None) -> tuple[dict, Varlen]:
    """What a back end's kernel is told, by a stand-in for it, for a stream of one group with two responses."""
    told: dict = {}

    def kernel(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *lengths: object, **more: object) -> torch.Tensor:
        told.update(more, q=q, k=k, lengths=lengths)
        return torch.zeros_like(q)

    module = ModuleType("transformer_engine.pytorch")
    module.DotProductAttention = lambda *_, **made: told.update(made=made) or kernel
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", module)
    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", kernel)
    shape = ModelShape("llama", 1, 32, 8, 4, 2, 8, 9, 9, 1e-5, 1e4, None, False)
    if window:
        shape = replace(shape, window=Window(window, (True,)))
    config = TransformerConfig(num_layers=1, hidden_size=32, num_attention_heads=4, num_query_groups=2)
    module = attention.SegmentAttention(config, 1, None, "self", shape, backend)
    params = stream_params(pack(random_groups(3), [1], 24, None), backend, window)
    q, k, v = (torch.randn(24, 1, heads, 8) for heads in (4, 2, 2))
    assert module(q, k, v, None, packed_seq_params=params).shape == (24, 1, 32)
    return told, params.varlen


def test_what_transformer_engine_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain padding_causal would be aligned at the top left where the longest lengths agree."""
    told, layout = called(monkeypatch, "te", None)
    assert told["attn_mask_type"] == told["made"]["attn_mask_type"] == "padding_causal_bottom_right"
    assert told["qkv_format"] == told["made"]["qkv_format"] == "thd"
    assert (told["max_seqlen_q"], told["max_seqlen_kv"]) == (layout.longest_query, layout.longest_key)
    assert all(isinstance(told[name], int) for name in ("max_seqlen_q", "max_seqlen_kv"))
    assert torch.equal(told["cu_seqlens_q"], layout.cu_queries)
    assert torch.equal(told["cu_seqlens_kv"], layout.cu_keys)
    assert len(told["k"]) == layout.cu_keys[-1] > len(told["q"]) == 24


@pytest.mark.parametrize("window", [None, 4])
def test_what_variable_length_attention_is_told(monkeypatch: pytest.MonkeyPatch, window: int | None) -> None:
    told, layout = called(monkeypatch, "varlen", window)
    assert told["window_size"] == ((-1, 0) if window is None else (window - 1, 0))
    assert told["enable_gqa"] is True
    assert told["lengths"] == (layout.cu_queries, layout.cu_keys, layout.longest_query, layout.longest_key)
