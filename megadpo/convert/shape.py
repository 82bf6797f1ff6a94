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
class Experts:
    """A mixture of experts in place of the MLP, in some layers or all."""

    count: int
    """Routed experts of a layer."""
    per_token: int
    """How many of them a token goes to."""
    ffn_hidden_size: int
    """MLP size of one expert."""
    layers: tuple[bool, ...]
    """Per layer of the model: experts (True) or the plain MLP."""
    score: Literal["softmax", "sigmoid"] = "softmax"
    """What turns router logits into scores."""
    normalised: bool = True
    """Whether a token's chosen scores are divided by their sum."""
    scaling: float = 1.0
    """Factor on the chosen scores."""
    groups: int = 1
    """Experts stand in so many equal groups, of which a token uses `groups_per_token`."""
    groups_per_token: int = 1
    group_score: int = 1
    """A group is worth the sum of its so many best scores."""
    selection_bias: bool = False
    """A frozen float32 number per expert that is added to the scores for choosing, not for weighing."""
    router_float32: bool = False
    """Whether the family computes router logits in float32, whatever the model's dtype."""
    shared_ffn_hidden_size: int = 0
    """MLP size of what every token goes through besides; 0 where there is nothing."""
    bias: bool = False
    """Biases in router and experts."""
    clamp: float | None = None
    """gpt-oss: gate and up projections are cut off at this (the gate only above), and up gets 1 added."""


@dataclass(frozen=True)
class LatentAttention:
    """Multi-head latent attention: queries, keys and values out of small vectors. DeepSeek-V2, section 2.1
    (2405.04434).
    """

    query_rank: int | None
    """Width of the vector that queries come from; None where they come from the hidden state."""
    key_value_rank: int
    query_key_width: int
    """Width of a head's part without position."""
    rotary_width: int
    """Width of its part with position; keys share one over all heads."""
    value_width: int
    interleaved: bool = True
    """Rotary pairs are neighbours (2i, 2i + 1), not halves."""


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
    activation: Literal["silu", "gelu_tanh", "quick_gelu"] = "silu"
    """quick_gelu: x * sigmoid(1.702 x)."""
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
    sinks: bool = False
    """A trained number per head stands in every softmax of the attention beside the scores."""
    experts: Experts | None = None
    latent: LatentAttention | None = None
    """`kv_channels` is its value width, and `num_query_groups` all heads."""
    prediction_layers: int = 0
    """Layers of the folder behind the last one, for guessing further tokens: neither read, nor trained, nor written."""
    head: Literal["vocabulary", "scalar", "new scalar"] = "vocabulary"
    """What stands on the trunk: an output layer over the vocabulary; a reward model's one row; or the latter over a
    language model's trunk, beginning with zeros."""

    @property
    def pair_multiplications(self) -> float:
        """Of attention in one layer, per pair of rows of which one attends to the other: with keys, and with values."""
        latent = self.latent
        if latent is None:
            return 2 * self.num_attention_heads * self.kv_channels
        return self.num_attention_heads * (latent.query_key_width + latent.rotary_width + latent.value_width)

    @property
    def linear_multiplications(self) -> float:
        """Of a layer's linear layers per row, the mean over layers with and without experts; of experts, those that a
        token goes to."""
        heads, hidden = self.num_attention_heads, self.hidden_size
        latent = self.latent
        if latent is None:
            projections = 2 * hidden * (heads + self.num_query_groups) * self.kv_channels
        else:
            head = latent.query_key_width + latent.rotary_width
            rank = latent.query_rank
            projections = heads * head * hidden if rank is None else rank * (hidden + heads * head)
            projections += hidden * (latent.key_value_rank + latent.rotary_width)
            projections += heads * latent.key_value_rank * (latent.query_key_width + latent.value_width)
            projections += heads * latent.value_width * hidden
        mlp = float(self.ffn_hidden_size)
        if self.experts is not None:
            active = self.experts.per_token * self.experts.ffn_hidden_size + self.experts.shared_ffn_hidden_size
            share = sum(self.experts.layers) / self.num_layers
            mlp = share * (active + self.experts.count / 3) + (1 - share) * mlp
        return projections + 3 * hidden * mlp
