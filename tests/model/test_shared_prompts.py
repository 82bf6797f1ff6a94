"""A packed stream in which every prompt stands once, against each response alone by transformers: per token, for 1, 2
and 5 responses, on every kind of grid. Gradients are held against those of one rank, which test_policy.py holds
against transformers."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distributed import run_ranks
from test_policy import VOCAB, outside, weight
from tiny import MemoryStore, random_groups, write_llama
from torch import Tensor
from train.engine import Case, assemble, build, pieces, worst

from megadpo.data.batch import PackedBatch
from megadpo.data.packing import Budget
from megadpo.model.head import HeadOutput
from megadpo.parallel.context import ParallelContext, grid
from megadpo.train.passes import response_sums, run_schedule

NOISE = 1e-5
BFLOAT16 = 0.1
"""Nats by which one token's log-probability may be off in bfloat16, for the small random model below."""


@dataclass(frozen=True)
class Setting:
    case: Case
    alone: list[np.ndarray]
    """By transformers: per response of the store its tokens' log-probabilities."""


@pytest.fixture(scope="module", params=["1", "2", "2 tied", "5"])
def setting(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Setting:
    """4 layers, 4 heads on 2 groups, biases, an odd vocabulary; a prompt and responses of one token. The parameter: how
    many responses, and whether embedding and head are tied."""
    responses, _, tied = request.param.partition(" ")
    folder = write_llama(tmp_path_factory.mktemp("llama"), layers=4, vocab=VOCAB, bias=True, tied=bool(tied))
    store = random_groups(9, vocab=VOCAB, responses=int(responses))
    return Setting(Case(folder, store, budget=Budget(64)), outside(folder, store)[0])


def run(device: torch.device, cases: list[Case]) -> list[dict[str, Any]]:
    return [run_one(device, case) for case in cases]


def run_one(device: torch.device, case: Case) -> dict[str, Any]:
    """One pass over the whole store, forward and backward: per response its tokens' log-probabilities (on last stages),
    and the gradient of the responses' weighted sum over the number of groups."""
    with grid(case.parallel, device, 0) as context:
        state, stream = build(case, context)
        batches = stream.batches(np.arange(len(case.store)), context.data_rank, None)
        seen: list[Tensor] = []
        if context.holds_loss:
            state.modules[-1].register_forward_hook(lambda _, __, out: seen.append(out.logprob_N.detach().float()))
        for chunk in state.chunks:
            chunk.zero_grad_buffer()
        run_schedule(state.chunks, batches, weighted, context, forward_only=False)
        tokens = dict(found(batches, seen, context, case.store))
        return {"tokens": tokens, "gradients": pieces(state, lambda p: p.main_grad)}


def weighted(batch: PackedBatch, output: HeadOutput) -> tuple[Tensor, Tensor, Tensor]:
    """An objective that treats every response differently; it counts groups."""
    sizes = batch.offsets_G1.diff().tolist()
    weights = [weight(g, k) for g, size in zip(batch.groups, sizes, strict=True) for k in range(size)]
    loss = (response_sums(output.logprob_N, batch, "auto") * torch.tensor(weights)).sum()
    return loss, torch.tensor(len(batch.groups), dtype=torch.int), loss.detach()


def found(
    batches: list[PackedBatch], seen: list[Tensor], context: ParallelContext, store: MemoryStore
) -> Iterator[tuple[int, np.ndarray]]:
    """(number of the response in the store, its tokens' log-probabilities) of what this rank computed."""
    if not context.holds_loss:
        return
    for batch, logprob_N in zip(batches, seen, strict=True):
        numbers = [s for g in batch.groups for s in range(store.offsets[g], store.offsets[g + 1])]
        yield from zip(numbers, (part.numpy() for part in logprob_N.split(batch.tokens_S.tolist())), strict=True)


def compare(results: list[list[dict[str, Any]]], setting: Setting, single: dict[str, Tensor], tokens: float) -> None:
    """Every case's every response, and the gradients, where `tokens` is rounding of float32."""
    for index in range(len(results[0])):
        ranks = [rank[index] for rank in results]
        known: dict[int, np.ndarray] = {}
        for rank in ranks:
            known |= rank["tokens"]
        assert sorted(known) == list(range(len(setting.alone))), "a response is missing"
        difference = max(float(np.abs(known[s] - alone).max()) for s, alone in enumerate(setting.alone))
        assert difference < tokens, f"case {index}: {difference:.1e}"
        if tokens <= NOISE:
            difference, name = worst(assemble(ranks, "gradients", VOCAB), single)
            assert difference < NOISE, f"case {index}: {name} differs by {difference:.1e}"


@pytest.fixture(scope="module")
def single(setting: Setting) -> dict[str, Tensor]:
    """Gradients of one rank with the whole store in one micro-batch."""
    [[result]] = run_ranks(1, run, [replace(setting.case, budget=Budget(400))])
    return assemble([result], "gradients", VOCAB)


def test_one_rank(setting: Setting, single: dict[str, Tensor]) -> None:
    case = setting.case
    cases = [
        case,
        replace(case, share=False),
        replace(case, grain=1),
        replace(case, recompute="full"),
        replace(case, recompute="selective"),
    ]
    compare(run_ranks(1, run, cases), setting, single, NOISE)
    compare(run_ranks(1, run, [replace(case, dtype="bfloat16")]), setting, single, BFLOAT16)


def test_two_ranks(setting: Setting, single: dict[str, Tensor]) -> None:
    case = setting.case
    cases = [
        replace(case, tensor=2),
        replace(case, tensor=2, sequence=True),
        replace(case, tensor=2, sequence=True, recompute="selective"),
        replace(case, pipeline=2),
        replace(case, pipeline=2, virtual=2),
        replace(case, pipeline=2, virtual=2, recompute="full"),
        replace(case, tensor=2, sequence=True, grain=2),
        case,  # data-parallel 2
        replace(case, grain=1),  # data-parallel 2
    ]
    compare(run_ranks(2, run, cases), setting, single, NOISE)
    compare(run_ranks(2, run, [replace(case, tensor=2, sequence=True, dtype="bfloat16")]), setting, single, BFLOAT16)


def test_groups_do_not_see_each_other(setting: Setting) -> None:
    """Another text in one group leaves every other group's numbers equal to the last bit, on two ranks."""
    case, store = setting.case, setting.case.store
    groups = list(store.groups)
    other = [(r + 5) % VOCAB for r in groups[3].response_ids]
    groups[3] = replace(groups[3], prompt_ids=(groups[3].prompt_ids + 1) % VOCAB, response_ids=tuple(other))
    changed = replace(case, store=MemoryStore(groups))
    one, two = (
        run_ranks(2, run, [replace(c, tensor=2, sequence=True), replace(c, pipeline=2, virtual=2), c])
        for c in (case, changed)
    )
    owners = np.repeat(np.arange(len(groups)), np.diff(store.offsets))
    for rank in range(2):
        for before, after in zip(one[rank], two[rank], strict=True):
            for response, tokens in before["tokens"].items():
                assert np.array_equal(tokens, after["tokens"][response]) == (owners[response] != 3)


def test_a_wrong_position_would_be_seen(setting: Setting, tmp_path: Path) -> None:
    """The comparison can fail, also with the tolerance of bfloat16: a prompt that lacks its first token."""
    store = setting.case.store
    cut = MemoryStore([replace(g, prompt_ids=g.prompt_ids[min(1, len(g.prompt_ids) - 1) :]) for g in store.groups])
    [[result]] = run_ranks(1, run, [replace(setting.case, store=cut)])
    off = [float(np.abs(result["tokens"][s] - alone).max()) for s, alone in enumerate(setting.alone)]
    assert max(off) > 2 * BFLOAT16
