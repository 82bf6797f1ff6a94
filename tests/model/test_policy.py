"""The policy against transformers, and a packed stream against every response alone."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distributed import run_ranks
from tiny import MemoryStore, random_groups, write_llama
from train.engine import Case, build

from megadpo.data.batch import pack
from megadpo.data.packing import Budget
from megadpo.data.tokenize import TokenizedGroup
from megadpo.model.logits import text_logits
from megadpo.parallel.context import grid
from megadpo.train.passes import response_sums

VOCAB = 67


def outside(folder: Path, store: MemoryStore) -> tuple[list[np.ndarray], dict[str, np.ndarray]]:
    """Per response the log-probability of every token, and the gradient of their weighted total, by transformers, each
    response in a batch of its own."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    found, total = [], torch.zeros(())
    for number, group in enumerate(store.groups):
        for k, response in enumerate(group.response_ids):
            ids = torch.from_numpy(np.concatenate([group.prompt_ids, response]).astype(np.int64))
            logprob = model(ids[None]).logits[0].log_softmax(-1)
            start = len(group.prompt_ids)
            tokens = logprob[start - 1 : -1].gather(1, ids[start:, None])[:, 0]
            found.append(tokens.detach().numpy())
            total = total + tokens.sum() * weight(number, k)
    total.backward()
    return found, {name: p.grad.numpy() for name, p in model.named_parameters()}


def weight(group: int, response: int) -> float:
    return 0.3 * (group + 1) * (-1) ** response


def packed(device: torch.device, case: Case) -> dict[str, Any]:
    """The same through the policy: all groups in one stream."""
    with grid(case.parallel, device, 0) as context:
        state, _ = build(case, context)
        batch = pack(case.store, range(len(case.store)), case.budget.tokens, None)
        policy = state.modules[0]
        logprob = policy(batch).logprob_N
        responses = [(g, k) for g, x in enumerate(case.store.groups) for k in range(len(x.response_ids))]
        weights = torch.tensor([weight(g, k) for g, k in responses])
        state.chunks[0].zero_grad_buffer()
        (response_sums(logprob, batch, "auto") * weights).sum().backward()
        gradients = {name: p.main_grad.clone() for name, p in policy.named_parameters()}
        return {"logprob": logprob.detach(), "sizes": batch.tokens_S, "gradients": gradients}


@pytest.mark.parametrize("responses", [1, 2, 5])
@pytest.mark.parametrize("tied", [False, True])
def test_packed_and_shared_equals_each_response_alone(tmp_path: Path, responses: int, tied: bool) -> None:
    folder = write_llama(tmp_path / "llama", vocab=VOCAB, tied=tied, bias=True)
    store = random_groups(7, vocab=VOCAB, responses=responses)
    want, gradients = outside(folder, store)
    [got] = run_ranks(1, packed, Case(folder, store, budget=Budget(400)))
    parts = got["logprob"].split(got["sizes"].tolist())
    assert max(float(np.abs(a.numpy() - b).max()) for a, b in zip(parts, want, strict=True)) < 1e-5
    for ours, theirs in {
        "embedding.word_embeddings.weight": "model.embed_tokens.weight",
        "decoder.final_layernorm.weight": "model.norm.weight",
        "decoder.layers.1.mlp.linear_fc2.weight": "model.layers.1.mlp.down_proj.weight",
        "decoder.layers.0.self_attention.linear_proj.bias": "model.layers.0.self_attn.o_proj.bias",
        "decoder.layers.0.input_layernorm.weight": "model.layers.0.input_layernorm.weight",
    }.items():
        difference = np.linalg.norm(got["gradients"][ours].numpy() - gradients[theirs])
        assert difference < 1e-5 * np.linalg.norm(gradients[theirs]), ours


def test_groups_do_not_see_each_other(tmp_path: Path) -> None:
    """Another text in one group leaves every other group's numbers equal to the last bit."""
    folder = write_llama(tmp_path / "llama", vocab=VOCAB)
    store = random_groups(6, vocab=VOCAB)
    changed = MemoryStore(list(store.groups))
    old = store.groups[3]
    changed.groups[3] = TokenizedGroup(
        "changed", (old.prompt_ids + 1) % VOCAB, tuple((r + 5) % VOCAB for r in old.response_ids)
    )
    case = Case(folder, store, budget=Budget(256))
    one, two = (run_ranks(1, packed, replace(case, store=s))[0] for s in (store, changed))
    sizes = one["sizes"].tolist()
    for response, (a, b) in enumerate(zip(one["logprob"].split(sizes), two["logprob"].split(sizes), strict=True)):
        assert torch.equal(a, b) == (response // 2 != 3)


def test_chosen_and_rejected_are_treated_alike(tmp_path: Path) -> None:
    """Swapping them swaps their log-probabilities to the last bit."""
    folder = write_llama(tmp_path / "llama", vocab=VOCAB)
    store = random_groups(5, vocab=VOCAB)
    swapped = MemoryStore([TokenizedGroup(g.origin, g.prompt_ids, g.response_ids[::-1]) for g in store.groups])
    case = Case(folder, store, budget=Budget(256))
    one, two = (run_ranks(1, packed, replace(case, store=s))[0] for s in (store, swapped))
    a = one["logprob"].split(one["sizes"].tolist())
    b = two["logprob"].split(two["sizes"].tolist())
    for group in range(5):
        assert torch.equal(a[2 * group], b[2 * group + 1])
        assert torch.equal(a[2 * group + 1], b[2 * group])


def logits(device: torch.device, case: Case, ids: list[int]) -> tuple[torch.Tensor, int]:
    """Logits of a text, and how many rows of its hidden states this rank holds."""
    with grid(case.parallel, device, 0) as context:
        policy = build(case, context)[0].modules[0]
        rows = policy.hidden_states(pack(case.store, [0], case.budget.tokens, None)).shape[0]
        return text_logits(policy, ids, context), rows


def test_logits_of_a_real_model(shared: Path) -> None:
    """stories260k, 300 tokens: the same logits as transformers within 1e-4."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = shared / "models" / "stories260k"
    text = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. " * 4
    ids = AutoTokenizer.from_pretrained(folder)(text)["input_ids"][:300]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        want = model(torch.tensor(ids)[None]).logits[0]
    case = Case(folder, random_groups(1, vocab=512), budget=Budget(64))
    layouts = [(1, case, 64), (2, replace(case, tensor=2), 64), (2, replace(case, tensor=2, sequence=True), 32)]
    for world, layout, rows in layouts:
        got, held = run_ranks(world, logits, layout, ids)[0]
        assert got.shape == want.shape
        assert float((got - want).abs().max()) < 1e-4
        assert held == rows, "sequence parallelism splits the hidden states, and nothing else does"
