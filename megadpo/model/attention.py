"""Core attention over a packed stream: every segment sees its group's prompt and itself, and nothing else.

Three back ends behind one module. All give the same numbers; none is quadratic in the stream where groups are short.

* sdpa: torch's scaled_dot_product_attention, a call per segment. Every device and dtype.
* varlen: torch's own variable-length flash attention, one call. CUDA, 16-bit.
* te: Transformer Engine's DotProductAttention in its packed (thd) format, one call. CUDA, 16-bit.

For the last two, prompts' keys and values are gathered once per response, so that segment i has cu_keys[i + 1] -
cu_keys[i] keys that end where its queries end: causal, aligned at the bottom right.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from megadpo_kernels import Backend as KernelBackend
from megadpo_kernels.prefix import Copies, duplicate
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from megadpo.data.batch import PackedBatch, Segment
from megadpo.parallel import mcore_fixes

Backend = Literal["sdpa", "varlen", "te"]

PADDING_PIECE = 64
"""Rows of padding are cut into segments of so many, so that attention over padding stays cheap."""


@dataclass(frozen=True)
class Varlen:
    """A stream as the one-call kernels want it. Lengths of the longest segment are host integers: no read-back."""

    copies: Copies
    """The row of the stream that each gathered key and value comes from."""
    cu_queries: Tensor
    """int32 [segments + 1], where each segment's queries start; the last is T."""
    cu_keys: Tensor
    """int32 [segments + 1], the same for the gathered keys."""
    longest_query: int
    longest_key: int


@dataclass
class StreamParams(PackedSeqParams):
    """How one stream is cut, carried through Megatron-Core to `SegmentAttention`.

    `qkv_format` is sbhd, so Megatron-Core applies the rotary embedding per token (positions are ours) and never reads
    sequence lengths back from the device. Its own attention does not know the fields below.
    """

    segments: tuple[Segment, ...] = ()
    masks: tuple[Tensor | None, ...] = ()
    """sdpa: per segment bool [queries, keys], True where attended; None where plain causal is meant."""
    varlen: Varlen | None = None


def choose_backend(device: torch.device, dtype: torch.dtype) -> Backend:
    """The fastest that is there: Transformer Engine's, else torch's variable-length kernel, else sdpa."""
    if device.type != "cuda" or dtype == torch.float32:
        return "sdpa"
    return "te" if mcore_fixes.have_te() else "varlen"


def stream_params(batch: PackedBatch, backend: Backend) -> StreamParams:
    """What the back end needs of a micro-batch, made once; every layer uses it."""
    device = batch.tokens_T.device
    if backend == "sdpa":
        masks = tuple(_mask(segment, device) for segment in batch.segments)
        return StreamParams(qkv_format="sbhd", segments=batch.segments, masks=masks)
    layout = varlen_layout(batch.segments, len(batch.tokens_T), device)
    return StreamParams(qkv_format="sbhd", segments=batch.segments, varlen=layout)


def _mask(segment: Segment, device: torch.device) -> Tensor | None:
    """Bottom-right causal where there is a prompt in front."""
    queries = segment.end - segment.start
    prefix = segment.prefix_end - segment.prefix_start
    if prefix == 0:
        return None
    return torch.ones(queries, prefix + queries, dtype=torch.bool, device=device).tril(prefix)


def varlen_layout(segments: tuple[Segment, ...], length: int, device: torch.device) -> Varlen:
    """The same segments, then the padding of a stream of `length` rows in small pieces that attend to themselves."""
    used = segments[-1].end if segments else 0
    padding = [Segment(a, min(a + PADDING_PIECE, length), a, a) for a in range(used, length, PADDING_PIECE)]
    every = [*segments, *padding]
    rows = [np.concatenate([np.arange(s.prefix_start, s.prefix_end), np.arange(s.start, s.end)]) for s in every]
    queries, keys = [s.end - s.start for s in every], [len(part) for part in rows]

    def ends(lengths: list[int]) -> Tensor:
        return torch.from_numpy(np.cumsum([0, *lengths]).astype(np.int32)).to(device, non_blocking=True)

    return Varlen(
        copies=Copies.of(torch.from_numpy(np.concatenate(rows)), length).to(device),
        cu_queries=ends(queries),
        cu_keys=ends(keys),
        longest_query=max(queries),
        longest_key=max(keys),
    )


