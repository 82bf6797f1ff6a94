"""Tokens drawn from the policy's top k: which may come, how often, and the same on every grid."""

import pytest
import torch
import torch.distributed as dist
from cases import inputs
from distributed import run_ranks
from megadpo_kernels import LogitOptions, VocabShard, draw_rivals

PLACE = VocabShard(0, 101, None)


def test_only_the_likeliest_others_come_as_often_as_they_should() -> None:
    """20 000 keys at one row, for a target among the top k and for one that is not."""
    draws, k = 20_000, 5
    given = inputs(1, 16, 101, scale=1.5)
    options = LogitOptions(multiplier=0.7, soft_cap=5.0, temperature=1.3)
    z = 5 * torch.tanh(given.hidden_ND @ given.weight_VD.t() * 0.7 / 5) / 1.3
    order = z[0].argsort(descending=True)
    for target in (order[2], order[50]):
        found = draw_rivals(
            given.hidden_ND.repeat(draws, 1),
            given.weight_VD,
            target.repeat(draws),
            torch.arange(draws),
            k,
            PLACE,
            options=options,
        )
        allowed = order[order != target][:k]
        want = z[0, allowed].softmax(0)
        got = torch.stack([(found == token).float().mean() for token in allowed])
        assert got.sum() == pytest.approx(1)
        assert ((got - want).abs() < 4.5 * (want * (1 - want) / draws).sqrt()).all()


def split(device: torch.device, valid: int, rows: int) -> list[torch.Tensor]:
    """Draws with hidden whole and split by rows."""
    group = dist.group.WORLD
    given = inputs(24, 16, valid, scale=2)
    weight = torch.cat([given.weight_VD, torch.full((rows - valid, 16), 5.0)]).chunk(group.size())[group.rank()]
    scored = torch.tensor([3, 3, *range(19)])
    results = []
    for sequence in (False, True):
        hidden = given.hidden_ND.chunk(group.size())[group.rank()] if sequence else given.hidden_ND
        shard = VocabShard(group.rank() * len(weight), valid, group, sequence)
        results.append(
            draw_rivals(
                hidden, weight, given.targets_N[scored], torch.arange(21) ** 3, 7, shard, rows_N=scored, chunk=8
            )
        )
    return results


@pytest.mark.parametrize(("valid", "rows"), [(101, 104), (30, 120), (5, 6)])
def test_split_over_ranks(valid: int, rows: int) -> None:
    """Padded; with a rank that has not one real column; with fewer tokens than k."""
    given = inputs(24, 16, valid, scale=2)
    scored = torch.tensor([3, 3, *range(19)])
    targets = given.targets_N[scored]
    whole = VocabShard(0, valid, None)
    want = draw_rivals(given.hidden_ND, given.weight_VD, targets, torch.arange(21) ** 3, 7, whole, rows_N=scored)
    assert (want != targets).all()
    assert want.max() < valid
    assert len(want.unique()) > 2
    for rank in run_ranks(2, split, valid, rows):
        for got in rank:
            assert torch.equal(got, want)


def test_another_key_is_another_draw() -> None:
    given = inputs(400, 16, 101)
    one, two = (
        draw_rivals(given.hidden_ND, given.weight_VD, given.targets_N, torch.arange(400) + start, 50, PLACE)
        for start in (0, 400)
    )
    assert (one == two).float().mean() < 0.2


@pytest.mark.parametrize(("top_k", "keys"), [(0, torch.arange(3)), (2, torch.arange(4)), (2, torch.zeros(3))])
def test_what_cannot_work_is_refused(top_k: int, keys: torch.Tensor) -> None:
    given = inputs(3, 16, 101)
    with pytest.raises(ValueError, match="need at least 1, and int64"):
        draw_rivals(given.hidden_ND, given.weight_VD, given.targets_N, keys, top_k, PLACE)
