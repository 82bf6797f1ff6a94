"""What megadpo needs to know of a model, whatever family it comes from. No Megatron here.

A field with a default is one that some families do not have; the default is what Llama does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched: only the numbers that `rope_type` uses are given (model/rope.py)."""

    rope_type: str
    factor: float
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    attention_factor: float | None = None
    """yarn: cosines and sines are multiplied by this."""
    truncate: bool = True
    """yarn: whether the ends of the blended range are rounded outwards to whole channels."""


@dataclass(frozen=True)
class Norms:
    """Where the RMSNorms of a layer stand."""

    before: bool = True
    """In front of attention and of the MLP."""
    after: bool = False
    """Behind attention and behind the MLP, before the residual is added."""
    queries_keys: Literal["head", "projection"] | None = None
    """Over queries and over keys: one head at a time, or all heads together."""
    zero_centred: bool = False
    """Every norm multiplies by 1 + weight."""


@dataclass(frozen=True)
class Window:
    """Some layers attend only to the last `size` tokens, the token itself included."""

    size: int
    layers: tuple[bool, ...]
    """Per layer, whether the window applies."""


@dataclass(frozen=True)
class Scores:
    """What becomes of attention scores q k before the softmax: scale, then soft_cap * tanh(x / soft_cap)."""

    scale: float | None = None
    """None: 1 / sqrt(kv_channels)."""
    soft_cap: float | None = None


@dataclass(frozen=True)
class ModelShape:
    """A decoder with RMSNorm, RoPE, grouped-query attention and a gated MLP."""

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
    qkv_bias: bool = False
    proj_bias: bool = False
    """Bias of the attention's output projection."""
    mlp_bias: bool = False
    activation: Literal["silu", "gelu_tanh"] = "silu"
    norms: Norms = Norms()
    window: Window | None = None
    scores: Scores = Scores()
    rotary_percent: float = 1.0
    """The part of each head, from its first channel, that is rotated."""
    local_rotary_base: float | None = None
    """The base, unscaled, of layers with a window, where they have one of their own."""
    embedding_scale: float | None = None
    """Embeddings are multiplied by this, rounded to the model's dtype."""
    logit_soft_cap: float | None = None
    """Logits become soft_cap * tanh(logit / soft_cap)."""
    head: Literal["vocabulary", "scalar", "new scalar"] = "vocabulary"
    """What stands on the trunk: an output layer over the vocabulary; a reward model's one row; or the latter over a
    language model's trunk, beginning with zeros."""

    @property
    def attended_pair_cost(self) -> float:
        """Multiplications of attention per attended pair of rows, over those of the linear layers per row."""
        query, key_value = (
            self.num_attention_heads * self.kv_channels,
            self.num_query_groups * self.kv_channels,
        )
        linear = self.hidden_size * (2 * query + 2 * key_value + 3 * self.ffn_hidden_size)
        return 2 * query / linear
