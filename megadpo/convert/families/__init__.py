"""The model families that megadpo reads and writes. A new one is a file like llama.py, named in FAMILIES."""

from __future__ import annotations

from pathlib import Path

from megadpo.convert.config_json import ConfigJson
from megadpo.convert.families.deepseek import DEEPSEEK_V2, DEEPSEEK_V3
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
from megadpo.convert.tables import Family, MegatronTensor, expand
from megadpo.errors import ModelError

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
    known = {family.architecture: family for family in FAMILIES}
    names = config.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str) or names[0] not in known:
        raise config.wrong("architectures", f"one of {', '.join(sorted(known))}")
    return known[names[0]].read_shape(config)


def family_of(shape: ModelShape) -> Family:
    """The family that a shape came from."""
    return next(family for family in FAMILIES if family.name == shape.family)


def megatron_tensors(shape: ModelShape) -> dict[str, MegatronTensor]:
    """Every Megatron tensor of the model by its checkpoint key, in the order of the network."""
    return expand(family_of(shape).weights, shape)
