"""Core attention over a packed stream: every segment sees its group's prompt and itself, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from megadpo.data.batch import Segment


@dataclass
class StreamParams(PackedSeqParams):
    """How one stream is cut, carried through Megatron-Core to `SegmentAttention`.

    `qkv_format` is sbhd, so Megatron-Core applies the rotary embedding per token (positions are ours) and never reads
    sequence lengths back from the device. Its own attention does not know the two fields below.
    """

    segments: tuple[Segment, ...] = ()
    masks: tuple[Tensor | None, ...] = ()
    """Per segment bool [queries, keys], True where attended; None where plain causal is meant."""


def stream_params(segments: tuple[Segment, ...], device: torch.device) -> StreamParams:
    """Build the masks once per micro-batch; every layer uses them."""
    masks = tuple(
        None if segment.prefix_end == segment.prefix_start else _bottom_right(segment, device)
        for segment in segments
    )
    return StreamParams(qkv_format="sbhd", segments=segments, masks=masks)


def _bottom_right(segment: Segment, device: torch.device) -> Tensor:
    queries = segment.end - segment.start
    prefix = segment.prefix_end - segment.prefix_start
    return torch.ones(queries, prefix + queries, dtype=torch.bool, device=device).tril(prefix)


class SegmentAttention(MegatronModule):
    """Megatron-Core's `core_attention`, by torch's scaled_dot_product_attention, one call per segment.

    Exact on every device; the cost is the sum of the segments' own areas, never quadratic in the stream.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
    ) -> None:
        super().__init__(config=config)
        self.softmax_scale = softmax_scale

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
        """query [T, 1, H, W], key and value [T, 1, query groups, W] -> [T, 1, H * W]. Padding rows give 0."""
        assert packed_seq_params is not None
        # to [1, heads, T, W]
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        outputs = []
        covered = 0
        for segment, mask in zip(packed_seq_params.segments, packed_seq_params.masks, strict=True):
            covered = segment.end
            output = scaled_dot_product_attention(
                q[:, :, segment.start : segment.end],
                _keys(k, segment),
                _keys(v, segment),
                attn_mask=mask,
                is_causal=mask is None,
                scale=self.softmax_scale,
                enable_gqa=q.shape[1] != k.shape[1],
            )
            outputs.append(output)
        if covered < query.shape[0]:
            # zero, but part of the graph: a micro-batch without a single group must still reach every parameter
            outputs.append(q[:, :, covered:] * 0)
        return torch.cat(outputs, 2).permute(2, 0, 1, 3).reshape(query.shape[0], 1, -1)


def _keys(x: Tensor, segment: Segment) -> Tensor:
    """The prompt's rows and the segment's own, [1, heads, prefix + queries, W]; the backward pass adds the slices."""
    own = x[:, :, segment.start : segment.end]
    if segment.prefix_end == segment.prefix_start:
        return own
    return torch.cat([x[:, :, segment.prefix_start : segment.prefix_end], own], 2)
