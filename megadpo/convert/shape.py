"""What megadpo needs to know of a model, whatever family it comes from. No Megatron here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's frequency scaling (rope_type llama3) or linear interpolation (only `factor`)."""

    rope_type: str
    factor: float
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None


@dataclass(frozen=True)
class ModelShape:
    """A decoder with RMSNorm, RoPE, grouped-query attention and a gated SiLU MLP."""

    family: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    vocab_size: int
    max_position_embeddings: int
    layernorm_epsilon: float
    rotary_base: float
    rope_scaling: RopeScaling | None
    tied: bool
    """Embedding and output layer are one tensor."""
    qkv_bias: bool
    proj_bias: bool
    """Bias of the attention's output projection."""
    mlp_bias: bool

    @property
    def attended_pair_cost(self) -> float:
        """Multiplications of attention per attended pair of rows, over those of the linear layers per row."""
        query, key_value = (
            self.num_attention_heads * self.kv_channels,
            self.num_query_groups * self.kv_channels,
        )
        linear = self.hidden_size * (2 * query + 2 * key_value + 3 * self.ffn_hidden_size)
        return 2 * query / linear
