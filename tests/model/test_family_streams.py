"""Llama, and families whose layers are not Llama's, in a packed stream with shared prompts: per token and for the
gradient of every weight the same as transformers computes for each response alone, on every kind of grid."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from distributed import run_ranks
from families_table import COMMON, write
from test_policy import outside
from test_shared_prompts import run
from tiny import random_groups, write_llama
from train.engine import Case, assemble, build
from transformers import AutoModelForCausalLM

from megadpo.convert.families import megatron_tensors, read_shape
from megadpo.convert.tables import MegatronTensor
from megadpo.data.packing import Budget
from megadpo.model.logits import text_logits
from megadpo.parallel.context import grid

NAMES = ("llama", "mistral", "qwen2, yarn", "qwen3", "gemma2", "gemma3", "olmo2, biases", "phi3")
"""Each with what the others have not; windows are of 7 tokens, prompts and responses of up to 13 each."""
GRIDS = {
    1: [{}, {"share": False, "recompute": "selective"}],
    2: [{"tensor": 2}, {"pipeline": 2, "virtual": 2, "recompute": "full"}],
    4: [{"tensor": 2, "pipeline": 2, "sequence": True}, {"tensor": 4, "sequence": True}],
}
NOT_SPLIT_IN_FOUR = ("olmo2, biases",)
"""With 2 key heads and a norm over both; others keep copies of a key head on several ranks."""
VOCAB = int(COMMON["vocab_size"])


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    root = tmp_path_factory.mktemp("families")
    store = random_groups(5, vocab=VOCAB, longest_prompt=13, longest_response=13)
    folders = {name: write(name, root / name, gain=1.0) for name in NAMES if name != "llama"}
    folders["llama"] = write_llama(root / "llama", layers=4, vocab=VOCAB, bias=True)
    return {name: Case(folders[name], store, budget=Budget(64)) for name in NAMES}


@pytest.fixture(scope="module")
def results(cases: dict[str, Case]) -> dict[str, list[list[dict]]]:
    """By model and grid, what every rank found."""
    found: dict[str, list[list[dict]]] = {name: [] for name in NAMES}
    for world, grids in GRIDS.items():
        jobs = [
            (name, replace(cases[name], **changes))
            for name in NAMES
            for changes in grids
            if name not in NOT_SPLIT_IN_FOUR or changes.get("tensor") != 4
        ]
        ranks = run_ranks(world, run, [case for _, case in jobs])
        for number, (name, _) in enumerate(jobs):
            found[name].append([rank[number] for rank in ranks])
    return found


def as_megatron(tensor: MegatronTensor, theirs: dict[str, np.ndarray]) -> torch.Tensor:
    """A Megatron tensor put together from Hugging Face tensors, row by row as its table says."""
    parts = [theirs[rows.name][rows.start : rows.start + rows.count] for rows in tensor.rows]
    return torch.from_numpy(np.concatenate(parts))


@pytest.mark.parametrize("name", NAMES)
def test_a_shared_prompt_equals_every_response_alone(
    name: str, cases: dict[str, Case], results: dict[str, list[list[dict]]]
) -> None:
    case = cases[name]
    alone, theirs = outside(case.folder, case.store)
    tensors = megatron_tensors(read_shape(case.folder))
    want = {key: as_megatron(tensor, theirs) / len(case.store) for key, tensor in tensors.items()}
    for number, ranks in enumerate(results[name]):
        tokens = {s: logprob for rank in ranks for s, logprob in rank["tokens"].items()}
        assert sorted(tokens) == list(range(len(alone)))
        difference = max(float(np.abs(tokens[s] - alone[s]).max()) for s in tokens)
        assert difference < 1e-5, f"grid {number}: {difference:.1e}"
        got = assemble(ranks, "gradients", VOCAB)
        assert got.keys() == want.keys()
        wrong = {k: float((got[k] - want[k]).norm() / want[k].norm()) for k in want}
        assert {k: x for k, x in wrong.items() if not x < 1e-5} == {}, f"grid {number}"


def run_bfloat16(device: torch.device, cases: dict[str, Case], ids: list[int]) -> dict[str, tuple[torch.Tensor, ...]]:
    """Logits and scaled embeddings of a text."""
    found = {}
    for name, case in cases.items():
        with grid(case.parallel, device, 0) as context:
            policy = build(replace(case, dtype="bfloat16"), context)[0].modules[0]
            found[name] = (text_logits(policy, ids, context), policy.embedded(torch.tensor(ids))[:, 0].detach())
    return found


def test_bfloat16_is_no_worse_than_transformers(cases: dict[str, Case]) -> None:
    """Against float32, the error is at most that of transformers in bfloat16 and half as much again; embeddings, which
    Gemma multiplies by a rounded number, are the same to the bit."""
    ids = list(range(1, 31))
    [found] = run_ranks(1, run_bfloat16, cases, ids)
    for name, (logits, embedded) in found.items():
        exact, theirs = (
            AutoModelForCausalLM.from_pretrained(cases[name].folder, dtype=dtype, attn_implementation="eager")
            for dtype in (torch.float32, torch.bfloat16)
        )
        with torch.no_grad():
            want, other = (model(torch.tensor(ids)[None]).logits[0].float() for model in (exact, theirs))
            assert torch.equal(embedded, theirs.get_input_embeddings()(torch.tensor(ids))), name
        ours, usual = (float((x - want).norm()) for x in (logits, other))
        assert ours < 1.5 * usual, f"{name}: {ours:.3f}, transformers {usual:.3f}"
