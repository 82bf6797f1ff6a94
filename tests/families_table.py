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
EXPERTS = ("TP1", "EP2", "TP2 SP", "TP2 EP2", "PP2", "TP2 PP2 SP", "TP2 PP2 EP2")
DEALT = tuple(grid for grid in EXPERTS if not grid.endswith("SP"))
"""Experts with biases are not split over tensor-parallel ranks."""
QWEN_MOE = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
DEEPSEEK = {
    "rms_norm_eps": 1e-6,
    "num_key_value_heads": 8,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 16,
    "v_head_dim": 10,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
}
DEEPSEEK_YARN = YARN | {"mscale": 1.0, "mscale_all_dim": 0.7}
GROUPED = {"n_group": 4, "topk_group": 2, "q_lora_rank": 20, "n_shared_experts": 1, "rope_parameters": DEEPSEEK_YARN}


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
    "mixtral": Row("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 10}, EXPERTS),
    "mixtral, one expert a token": Row(
        "MixtralConfig", {"num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 7}, ("TP1", "EP2")
    ),
    "qwen3_moe": Row(
        "Qwen3MoeConfig",
        QWEN_MOE | WIDE | {"mlp_only_layers": [1], "norm_topk_prob": True, "rope_parameters": YARN},
        EXPERTS,
    ),
    "qwen3_moe, scores as they are": Row(
        "Qwen3MoeConfig",
        QWEN_MOE
        | {"decoder_sparse_step": 2, "tie_word_embeddings": True, "attention_bias": True}
        | {"use_sliding_window": True, "sliding_window": 7},
        ("TP1", "TP2 SP", "PP2"),
    ),
    "deepseek_v2": Row(
        "DeepseekV2Config",
        DEEPSEEK | GROUPED | {"topk_method": "group_limited_greedy", "routed_scaling_factor": 1.3},
        EXPERTS,
    ),
    "deepseek_v2, lite": Row(
        "DeepseekV2Config",
        DEEPSEEK | {"q_lora_rank": None, "n_shared_experts": 2, "first_k_dense_replace": 0, "rope_parameters": PLAIN},
        ("TP1", "TP2 EP2", "PP2"),
    ),
    "deepseek_v3": Row(
        "DeepseekV3Config", DEEPSEEK | GROUPED | {"routed_scaling_factor": 1.7, "num_nextn_predict_layers": 0}, EXPERTS
    ),
    "deepseek_v3, odd": Row(
        "DeepseekV3Config",
        DEEPSEEK
        | {"n_group": 1, "topk_group": 1, "q_lora_rank": None, "n_shared_experts": 2, "norm_topk_prob": False}
        | {"rope_parameters": PLAIN, "rope_interleave": False, "num_nextn_predict_layers": 0},
        ("TP1", "TP2 SP", "PP2"),
    ),
    "gpt_oss": Row(
        "GptOssConfig",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 12, "sliding_window": 6, "swiglu_limit": 1.5}
        | {"rope_parameters": YARN | {"truncate": False}},
        DEALT,
    ),
}


def write(name: str, folder: Path, gain: float = 1.5, **changes: Any) -> Path:
    """One of ROWS as a Hugging Face folder, perhaps with other fields. No norm, bias or embedding is as transformers
    initialises it: defaults hide most mistakes. gain: of every matrix; above 1 it magnifies roundings layer by layer.
    """
    row = ROWS[name]
    torch.manual_seed(sorted(ROWS).index(name))
    config = getattr(transformers, row.config)(**(COMMON | row.fields | changes))
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        biases = [(key, buffer) for key, buffer in model.named_buffers() if "correction_bias" in key]
        for key, weight in (*model.named_parameters(), *biases):
            noise = torch.randn_like(weight)
            if weight.dim() == 1:
                weight.add_(noise * 0.3)
            else:
                weight.copy_(noise * (0.3 if "embed" in key else gain / weight.shape[-1] ** 0.5))
    model.save_pretrained(folder)
    return folder
