"""Small random models of every family, written by transformers. A new family is a row here and nothing else."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

COMMON = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "vocab_size": 101,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "dtype": "float32",
}
DENSE = ("TP1", "TP2", "PP2", "TP2 PP2")
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 24}
ODD_YARN = YARN | {"attention_factor": 1.3, "beta_fast": 1.0, "beta_slow": 0.1, "truncate": False}
WIDE = {"head_dim": 32}
"""Wide enough for yarn to keep, blend and slow down some channels each."""
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
GEMMA = {"sliding_window": 7, "head_dim": 12, "query_pre_attn_scalar": 20, "tie_word_embeddings": True}


@dataclass(frozen=True)
class Row:
    config: str
    """Name of the configuration class in transformers."""
    fields: dict[str, Any] = field(default_factory=dict)
    """Beyond COMMON: whatever the family can have, at values that are nobody's default."""
    grids: tuple[str, ...] = DENSE
    """Names in test_round_trip.GRIDS."""


ROWS = {
    "mistral": Row("MistralConfig", {"sliding_window": 7, "head_dim": 10}),
    "mistral, no window": Row("MistralConfig", {"sliding_window": None}),
    "qwen2": Row("Qwen2Config", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2}),
    "qwen2, yarn": Row(
        "Qwen2Config", WIDE | {"rope_parameters": YARN, "tie_word_embeddings": True, "sliding_window": 7}
    ),
    "qwen2, odd yarn": Row("Qwen2Config", WIDE | {"rope_parameters": ODD_YARN}),
    "qwen3": Row(
        "Qwen3Config",
        {
            "head_dim": 10,
            "num_key_value_heads": 2,
            "use_sliding_window": True,
            "sliding_window": 7,
            "layer_types": ["full_attention", "sliding_attention"] * 2,
        },
        (*DENSE, "TP4"),
    ),
    "qwen3, biases": Row("Qwen3Config", {"head_dim": 10, "attention_bias": True}),
    "gemma2": Row("Gemma2Config", GEMMA | {"attn_logit_softcapping": 4.0, "final_logit_softcapping": 3.0}),
    "gemma2, no caps": Row(
        "Gemma2Config",
        GEMMA
        | {
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "attention_bias": True,
            "tie_word_embeddings": False,
        },
    ),
    "gemma3": Row(
        "Gemma3TextConfig",
        GEMMA
        | {
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 50000.0, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 3000.0},
            },
        },
    ),
    "olmo2": Row("Olmo2Config"),
    "olmo2, biases": Row(
        "Olmo2Config", {"attention_bias": True, "num_key_value_heads": 2, "tie_word_embeddings": True}
    ),
    "phi3": Row("Phi3Config", {"sliding_window": 7, "rope_parameters": PLAIN | {"partial_rotary_factor": 0.67}}),
    "phi3, all rotated": Row("Phi3Config", {"tie_word_embeddings": True}),
}


def write(name: str, folder: Path) -> Path:
    """One of ROWS as a Hugging Face folder. No norm, bias or embedding is as transformers initialises it: defaults hide
    most mistakes."""
    row = ROWS[name]
    torch.manual_seed(sorted(ROWS).index(name))
    config = getattr(transformers, row.config)(**(COMMON | row.fields))
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            noise = torch.randn_like(weight)
            if weight.dim() == 1:
                weight.add_(noise * 0.3)
            else:
                weight.copy_(noise * (0.3 if "embed" in key else 1.5 / weight.shape[-1] ** 0.5))
    model.save_pretrained(folder)
    return folder
