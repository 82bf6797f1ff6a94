"""Core attention over a packed stream: every segment sees its group's prompt and itself, and nothing else. In layers
with a window it sees the last so many of those rows: a segment's rows follow the prompt's in position, too.

Three back ends behind one module, made to give the same numbers (te and varlen have not run yet, for want of a GPU);
none is quadratic in the stream where groups are short.

* sdpa: torch's scaled_dot_product_attention, a call per segment. Every device and dtype. With a soft cap on scores, or
  with sinks, which torch's fused kernels do not have (Transformer Engine's not for every shape), the same written out.
* varlen: torch's own variable-length flash attention, one call. CUDA, 16-bit.
* te: Transformer Engine's DotProductAttention in its packed (thd) format, one call. CUDA, 16-bit.

Windows run in sdpa and varlen only: flash attention aligns a window at the bottom right of every segment, as the layout
below needs it; of Transformer Engine's kernels that is not known for segments of different lengths.

For the last two, prompts' keys and values are gathered once per response, so that segment i has cu_keys[i + 1] -
cu_keys[i] keys that end where its queries end: causal, aligned at the bottom right.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from megadpo_kernels import Backend as KernelBackend
from megadpo_kernels.prefix import Copies, duplicate
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from megadpo.convert.shape import ModelShape
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
    masks: dict[int | None, tuple[Tensor | None, ...]] = field(default_factory=dict)
    """sdpa: by window (None: no window) and segment bool [queries, keys], True where attended; None where plain causal
    is meant."""
    varlen: Varlen | None = None
    rotary: tuple[Tensor, Tensor] | None = None
    """Cosines and sines by row, for latent attention, which rotates inside (model/latent.py)."""


def choose_backend(device: torch.device, dtype: torch.dtype, shape: ModelShape) -> tuple[Backend, str]:
    """The fastest that is there and computes this model exactly, and why not a faster one (for the log)."""
    if device.type != "cuda":
        return "sdpa", "on a CPU"
    if dtype == torch.float32:
        return "sdpa", "slow: the others are 16-bit only"
    if shape.scores.soft_cap or shape.sinks:
        return "sdpa", f"slow: no other has {'a soft cap' if shape.scores.soft_cap else 'sinks'}"
    if mcore_fixes.have_te() and not shape.window:
        return "te", "Transformer Engine"
    why = "this model has windows" if mcore_fixes.have_te() else "no Transformer Engine"
    if missing := varlen_lacks():
        return "sdpa", f"slow: {why}, and varlen_attn of torch {torch.__version__} has no {', '.join(missing)}"
    return "varlen", why


def varlen_lacks() -> list[str]:
    """What torch's variable-length attention of this version cannot be told; torch grew it release by release."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return ["varlen_attn"]
    return sorted({"scale", "window_size", "enable_gqa"} - set(inspect.signature(varlen_attn).parameters))


def stream_params(batch: PackedBatch, backend: Backend, window: int | None = None) -> StreamParams:
    """What the back end needs of a micro-batch, made once; every layer uses it. window: that of the layers that have
    one."""
    device = batch.tokens_T.device
    if backend == "sdpa":
        masks = {size: tuple(_mask(segment, size, device) for segment in batch.segments) for size in {None, window}}
        return StreamParams(qkv_format="sbhd", segments=batch.segments, masks=masks)
    layout = varlen_layout(batch.segments, len(batch.tokens_T), device)
    return StreamParams(qkv_format="sbhd", segments=batch.segments, varlen=layout)


