"""Small models and data sets that tests make for themselves."""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from megadpo.data.tokenize import BODY, SCORED, TokenizedGroup


def write_llama(
    folder: Path,
    *,
    layers: int = 3,
    hidden: int = 32,
    ffn: int = 48,
    heads: int = 4,
    groups: int = 2,
    vocab: int = 67,
    tied: bool = False,
    bias: bool = False,
    seed: int = 0,
) -> Path:
    """A random Llama as a Hugging Face folder; norms and biases are random too, since defaults hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    width = hidden // heads

    def matrix(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.15

    def vector(size: int, around: float) -> torch.Tensor:
        return around + torch.randn(size, generator=generator) * 0.1

    tensors = {"model.embed_tokens.weight": matrix(vocab, hidden), "model.norm.weight": vector(hidden, 1)}
    if not tied:
        tensors["lm_head.weight"] = matrix(vocab, hidden)
    for layer in range(layers):
        name = f"model.layers.{layer}."
        shapes = {
            "self_attn.q_proj": (heads * width, hidden),
            "self_attn.k_proj": (groups * width, hidden),
            "self_attn.v_proj": (groups * width, hidden),
            "self_attn.o_proj": (hidden, heads * width),
            "mlp.gate_proj": (ffn, hidden),
            "mlp.up_proj": (ffn, hidden),
            "mlp.down_proj": (hidden, ffn),
        }
        for part, shape in shapes.items():
            tensors[f"{name}{part}.weight"] = matrix(*shape)
            if bias:
                tensors[f"{name}{part}.bias"] = vector(shape[0], 0)
        tensors[name + "input_layernorm.weight"] = vector(hidden, 1)
        tensors[name + "post_attention_layernorm.weight"] = vector(hidden, 1)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": width,
        "vocab_size": vocab,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "hidden_act": "silu",
        "attention_bias": bias,
        "mlp_bias": bias,
        "tie_word_embeddings": tied,
        "dtype": "float32",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


class MemoryStore:
    """The part of GroupStore that batches and streams use, over groups in memory."""

    def __init__(self, groups: list[TokenizedGroup]) -> None:
        self.groups = groups
        self.folder, self.digest = Path("nowhere"), "in memory"
        self.prompt_lengths = np.array([len(g.prompt_ids) for g in groups], dtype=np.int32)
        self.response_lengths = np.array([len(r) for g in groups for r in g.response_ids], dtype=np.int32)
        marks = [mark for g in groups for mark in g.marks or [np.full(len(r), SCORED) for r in g.response_ids]]
        self.scored_lengths = np.array([int(((mark & SCORED) > 0).sum()) for mark in marks], dtype=np.int32)
        self.offsets = np.cumsum([0] + [len(g.response_ids) for g in groups])
        labels = [label for g in groups for label in g.labels or ()]
        scores = [score for g in groups for score in g.scores or ()]
        self.labels_S = np.array(labels) if labels else None
        self.scores_S = np.array(scores, dtype=np.float32) if scores else None
        self.bodies = any((mark & BODY).any() for g in groups for mark in g.marks or ())

    def __len__(self) -> int:
        return len(self.groups)

    def group(self, number: int) -> TokenizedGroup:
        return self.groups[number]


def random_groups(
    count: int,
    *,
    vocab: int = 67,
    responses: int = 2,
    longest_prompt: int = 9,
    longest_response: int = 8,
    seed: int = 0,
) -> MemoryStore:
    """Ragged random groups; the first has a prompt of one token and one-token responses."""
    rng = np.random.default_rng(seed)

    def ids(length: int) -> np.ndarray:
        return rng.integers(3, vocab, length).astype(np.int32)

    groups = [TokenizedGroup("first", ids(1), tuple(ids(1) for _ in range(responses)))]
    for number in range(1, count):
        prompt = ids(int(rng.integers(1, longest_prompt + 1)))
        answers = tuple(ids(int(rng.integers(1, longest_response + 1))) for _ in range(responses))
        groups.append(TokenizedGroup(f"random[{number}]", prompt, answers))
    return MemoryStore(groups)
