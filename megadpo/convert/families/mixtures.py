"""Table rows and fields that families with experts share."""

from __future__ import annotations

from dataclasses import replace

from megadpo.convert.config_json import ConfigJson
from megadpo.convert.families.blocks import GATED_MLP, HF, LAYER, MLP, MLP_NORM
from megadpo.convert.shape import Experts, ModelShape
from megadpo.convert.tables import Weight

EXPERT = MLP + "experts.experts.{expert}."
SHARED = MLP + "shared_experts."
LARGEST = 4096
"""Experts of a layer; more is a damaged config.json."""


def has_experts(shape: ModelShape, layer: int) -> bool:
    return shape.experts is not None and shape.experts.layers[layer]


def is_plain(shape: ModelShape, layer: int) -> bool:
    return not has_experts(shape, layer)


PLAIN_MLP = tuple(replace(row, of_layer=is_plain) for row in (*MLP_NORM, *GATED_MLP))
"""Norm and MLP of the layers without experts."""
EXPERT_NORM = (
    Weight(LAYER + "pre_mlp_layernorm.weight", HF + "post_attention_layernorm.weight", "D", of_layer=has_experts),
)


def router(name: str) -> tuple[Weight, ...]:
    """The router, whose Hugging Face name below the layer is `name`."""
    return (Weight(MLP + "router.weight", f"{HF}{name}.weight", "E D", of_layer=has_experts),)


def gated(megatron: str, hf: str, width: str, gate: str, up: str, down: str) -> tuple[Weight, ...]:
    """The three matrices of an MLP of experts; `hf` is its name below the layer, `width` the letter of its size."""
    return (
        Weight(megatron + "linear_fc1.weight_w", f"{HF}{hf}{gate}.weight", f"{width} D", of_layer=has_experts),
        Weight(megatron + "linear_fc1.weight_v", f"{HF}{hf}{up}.weight", f"{width} D", of_layer=has_experts),
        Weight(megatron + "linear_fc2.weight", f"{HF}{hf}{down}.weight", f"D {width}", of_layer=has_experts),
    )


def routed(hf: str, gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj") -> tuple[Weight, ...]:
    """All routed experts."""
    return gated(EXPERT, hf + "experts.{expert}.", "X", gate, up, down)


SHARED_EXPERTS = tuple(
    replace(row, when=lambda s: s.experts is not None and s.experts.shared_ffn_hidden_size > 0)
    for row in gated(SHARED, "mlp.shared_experts.", "S", "gate_proj", "up_proj", "down_proj")
)


def read_counts(config: ConfigJson, *fields: str) -> tuple[int, int]:
    """(experts, experts per token): the first of `fields` that is there gives the number of experts (versions of
    transformers spell it differently); those that are there must agree.
    """
    given = [field for field in fields if config.get(field) is not None] or [fields[0]]
    counts = [config.integer(field, at_most=LARGEST) for field in given]
    if len(set(counts)) > 1:
        raise config.wrong(given[0], f"the value of {given[1]}, or only one of the two")
    return counts[0], config.integer("num_experts_per_tok", at_most=counts[0])


def grouped(config: ConfigJson, experts: Experts, group_score: int) -> Experts:
    """With the groups of experts that a token is limited to."""
    groups = config.integer("n_group", at_most=experts.count)
    used = config.integer("topk_group", at_most=groups)
    if experts.count % groups:
        raise config.wrong("n_group", f"a divisor of n_routed_experts ({experts.count})")
    size = experts.count // groups
    if size < group_score or size * used < experts.per_token:
        raise config.wrong(
            "n_group",
            f"groups of at least {group_score} experts, and num_experts_per_tok experts in topk_group of them",
        )
    return replace(experts, groups=groups, groups_per_token=used, group_score=group_score)
