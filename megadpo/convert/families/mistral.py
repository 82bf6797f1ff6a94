"""Mistral 7B, NeMo and what is built like them (MistralForCausalLM): Llama with a sliding window."""

from __future__ import annotations

from dataclasses import replace

from megadpo.convert.config_json import ConfigJson
from megadpo.convert.families.blocks import EMBEDDING, LLAMA_LAYERS, OUTPUT
from megadpo.convert.families.common import read_common, window_everywhere
from megadpo.convert.rope_json import read_rope
from megadpo.convert.shape import ModelShape
from megadpo.convert.tables import Family


def read_shape(config: ConfigJson) -> ModelShape:
    """A config.json without sliding_window is refused: transformers takes 4096 then, whatever was meant."""
    if "sliding_window" not in config.values:
        raise config.wrong("sliding_window", "a whole number, or null where every layer sees all")
    shape = read_common(config, "mistral", read_rope(config, default_theta=10000.0), knows=("sliding_window",))
    return replace(shape, window=window_everywhere(config, shape.num_layers))


MISTRAL = Family(
    name="mistral",
    architecture="MistralForCausalLM",
    read_shape=read_shape,
    weights=(*EMBEDDING, *LLAMA_LAYERS, *OUTPUT),
    ignored=r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
)
