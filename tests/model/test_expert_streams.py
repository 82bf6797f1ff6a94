"""Models with experts and latent attention in a packed stream with shared prompts: per token, and for the gradient of
every weight, what transformers computes for each response alone."""

from pathlib import Path

import numpy as np
import pytest
import torch
from distributed import run_ranks
from families_table import COMMON, write
from test_family_streams import as_megatron
from test_policy import outside
from test_shared_prompts import run
from tiny import random_groups
from train.engine import Case, assemble

from megadpo.convert.families import megatron_tensors, read_shape
from megadpo.convert.tables import MegatronTensor
from megadpo.data.packing import Budget

NAMES = ("mixtral, one expert a token", "qwen3_moe", "deepseek_v2", "deepseek_v3, odd", "deepseek_v3", "gpt_oss")
VOCAB = int(COMMON["vocab_size"])
GATE_UP = {"block_sparse_moe": ("w1", "w3", "w2"), "mlp": ("gate_proj", "up_proj", "down_proj")}


def as_files(theirs: dict[str, np.ndarray], block: str) -> dict[str, np.ndarray]:
    """transformers 5 keeps all experts of a layer in one parameter, its files keep each expert's three matrices."""
    found = {}
    for name, values in theirs.items():
        name = name.replace("mlp.gate.", f"{block}.gate.")
        if ".experts." not in name:
            found[name] = values
            continue
        layer = name.split(".mlp.")[0]
        gate, up, down = GATE_UP[block]
        for expert, matrix in enumerate(values):
            prefix = f"{layer}.{block}.experts.{expert}."
            if name.endswith("gate_up_proj"):
                found[f"{prefix}{gate}.weight"], found[f"{prefix}{up}.weight"] = np.split(matrix, 2)
            else:
                found[f"{prefix}{down}.weight"] = matrix
    return found


def wanted(tensor: MegatronTensor, theirs: dict[str, np.ndarray]) -> torch.Tensor:
    if not tensor.stacked:
        return as_megatron(tensor, theirs)
    values = theirs[tensor.rows[0].name][tensor.expert]
    return torch.from_numpy(values[..., tensor.stacked.start :: tensor.stacked.step].T.copy())


@pytest.mark.parametrize("name", NAMES)
def test_a_shared_prompt_equals_every_response_alone(name: str, tmp_path: Path) -> None:
    """Responses of one token, streams with padding, and every response with a prompt of its own."""
    from dataclasses import replace

    store = random_groups(5, vocab=VOCAB, longest_prompt=13, longest_response=13)
    case = Case(write(name, tmp_path / name, gain=1.0), store, budget=Budget(64))
    shape = read_shape(case.folder)
    alone, theirs = outside(case.folder, case.store)
    if shape.family != "gpt_oss":
        theirs = as_files(theirs, "block_sparse_moe" if shape.family == "mixtral" else "mlp")
    tensors = {k: x for k, x in megatron_tensors(shape).items() if not k.endswith("expert_bias")}
    want = {key: wanted(tensor, theirs) / len(case.store) for key, tensor in tensors.items()}
    cases = [case, replace(case, share=False), replace(case, recompute="full")]
    [results] = run_ranks(1, run, cases)
    for number, result in enumerate(results):
        assert sorted(result["tokens"]) == list(range(len(alone)))
        difference = max(float(np.abs(result["tokens"][s] - alone[s]).max()) for s in result["tokens"])
        assert difference < 1e-5, f"case {number}: {difference:.1e}"
        got = assemble([result], "gradients", VOCAB)
        assert got.keys() == want.keys()
        # With one expert a token its weight is 1, and the router's gradient rounding noise in both.
        least = 1e-3 * max(float(x.norm()) for x in want.values())
        wrong = {k: float((got[k] - want[k]).norm() / want[k].norm().clamp(min=least)) for k in want}
        assert {k: x for k, x in wrong.items() if not x < 1e-5} == {}, f"case {number}"
