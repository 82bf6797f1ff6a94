"""Multi-head latent attention over a packed stream. DeepSeek-V2, section 2.1 (2405.04434).

Megatron-Core's own module counts positions from the first row of the stream, and does not sum the gradient of the
rotary key, which all heads share, over the tensor-parallel ranks unless sequence parallelism and Transformer Engine do
it by the way. Here only the way from hidden states to queries, keys and values is new.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from torch import Tensor

from megadpo.convert.shape import LatentAttention


def latent_options(latent: LatentAttention, scale_factor: float) -> dict[str, Any]:
    """Megatron-Core's settings of latent attention. scale_factor: on the usual 1 / sqrt(width) of a head."""
    return {
        "multi_latent_attention": True,
        "qk_layernorm": True,
        "q_lora_rank": latent.query_rank,
        "kv_lora_rank": latent.key_value_rank,
        "qk_head_dim": latent.query_key_width,
        "qk_pos_emb_head_dim": latent.rotary_width,
        "v_head_dim": latent.value_width,
        "rope_type": "rope",
    }


class LatentSelfAttention(MLASelfAttention):
    """Megatron-Core's module with our positions."""
