"""What the head gives beside log-probabilities, through the trainer, against transformers: each response alone, whole
distributions, plain formulas. Values and gradients, on grids, with prompts shared and not."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distributed import run_ranks
from test_policy import VOCAB, weight
from tiny import MemoryStore, random_groups, write_llama
from torch import Tensor
from train.engine import Case, assemble, build, pieces

from megadpo.data.batch import PackedBatch
from megadpo.data.packing import Budget
from megadpo.model.head import HeadOutput
from megadpo.objectives import Mix, Sequences
from megadpo.objectives.token_level import TDPO1, WPO, Cringe
from megadpo.parallel.context import grid
from megadpo.train.passes import Shared, asked_of, forward, run_schedule, sequences_of, with_reference

NOISE = 1e-5
OBJECTIVE = Mix((WPO(), TDPO1(), Cringe(top_k=3)))
SEED, CONSUMED = 11, 40
NAMES = ("policy_N", "collision_N", "kl_N", "rival_N")


def run(device: torch.device, cases: list[Case], other: Path) -> list[dict[str, Any]]:
    return [run_one(device, case, other) for case in cases]


def run_one(device: torch.device, case: Case, other: Path) -> dict[str, Any]:
    """Per response of the store the statistics of its tokens, [4, tokens]; and the gradient of a weighted sum of those
    that have one."""
    with grid(case.parallel, device, 0) as context:
        state, stream = build(case, context)
        reference = build(replace(case, folder=other), context)[0].modules
        for module in reference:
            module.eval().requires_grad_(False)
        batches = stream.batches(np.arange(len(case.store)), context.data_rank, None)
        batches = with_reference(reference, batches, context, hidden=True)
        asked = asked_of(OBJECTIVE, reference, SEED, CONSUMED)
        found: dict[int, Tensor] = {}

        shared = Shared(None, asked=asked)

        def keep(batch: PackedBatch, part: Sequences) -> None:
            numbers = [s for g in batch.groups for s in range(case.store.offsets[g], case.store.offsets[g + 1])]
            parts = torch.stack([getattr(part, name).detach() for name in NAMES])
            for number, part in zip(numbers, parts.split(batch.tokens_S.tolist(), dim=1), strict=True):
                known = found.setdefault(number, part)
                assert torch.equal(known, part), "the pass without a gradient gives other bits"

        def weighted(batch: PackedBatch, output: HeadOutput) -> tuple[Tensor, Tensor, Tensor]:
            sequences = sequences_of(batch, output, OBJECTIVE, shared)
            keep(batch, sequences)
            policy_N, collision_N, kl_N, rival_N = (getattr(sequences, name) for name in NAMES)
            assert not collision_N.requires_grad
            sizes = batch.offsets_G1.diff().tolist()
            weights = [weight(g, k) for g, size in zip(batch.groups, sizes, strict=True) for k in range(size)]
            weight_N = torch.tensor(weights).repeat_interleave(batch.tokens_S)
            loss = (weight_N * (policy_N + 2 * kl_N + 3 * rival_N)).sum()
            return loss, torch.tensor(len(batch.groups), dtype=torch.int), loss.detach()

        for chunk in state.chunks:
            chunk.zero_grad_buffer()
        run_schedule(state.chunks, batches, weighted, context, forward_only=False, asked=asked)
        without = forward(state.modules, batches, OBJECTIVE, shared, context)
        for batch, part in zip(batches, without, strict=False):
            keep(batch, part)
        return {"statistics": found, "gradients": pieces(state, lambda p: p.main_grad)}


def outside(folder: Path, other: Path, store: MemoryStore) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The same by transformers and torch's own derivatives, with all logits."""
    from transformers import AutoModelForCausalLM

    policy, reference = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
        for path in (folder, other)
    )
    found, total = [], torch.zeros(())
    for number, group in enumerate(store.groups):
        for k, response in enumerate(group.response_ids):
            ids = torch.from_numpy(np.concatenate([group.prompt_ids, response]).astype(np.int64))
            rows = slice(len(group.prompt_ids) - 1, -1)
            ours = policy(ids[None]).logits[0, rows].log_softmax(-1)
            with torch.no_grad():
                theirs = reference(ids[None]).logits[0, rows].log_softmax(-1)
            targets = ids[len(group.prompt_ids) :]
            rivals = [drawn(ours[t].tolist(), int(token), (number, k, t)) for t, token in enumerate(targets)]
            logprob = ours.gather(1, targets[:, None])[:, 0]
            collision = ours.exp().square().sum(-1).log()
            kl = (theirs.exp() * (theirs - ours)).sum(-1)
            rival = ours.gather(1, torch.tensor(rivals)[:, None])[:, 0]
            found.append(torch.stack([logprob, collision, kl, rival]).detach())
            total = total + (logprob + 2 * kl + 3 * rival).sum() * weight(number, k) / len(store)
    total.backward()
    return found, {name: p.grad for name, p in policy.named_parameters()}


def drawn(logprob_V: list[float], target: int, place: tuple[int, int, int]) -> int:
    """A token of the top 3 without the target, by plain integers: splitmix64's finaliser over (seed, consumed, group,
    response, token, id)."""
    others = sorted((v for v in range(len(logprob_V)) if v != target), key=lambda v: -logprob_V[v])[:3]
    key = SEED
    for value in (CONSUMED, *place):
        key = hashed(key, value)

    def noise(token: int) -> float:
        return -math.log(-math.log(((hashed(key, token) >> 12) + 0.5) / 2**52))

    return max(others, key=lambda v: logprob_V[v] + noise(v))


def hashed(key: int, value: int) -> int:
    def finaliser(x: int) -> int:
        x = (x + 0x9E3779B97F4A7C15) % 2**64
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % 2**64
        return x ^ (x >> 31)

    return finaliser(finaliser(key) ^ value)


@pytest.mark.parametrize("tied", [False, True])
def test_against_transformers(tmp_path: Path, tied: bool) -> None:
    folder = write_llama(tmp_path / "policy", layers=4, vocab=VOCAB, tied=tied)
    other = write_llama(tmp_path / "reference", layers=4, hidden=48, vocab=VOCAB, tied=not tied, seed=9)
    store = random_groups(7, vocab=VOCAB)
    want, gradients = outside(folder, other, store)
    case = Case(folder, store, budget=Budget(64))
    two, four = replace(case, tensor=2), replace(case, tensor=2, pipeline=2)
    layouts = {
        1: [case, replace(case, share=False), replace(case, logprob_backend="reference")],
        2: [two, replace(two, sequence=True), replace(two, share=False), replace(case, pipeline=2, virtual=2)],
        4: [four, replace(four, sequence=True, share=False)],
    }
    for world, cases in layouts.items():
        results = run_ranks(world, run, cases, other)
        for index, where in enumerate(cases):
            ranks = [rank[index] for rank in results]
            known = {number: part for rank in ranks for number, part in rank["statistics"].items()}
            assert len(known) == len(want)
            for number, exact in enumerate(want):
                assert float((known[number] - exact).abs().max()) < NOISE, f"{where}, response {number}"
            got = assemble(ranks, "gradients", VOCAB)
            for ours, theirs in {
                "embedding.word_embeddings.weight": "model.embed_tokens.weight",
                "decoder.final_layernorm.weight": "model.norm.weight",
                **({} if tied else {"output_layer.weight": "lm_head.weight"}),
            }.items():
                exact = gradients[theirs]
                assert (got[ours] - exact).norm() < NOISE * exact.norm(), f"{where}, {ours}"
