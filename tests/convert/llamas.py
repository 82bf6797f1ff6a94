"""Small random Llamas written by transformers, one for each thing that a conversion can get wrong."""

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

COMMON = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 5,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "vocab_size": 128,
    "tie_word_embeddings": False,
    "dtype": "float32",
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 4.0,
    "low_freq_factor": 1.5,
    "high_freq_factor": 3.0,
    "original_max_position_embeddings": 16,
}
LINEAR = {"rope_type": "linear", "rope_theta": 20000.0, "factor": 3.0}
MODELS = {
    "llama3": {"rope_parameters": LLAMA3},
    "tied": {"rope_parameters": LINEAR, "tie_word_embeddings": True, "vocab_size": 131},
    "biases": {"attention_bias": True, "mlp_bias": True, "vocab_size": 131, "head_dim": 12},
    "attention_bias": {"attention_bias": True, "num_key_value_heads": 8, "rope_parameters": LLAMA3},
    "mlp_bias": {"mlp_bias": True, "tie_word_embeddings": True},
}
SHARD_SIZE = {"biases": "80KB", "tied": "60KB"}
"""Models that transformers writes in several files."""


def write(name: str, folder: Path) -> Path:
    """One of MODELS as a Hugging Face folder. No norm is 1 and no bias 0: defaults hide most mistakes."""
    torch.manual_seed(sorted(MODELS).index(name))
    model = LlamaForCausalLM(LlamaConfig(**(COMMON | MODELS[name])))
    with torch.no_grad():
        for key, weight in model.named_parameters():
            noise = torch.randn_like(weight)
            if weight.dim() == 1:
                weight.copy_(noise * 0.3 + ("norm" in key))
            else:
                weight.copy_(noise * (0.3 if "embed" in key else 1.5 / weight.shape[1] ** 0.5))
    model.save_pretrained(folder, max_shard_size=SHARD_SIZE.get(name, "1GB"))
    return folder
