"""Attention over streams whose prompts stand once: Transformer Engine's (cuDNN's and FlashAttention's) and torch's
kernels against the segment-by-segment path in float64."""

import os
from typing import Any

import pytest
import torch
from needs import wheel
from processes import on_gpus
from tiny import random_groups

from megadpo.data.batch import pack

KERNELS = {
    "varlen": {},
    "te-cudnn": {"NVTE_FLASH_ATTN": "0", "NVTE_UNFUSED_ATTN": "0"},
    "te-flash": {"NVTE_FUSED_ATTN": "0", "NVTE_UNFUSED_ATTN": "0"},
}


def attention(device: torch.device, kernel: str) -> list[list[torch.Tensor]]:
    """Output and gradients of [sdpa in float64, sdpa in bfloat16, the kernel]."""
    os.environ.update(KERNELS[kernel])
    from megatron.core.transformer import TransformerConfig

    from megadpo.config import ParallelConfig
    from megadpo.convert.shape import ModelShape
    from megadpo.model.attention import SegmentAttention, sdpa, stream_params
    from megadpo.parallel.context import grid

    backend: Any = kernel.partition("-")[0]
    store = random_groups(9, responses=3, longest_prompt=90, longest_response=60)
    batch = pack(store, range(9), 2048, None).to(device)
    generator = torch.Generator(device).manual_seed(0)
    tensors = [torch.randn(2048, 1, n, 64, generator=generator, device=device).bfloat16() for n in (8, 2, 2)]
    weight = torch.randn(batch.used, 512, generator=generator, device=device)
    found = []
    with grid(ParallelConfig(), device, 0):
        config = TransformerConfig(
            num_layers=1, hidden_size=512, num_attention_heads=8, num_query_groups=2, bf16=True, attention_dropout=0.0,
            params_dtype=torch.bfloat16,
        )  # fmt: skip
        shape = ModelShape(
            "llama", num_layers=1, hidden_size=512, ffn_hidden_size=1024, num_attention_heads=8, num_query_groups=2,
            kv_channels=64, vocab_size=67,
        )  # fmt: skip
        ours = SegmentAttention(config, 1, None, "self", shape=shape, backend=backend)
        for dtype, how in ((torch.float64, "sdpa"), (torch.bfloat16, "sdpa"), (torch.bfloat16, backend)):
            q, k, v = (x.to(dtype).requires_grad_() for x in tensors)
            params = stream_params(batch, how)
            if how == "sdpa":
                segments = zip(params.segments, params.masks[None], strict=True)
                output = sdpa(q, k, v, segments, None).reshape(2048, 512)
            else:
                output = ours(q, k, v, None, packed_seq_params=params).reshape(2048, 512)
            (output[: batch.used].double() * weight).sum().backward()
            found.append([x.double().cpu() for x in (output[: batch.used].detach(), q.grad, k.grad, v.grad)])
    return found


@pytest.mark.parametrize("kernel", list(KERNELS))
def test_it_is_no_further_from_float64_than_the_plain_way(kernel: str) -> None:
    if kernel.startswith("te"):
        wheel("transformer_engine")
    if kernel == "te-flash":
        wheel("flash_attn")
    [[exact, plain, ours]] = on_gpus(1, attention, kernel)
    for name, right, one, other in zip(("output", "dq", "dk", "dv"), exact, plain, ours, strict=True):
        noise, off = (float((x - right).norm() / right.norm()) for x in (one, other))
        assert off < 2 * noise, f"{name}: {off:.2e}, segment by segment {noise:.2e}"