def _mask(segment: Segment, window: int | None, device: torch.device) -> Tensor | None:
    """Bottom-right causal where there is a prompt in front; with a window, the last `window` keys of those."""
    queries = segment.end - segment.start
    prefix = segment.prefix_end - segment.prefix_start
    short = window is None or prefix + queries <= window
    if prefix == 0 and short:
        return None
    mask = torch.ones(queries, prefix + queries, dtype=torch.bool, device=device).tril(prefix)
    return mask if short or window is None else mask.triu(prefix - window + 1)


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

    def __init__(  # noqa: PLR0913  what Megatron-Core gives every core attention, and three of ours
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        shape: ModelShape,
        backend: Backend = "sdpa",
        kernels: KernelBackend = "auto",
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
        **latent_widths: int,
    ) -> None:
        """layer_number: over all pipeline stages, from 1. softmax_scale: None for 1 / sqrt(W). latent_widths: what
        Megatron-Core's latent attention gives beside; they are in the shape."""
        super().__init__(config=config)
        self.backend, self.kernels = backend, kernels
        self.softmax_scale = shape.scores.scale if shape.latent else softmax_scale
        self.soft_cap = shape.scores.soft_cap
        windowed = shape.window is not None and shape.window.layers[layer_number - 1]
        self.window = shape.window.size if shape.window is not None and windowed else None
        assert backend == "sdpa" or not (self.soft_cap or shape.sinks), f"{backend} attention has no soft cap, no sinks"
        assert backend != "te" or not self.window, "windows run in sdpa and varlen attention"
        self.softmax_offset: torch.nn.Parameter | None = None
        if shape.sinks:  # Megatron-Core's name for them
            heads = config.num_attention_heads // config.tensor_model_parallel_size
            device = None if config.use_cpu_initialization else torch.cuda.current_device()
            self.softmax_offset = torch.nn.Parameter(torch.empty(heads, dtype=config.params_dtype, device=device))
        if backend == "te":
            self.te = _transformer_engine(config, shape, layer_number, self.softmax_scale)

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
        """query [T, 1, H, W], key and value [T, 1, query groups, W] -> [T, 1, H * W]. In latent attention the values,
        and so the result, have a width of their own."""
        assert packed_seq_params is not None
        if self.backend == "sdpa":
            masks = packed_seq_params.masks[self.window]
            segments = zip(packed_seq_params.segments, masks, strict=True)
            output = sdpa(query, key, value, segments, self.softmax_scale, self.soft_cap, self.softmax_offset)
        else:
            layout = packed_seq_params.varlen
            assert layout is not None
            kernel = self._te if self.backend == "te" else self._varlen
            k, v = (duplicate(x[:, 0], layout.copies, self.kernels) for x in (key, value))
            output = kernel(query[:, 0], k, v, layout)
        return output.reshape(query.shape[0], 1, -1)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Sinks are split over tensor-parallel ranks as the heads are."""
        kept = self.state_dict(prefix="", keep_vars=True) if self.softmax_offset is not None else {}
        return make_sharded_tensors_for_checkpoint(kept, prefix, {"softmax_offset": 0}, sharded_offsets)

    def _varlen(self, q: Tensor, k: Tensor, v: Tensor, layout: Varlen) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        width = v.shape[-1]
        output = varlen_attn(
            q,
            k,
            pad(v, (0, q.shape[-1] - width)),  # flash attention wants one width; zeros add nothing
            layout.cu_queries,
            layout.cu_keys,
            layout.longest_query,
            layout.longest_key,
            scale=self.softmax_scale,
            # causal; flash attention aligns it at the bottom right, and does not count the token itself
            window_size=(self.window - 1 if self.window else -1, 0),
            enable_gqa=q.shape[1] != k.shape[1],
        )
        assert isinstance(output, Tensor)
        return output[..., :width]

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


def _transformer_engine(
    config: TransformerConfig, shape: ModelShape, layer_number: int, softmax_scale: float | None
) -> Any:
    from transformer_engine.pytorch import DotProductAttention

    latent = shape.latent
    heads = config.num_attention_heads // config.tensor_model_parallel_size
    groups = max(config.num_query_groups // config.tensor_model_parallel_size, 1)
    return DotProductAttention(
        heads,
        (latent.query_key_width + latent.rotary_width, latent.value_width) if latent else shape.kv_channels,
        num_gqa_groups=groups,
        attention_dropout=0.0,
        qkv_format="thd",
        attn_mask_type="padding_causal_bottom_right",
        softmax_scale=softmax_scale,
        layer_number=layer_number,
    )


def sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Iterable[tuple[Segment, Tensor | None]],
    scale: float | None,
    soft_cap: float | None = None,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """[T, 1, H, W], [T, 1, query groups, W], values as wide or not -> [T, 1, H, width of a value]; padding rows give 0.
    segments: with their masks, as in StreamParams."""
    q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # [1, heads, T, W]
    outputs = []
    covered = 0
    for segment, mask in segments:
        covered = segment.end
        own = q[:, :, segment.start : segment.end]
        if soft_cap or sinks_H is not None:
            keys, values = _with_prompt(k, segment), _with_prompt(v, segment)
            output = _written_out(own, keys, values, mask, scale, soft_cap, sinks_H)
        else:
            output = scaled_dot_product_attention(
                own,
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
        zero = (q[:, :, covered:] * 0).sum(-1, keepdim=True)
        if sinks_H is not None:
            zero = zero + sinks_H[:, None, None] * 0
        outputs.append(zero.expand(-1, -1, -1, v.shape[-1]))
    return torch.cat(outputs, 2).permute(2, 0, 1, 3)


def _written_out(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float | None,
    soft_cap: float | None,
    sinks_H: Tensor | None,
) -> Tensor:
    """Attention with scores soft_cap * tanh(scale * q k / soft_cap) (Gemma 2, 2408.00118, section 2), and a number per
    head that stands among the scores and has no value (gpt-oss; Xiao et al. 2023, 2309.17453, equation 2 is its form
    with 0); scores and softmax in float32. [1, H, Q, W] and twice [1, query groups, K, W] -> [1, H, Q, W]."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = (q @ k.transpose(2, 3)).float() * (q.shape[-1] ** -0.5 if scale is None else scale)
    if soft_cap:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    scores = scores.masked_fill(~mask, -torch.inf)
    if sinks_H is not None:
        sinks = sinks_H.float()[None, :, None, None].expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sinks], -1)
    return scores.softmax(-1)[..., : k.shape[2]].to(v.dtype) @ v


def _with_prompt(x: Tensor, segment: Segment) -> Tensor:
    """The prompt's rows and the segment's own, [1, heads, prefix + queries, W]; the backward pass adds the slices."""
    own = x[:, :, segment.start : segment.end]
    if segment.prefix_end == segment.prefix_start:
        return own
    return torch.cat([x[:, :, segment.prefix_start : segment.prefix_end], own], 2)
