"""Multi-head latent attention over a packed stream. DeepSeek-V2, section 2.1 (2405.04434).

Megatron-Core's own module counts positions from the first row of the stream. Without Transformer Engine it also leaves
the rotary key's gradient, to which all heads contribute, unsummed over tensor-parallel ranks. So the way from hidden
states to queries, keys and values is done here; weights, checkpoint keys and output are Megatron-Core's.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules
from torch import Tensor

from megadpo.convert.shape import LatentAttention


def latent_options(latent: LatentAttention) -> dict[str, Any]:
    """Megatron-Core's settings of latent attention, beside those of any model."""
    return {
        "multi_latent_attention": True,
        "qk_layernorm": True,
        "q_lora_rank": latent.query_rank,
        "kv_lora_rank": latent.key_value_rank,
        "qk_head_dim": latent.query_key_width,
        "qk_pos_emb_head_dim": latent.rotary_width,
        "v_head_dim": latent.value_width,
        "rope_type": "rope",
        "rotary_scaling_factor": 1.0,
    }


def use_latent_attention(layer: TransformerLayerSubmodules, latent: LatentAttention, norm: type, te: bool) -> None:
    """Complete the spec of a layer of Megatron-Core's latent attention. norm: the class of norms, where they are
    not Transformer Engine's layers (te), which bring them."""
    attention = layer.self_attention
    attention.module = LatentSelfAttention
    attention.params = {**attention.params, "latent": latent}
    if te:
        return
    attention.submodules.q_layernorm = attention.submodules.kv_layernorm = norm
    layer.sharded_state_dict_keys_map = {  # the keys of Transformer Engine's layers
        "self_attention.q_layernorm.": "self_attention.linear_q_up_proj.layer_norm_",
        "self_attention.kv_layernorm.": "self_attention.linear_kv_up_proj.layer_norm_",
        "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
    }


class LatentSelfAttention(MLASelfAttention):
    """Megatron-Core's module with positions from the stream."""

    def __init__(self, *args: Any, latent: LatentAttention, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.interleaved = latent.interleaved
        self.rotary_pos_emb = None  # positions come with the stream

    def get_query_key_value_tensors(
        self,
        hidden_states: Tensor,
        key_value_states: None = None,
        position_ids: None = None,
        packed_seq_params: Any = None,
        inference_context: None = None,
        **_: Any,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """hidden [T, 1, D] (T / tensor ranks under sequence parallelism) -> query and key [T, 1, H, W], value
        [T, 1, H, value width], for all T rows and this rank's heads; and the vectors that they come from.
        """
        config, heads = self.config, self.num_attention_heads_per_partition
        small_query = hidden_states
        if config.q_lora_rank is None:
            query, _bias = self.linear_q_proj(hidden_states)
        else:
            small_query = self.q_layernorm(self._small(self.linear_q_down_proj(hidden_states)[0], config.q_lora_rank))
            query, _bias = self.linear_q_up_proj(small_query)
        width = config.kv_lora_rank + config.qk_pos_emb_head_dim
        joint, _bias = self.linear_kv_down_proj(hidden_states)
        if joint.shape[-1] == width:  # Transformer Engine: not split over ranks, but over the sequence
            small, rotary_key = joint.split([config.kv_lora_rank, config.qk_pos_emb_head_dim], -1)
            if config.sequence_parallel:
                rotary_key = gather_from_sequence_parallel_region(rotary_key, group=self.tp_group)
        else:
            joint = gather_from_tensor_model_parallel_region(joint, group=self.tp_group)
            small, rotary_key = joint.split([config.kv_lora_rank, config.qk_pos_emb_head_dim], -1)
            if config.sequence_parallel:
                small = scatter_to_sequence_parallel_region(small, group=self.tp_group)
            # Each rank's heads give a part of its gradient; the sum of all goes on to every rank.
            rotary_key = copy_to_tensor_model_parallel_region(rotary_key, group=self.tp_group)
        small = self.kv_layernorm(small)
        key_value, _bias = self.linear_kv_up_proj(small)

        query = query.unflatten(-1, (heads, config.qk_head_dim + config.qk_pos_emb_head_dim))
        key_value = key_value.unflatten(-1, (heads, config.qk_head_dim + config.v_head_dim))
        query, rotary_query = query.split([config.qk_head_dim, config.qk_pos_emb_head_dim], -1)
        key, value = key_value.split([config.qk_head_dim, config.v_head_dim], -1)
        rotary = packed_seq_params.rotary
        rotary_query = rotate(rotary_query, rotary, self.interleaved)
        rotary_key = rotate(rotary_key[:, :, None], rotary, self.interleaved).expand(-1, -1, heads, -1)
        return torch.cat([query, rotary_query], -1), torch.cat([key, rotary_key], -1), value, small_query, small

    def _small(self, values: Tensor, width: int) -> Tensor:
        """[.., width], of which this rank may have computed a part: whole, under sequence parallelism of its rows."""
        if values.shape[-1] == width:
            return values
        values = gather_from_tensor_model_parallel_region(values, group=self.tp_group)
        if self.config.sequence_parallel:
            values = scatter_to_sequence_parallel_region(values, group=self.tp_group)
        return values


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor], interleaved: bool) -> Tensor:
    """x [T, 1, heads, W] turned by the angles of (cosines, sines), each [T, 1, 1, W / 2].

    Pairs are neighbours where `interleaved`, else channel i and i + W / 2; they come out as halves both times, which
    changes no product of a query and a key.
    """
    cosine, sine = (part.to(x.dtype) for part in rotary)
    one, two = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, -1)
    return torch.cat([one * cosine - two * sine, two * cosine + one * sine], -1)
