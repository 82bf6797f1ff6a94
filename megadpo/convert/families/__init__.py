"""The model families that megadpo reads and writes. A new one is a file like llama.py, named in FAMILIES."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

from megadpo.convert.config_json import ConfigJson
from megadpo.convert.families.deepseek_v2 import DEEPSEEK_V2
from megadpo.convert.families.deepseek_v3 import DEEPSEEK_V3
from megadpo.convert.families.gemma import GEMMA2, GEMMA3
from megadpo.convert.families.gpt_oss import GPT_OSS
from megadpo.convert.families.llama import LLAMA
from megadpo.convert.families.mistral import MISTRAL
from megadpo.convert.families.mixtral import MIXTRAL
from megadpo.convert.families.olmo2 import OLMO2
from megadpo.convert.families.phi3 import PHI3
from megadpo.convert.families.qwen import QWEN2, QWEN3
from megadpo.convert.families.qwen3_moe import QWEN3_MOE
from megadpo.convert.shape import ModelShape
from megadpo.convert.tables import Family, MegatronTensor, Rows, expand
from megadpo.errors import ModelError

HEAD, SCORE = "output_layer.weight", "score.weight"
"""Megatron-Core's key of whatever head there is, and transformers' name of a scalar one."""

FAMILIES: tuple[Family, ...] = (
    *(LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA2, GEMMA3, OLMO2, PHI3),
    *(MIXTRAL, QWEN3_MOE, DEEPSEEK_V2, DEEPSEEK_V3, GPT_OSS),
)


def read_shape(folder: str | Path) -> ModelShape:
    """The model in a Hugging Face folder, from its config.json alone.

    ModelError names the field where the architecture is unknown or a field asks for what would not be carried
    exactly.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise ModelError(f"{folder} is not a folder: give a Hugging Face model folder (config.json, safetensors)")
    config = ConfigJson(folder)
    config.dtype()  # a wrong one would be found by the export, after the training
    known = {family.architecture: family for family in FAMILIES}
    reward = {reward_architecture(family): family for family in FAMILIES}
    names = config.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or names[0] not in (*known, *reward):
        raise config.wrong("architectures", f"one of {', '.join(sorted(known))}, or of {', '.join(sorted(reward))}")
    if names[0] in reward:
        _require_one_label(config)
        return replace(reward[names[0]].read_shape(config), tied=False, head="scalar")
    return known[names[0]].read_shape(config)


def _require_one_label(config: ConfigJson) -> None:
    """id2label names the labels; num_labels counts them in configs without it; two where neither is there."""
    field, labels = "id2label", config.get("id2label")
    if labels is None:
        field, labels = "num_labels", range(config.integer("num_labels", default=2))
    if not isinstance(labels, dict | range) or len(labels) != 1:
        raise config.wrong(field, "one label: a reward model gives one number")


def reward_architecture(family: Family) -> str:
    """What transformers calls the family's trunk with a scalar head."""
    trunk = family.architecture.removesuffix("ForCausalLM")
    text = "Text" if family.name.endswith("_text") else ""  # Gemma 3 has two: with images, and for text alone
    return f"{trunk}{text}ForSequenceClassification"


def with_head(shape: ModelShape, head: Literal["logprob", "scalar"], folder: str | Path) -> ModelShape:
    """The model with the head that an objective needs. Raises ModelError where a reward model has no such head."""
    if head == "scalar":
        return shape if shape.head == "scalar" else replace(shape, tied=False, head="new scalar")
    if shape.head == "scalar":
        raise ModelError(
            f"{folder}: is a reward model, and the objective needs a language model; give one, or a loss_type for "
            "reward models (docs/reward_model.md)"
        )
    return shape


def family_of(shape: ModelShape) -> Family:
    """The family that a shape came from."""
    return next(family for family in FAMILIES if family.name == shape.family)


def megatron_tensors(shape: ModelShape) -> dict[str, MegatronTensor]:
    """Every Megatron tensor of the model by its checkpoint key, in the order of the network."""
    tensors = expand(family_of(shape).weights, shape)
    if shape.head == "vocabulary":
        return tensors
    tensors.pop(HEAD, None)
    return tensors | {HEAD: MegatronTensor(HEAD, (1, shape.hidden_size), (Rows(SCORE, 0, 1),), padded=False)}
