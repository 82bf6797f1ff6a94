"""The fields of config.json that every family has, and those that a family must know before it lets them pass."""

from __future__ import annotations

from typing import Literal

from megadpo.convert.config_json import ConfigJson
from megadpo.convert.shape import ModelShape, RopeScaling, Window

FOREIGN = (
    "quantization_config",
    "sliding_window",
    "layer_types",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "embedding_multiplier",
    "residual_multiplier",
    "attention_multiplier",
    "logits_scaling",
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
)
"""Fields that change what a model computes. A family that carries one names it in `knows`; elsewhere it is refused."""
ACTIVATIONS: dict[str, Literal["silu", "gelu_tanh"]] = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


def read_common(
    config: ConfigJson,
    family: str,
    rope: tuple[float, RopeScaling | None],
    *,
    knows: tuple[str, ...] = (),
    head_dim: int | None = None,
    tied: bool = False,
    activation: tuple[str, str] = ("hidden_act", "silu"),
) -> ModelShape:
    """The shape as far as all families agree; a family changes what it has of its own with dataclasses.replace.

    rope: as `read_rope` gives it. knows: fields of FOREIGN that the family reads itself; auto_map where published
    folders bring code of their own, which is never run, for a model that transformers has, too. head_dim, tied: the
    family's defaults (transformers leaves out of config.json what equals its base class). activation: field and
    required value. Dropout and the like are not read: they belong to training, not to the model. ModelError names the
    field.
    """
    config.require(*activation)
    for field in FOREIGN:
        if field not in knows:
            config.require(field)
    if "auto_map" not in knows:
        config.refuse_custom_code()
    hidden, heads = config.integer("hidden_size"), config.integer("num_attention_heads", at_most=4096)
    groups = config.integer("num_key_value_heads", default=heads)
    if heads % groups:
        raise config.wrong("num_key_value_heads", f"a divisor of num_attention_heads ({heads})")
    if config.get("head_dim") is None and head_dim is None and hidden % heads:
        raise config.wrong("hidden_size", f"a multiple of num_attention_heads ({heads}), or head_dim given")
    head = config.integer("head_dim", default=head_dim or hidden // heads)
    if head % 2:
        raise config.wrong("head_dim", f"an even number (here it would be {head}): rotary embedding turns pairs")
    theta, scaling = rope
    return ModelShape(
        family=family,
        num_layers=config.integer("num_hidden_layers", at_most=4096),
        hidden_size=hidden,
        ffn_hidden_size=config.integer("intermediate_size"),
        num_attention_heads=heads,
        num_query_groups=groups,
        kv_channels=head,
        vocab_size=config.integer("vocab_size"),
        max_position_embeddings=config.integer("max_position_embeddings"),
        layernorm_epsilon=config.number("rms_norm_eps"),
        rotary_base=theta,
        rope_scaling=scaling,
        tied=config.flag("tie_word_embeddings", default=tied),
        activation=ACTIVATIONS[activation[1]],
    )


def read_window(config: ConfigJson, layers: int, usual: tuple[bool, ...]) -> Window | None:
    """`sliding_window` on the layers that `layer_types` names, or where that is absent on the family's `usual` ones."""
    named = config.get("layer_types")
    kinds = ["sliding_attention" if x else "full_attention" for x in usual] if named is None else named
    if (
        not isinstance(kinds, list)
        or len(kinds) != layers
        or any(kind not in ("sliding_attention", "full_attention") for kind in kinds)
    ):
        raise config.wrong("layer_types", f"sliding_attention or full_attention for each of the {layers} layers")
    windowed = tuple(kind == "sliding_attention" for kind in kinds)
    return Window(config.integer("sliding_window"), windowed) if any(windowed) else None


def window_everywhere(config: ConfigJson, layers: int) -> Window | None:
    """`sliding_window` on every layer; null or absent means none."""
    if config.get("sliding_window") is None:
        return None
    return Window(config.integer("sliding_window"), (True,) * layers)