class SegmentAttention(MegatronModule):
    """Megatron-Core's `core_attention`; the layer spec says which back end."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        backend: Backend = "sdpa",
        kernels: KernelBackend = "auto",
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
    ) -> None:
        super().__init__(config=config)
        self.backend, self.kernels = backend, kernels
        self.softmax_scale = softmax_scale
        if backend == "te":
            self.te = _transformer_engine(config, layer_number, softmax_scale)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: StreamParams | None = None,
    ) -> Tensor:
        """query [T, 1, H, W], key and value [T, 1, query groups, W] -> [T, 1, H * W]."""
        assert packed_seq_params is not None
        if self.backend == "sdpa":
            output = sdpa(query, key, value, packed_seq_params, self.softmax_scale)
        else:
            layout = packed_seq_params.varlen
            assert layout is not None
            kernel = self._te if self.backend == "te" else self._varlen
            k, v = (duplicate(x[:, 0], layout.copies, self.kernels) for x in (key, value))
            output = kernel(query[:, 0], k, v, layout)
        return output.reshape(query.shape[0], 1, -1)

    def _varlen(self, q: Tensor, k: Tensor, v: Tensor, layout: Varlen) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        output = varlen_attn(
            q,
            k,
            v,
            layout.cu_queries,
            layout.cu_keys,
            layout.longest_query,
            layout.longest_key,
            scale=self.softmax_scale,
            window_size=(-1, 0),  # causal; flash attention aligns it at the bottom right
            enable_gqa=q.shape[1] != k.shape[1],
        )
        assert isinstance(output, Tensor)
        return output

    def _te(self, q: Tensor, k: Tensor, v: Tensor, layout: Varlen) -> Tensor:
        return self.te(
            q,
            k,
            v,
            qkv_format="thd",
            cu_seqlens_q=layout.cu_queries,
            cu_seqlens_kv=layout.cu_keys,
            max_seqlen_q=layout.longest_query,
            max_seqlen_kv=layout.longest_key,
            # said in full: plain padding_causal is aligned at the top left by cuDNN where the longest lengths agree
            attn_mask_type="padding_causal_bottom_right",
        )


def _transformer_engine(config: TransformerConfig, layer_number: int, softmax_scale: float | None) -> Any:
    from transformer_engine.pytorch import DotProductAttention

    heads = config.num_attention_heads // config.tensor_model_parallel_size
    groups = max(config.num_query_groups // config.tensor_model_parallel_size, 1)
    return DotProductAttention(
        heads,
        config.kv_channels,
        num_gqa_groups=groups,
        attention_dropout=0.0,
        qkv_format="thd",
        attn_mask_type="padding_causal_bottom_right",
        softmax_scale=softmax_scale,
        layer_number=layer_number,
    )


def sdpa(query: Tensor, key: Tensor, value: Tensor, params: StreamParams, scale: float | None) -> Tensor:
    """[T, 1, H, W] and twice [T, 1, query groups, W] -> [T, 1, H, W]; padding rows give 0."""
    q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # [1, heads, T, W]
    outputs = []
    covered = 0
    for segment, mask in zip(params.segments, params.masks, strict=True):
        covered = segment.end
        output = scaled_dot_product_attention(
            q[:, :, segment.start : segment.end],
            _with_prompt(k, segment),
            _with_prompt(v, segment),
            attn_mask=mask,
            is_causal=mask is None,
            scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        outputs.append(output)
    if covered < query.shape[0]:
        # zero, but part of the graph: a micro-batch without a single group must still reach every parameter
        outputs.append(q[:, :, covered:] * 0)
    return torch.cat(outputs, 2).permute(2, 0, 1, 3)


def _with_prompt(x: Tensor, segment: Segment) -> Tensor:
    """The prompt's rows and the segment's own, [1, heads, prefix + queries, W]; the backward pass adds the slices."""
    own = x[:, :, segment.start : segment.end]
    if segment.prefix_end == segment.prefix_start:
        return own
    return torch.cat([x[:, :, segment.prefix_start : segment.prefix_end], own], 2)
