"""Small random models with experts and latent attention, written by transformers."""

from pathlib import Path
from typing import Any

import torch
import transformers

COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "vocab_size": 131,
    "tie_word_embeddings": False,
    "dtype": "float32",
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 32,
    "beta_slow": 1,
}
LATENT: dict[str, Any] = {
    "num_key_value_heads": 8,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
}
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
DEEPSEEK_YARN = YARN | {"mscale": 1.0, "mscale_all_dim": 0.7}
GROUPED = {"n_group": 4, "topk_group": 2}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "mixtral window": ("Mixtral", {"num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 7}),
    "qwen3_moe": (
        "Qwen3Moe",
        {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 12}
        | {"mlp_only_layers": [1], "norm_topk_prob": True, "rope_parameters": YARN},
    ),
    "qwen3_moe plain weights": (
        "Qwen3Moe",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "tie_word_embeddings": True},
    ),
    "deepseek_v2": (
        "DeepseekV2",
        LATENT
        | GROUPED
        | {"topk_method": "group_limited_greedy", "q_lora_rank": 20, "n_shared_experts": 1, "routed_scaling_factor": 1.3}
        | {"rope_parameters": DEEPSEEK_YARN},
    ),
    "deepseek_v2 lite": (
        "DeepseekV2",
        LATENT | {"q_lora_rank": None, "n_shared_experts": 2, "rope_parameters": PLAIN, "first_k_dense_replace": 0},
    ),
    "deepseek_v3": (
        "DeepseekV3",
        LATENT | GROUPED | {"q_lora_rank": 20, "n_shared_experts": 1, "rope_parameters": DEEPSEEK_YARN},
    ),
    "deepseek_v3 odd": (
        "DeepseekV3",
        LATENT
        | {"n_group": 1, "topk_group": 1, "q_lora_rank": None, "n_shared_experts": 2, "norm_topk_prob": False}
        | {"rope_parameters": PLAIN, "rope_interleave": False, "num_nextn_predict_layers": 0},
    ),
    "gpt_oss": (
        "GptOss",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 12, "intermediate_size": 32}
        | {"sliding_window": 6, "swiglu_limit": 1.5, "rope_parameters": YARN | {"truncate": False}},
    ),
}
"""Family name in transformers, and its config."""


def write_mixture(name: str, folder: Path, **changes: Any) -> Path:
    """One of MODELS as a Hugging Face folder. No norm is 1 and no bias 0: defaults hide most mistakes."""
    family, fields = MODELS[name]
    torch.manual_seed(sorted(MODELS).index(name))
    config = getattr(transformers, f"{family}Config")(**(COMMON | fields | changes))
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    with torch.no_grad():
        for key, weight in model.state_dict(keep_vars=True).items():
            noise = torch.randn_like(weight)
            if weight.dim() == 1:
                weight.copy_(noise * 0.3 + ("norm" in key))
            else:
                weight.copy_(noise * (0.3 if "embed" in key else 1.5 / weight.shape[-1] ** 0.5))
    model.save_pretrained(folder)
    return folder
