"""Micro-batches of objectives that look across the batch: their parts add up to the whole batch's loss and gradient."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from batches import one_group, usual

from megadpo.objectives import DPO, SFT, Mix, across
from megadpo.objectives.across_pairs import AOT, BCO, AOTUnpaired, BetaDPO
from megadpo.objectives.token_level import LDDPO
from megadpo.objectives.unpaired import BCOUnpaired

ACROSS = [
    AOT(0.3),
    AOTUnpaired(0.3),
    BCO(0.3),
    BetaDPO(0.3),
    BCOUnpaired(0.3),
    Mix((DPO(0.2), BCO(0.1), SFT()), (0.8, 0.2, 1.0)),
    Mix((LDDPO(0.2), AOT(0.1))),
]


@pytest.mark.parametrize("objective", ACROSS, ids=lambda o: type(o).__name__)
def test_parts_have_the_gradient_of_the_whole(objective: Any) -> None:
    batch = usual(objective, groups=6)
    whole = {name: getattr(batch, name).clone().requires_grad_() for name in across.CARRIERS}
    want = objective(replace(batch, **whole))
    grads = torch.autograd.grad(want.loss, list(whole.values()), materialize_grads=True, allow_unused=True)

    empty = replace(one_group(batch, 0), offsets_G1=torch.zeros(1, dtype=torch.int64))
    empty = replace(
        empty,
        **{n: v[:0] for n, v in vars(empty).items() if isinstance(v, torch.Tensor) and n[-2:] in ("_S", "_N")},
    )
    parts = [one_group(batch, 0), empty, *(one_group(batch, g) for g in range(1, 6))]
    outcome, slopes = across.slopes(parts, objective)
    assert outcome.loss.item() == want.loss.item()
    assert outcome.count.item() == want.count.item() == sum(part.count(objective.unit).item() for part in parts)
    leaves = [{name: getattr(part, name).clone().requires_grad_() for name in across.CARRIERS} for part in parts]
    for part, leaf, slope in zip(parts, leaves, slopes, strict=True):
        across.along(replace(part, **leaf), slope).backward()
    for name, grad in zip(across.CARRIERS, grads, strict=True):
        torch.testing.assert_close(torch.cat([leaf[name].grad for leaf in leaves]), grad, rtol=0, atol=0)


@pytest.mark.parametrize("objective", ACROSS[:5], ids=lambda o: type(o).__name__)
def test_a_micro_batch_alone_is_another_loss(objective: Any) -> None:
    """So these could not be added up micro-batch by micro-batch."""
    batch = usual(objective, groups=6)
    alone = sum(objective(one_group(batch, g)).loss.item() for g in range(6))
    assert abs(alone - objective(batch).loss.item()) > 1e-3
