"""Models and cases of a size that FP8's blocks and one GPU like."""

from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from tiny import random_groups, write_llama
from train.engine import Case

from megadpo.data.packing import Budget

VOCAB = 512


def small(folder: Path, **changes: Any) -> Case:
    """A random Llama of 4 layers in bfloat16, and ragged pairs; one stream of 512 rows per micro-batch."""
    llama = write_llama(folder / "llama", layers=4, hidden=256, ffn=512, heads=8, groups=4, vocab=VOCAB)
    tensors = load_file(llama / "model.safetensors")
    for name, tensor in tensors.items():
        if "_proj" in name:  # a layer that neither grows nor shrinks what goes through, as trained ones do
            tensor.mul_(0.15)
    save_file(tensors, llama / "model.safetensors", metadata={"format": "pt"})
    store = random_groups(24, vocab=VOCAB, longest_prompt=60, longest_response=40)
    case = {"dtype": "bfloat16", "budget": Budget(512), "distributed": True, "steps": 3, "learning_rate": 1e-5}
    return Case(llama, store, **(case | changes))
