"""Bins: every group once, within the budget, the same global batches on every grid, nearly the same cost."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megadpo.data.packing import Budget, deal, epoch_order, take

lengths = st.lists(st.integers(1, 100), min_size=1, max_size=60)


@settings(max_examples=200, deadline=None)
@given(lengths, st.integers(100, 300), st.integers(1, 8), st.integers(1, 4), st.one_of(st.none(), st.integers(1, 5)))
def test_every_group_once_within_the_budget(
    tokens: list[int], budget: int, ranks: int, multiple: int, most: int | None
) -> None:
    tokens_G = np.array(tokens)
    dealt = deal(tokens_G, tokens_G.astype(float) ** 2, Budget(budget, most), ranks, multiple)
    assert len(dealt) == ranks
    assert len({len(part) for part in dealt}) == 1, "ranks with different numbers of micro-batches would hang"
    assert len(dealt[0]) % multiple == 0
    assert len(dealt[0]) > 0
    bins = [bin_ for part in dealt for bin_ in part]
    assert sorted(group for bin_ in bins for group in bin_) == list(range(len(tokens)))
    assert all(tokens_G[list(bin_)].sum() <= budget for bin_ in bins)
    assert most is None or all(len(bin_) <= most for bin_ in bins)


@settings(max_examples=50, deadline=None)
@given(lengths, st.integers(0, 5))
def test_dealing_is_a_function_of_its_arguments(tokens: list[int], seed: int) -> None:
    tokens_G = np.array(tokens)
    once, again = (deal(tokens_G, tokens_G * 1.0, Budget(200), 2) for _ in range(2))
    assert once == again


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 30), st.integers(1, 7), st.integers(1, 4), st.integers(0, 3))
def test_every_epoch_uses_every_group_once(groups: int, size: int, epochs: int, seed: int) -> None:
    """Whatever the batch size, also where it does not divide the epoch."""
    consumed, seen = 0, []
    while consumed < groups * epochs:
        count = min(size, groups * epochs - consumed)
        part = take(groups, consumed, count, seed, shuffle=True)
        assert len(part) == count
        seen += part.tolist()
        consumed += count
    for epoch in range(epochs):
        assert sorted(seen[epoch * groups : (epoch + 1) * groups]) == list(range(groups))


def test_order_depends_on_seed_and_epoch() -> None:
    orders = [epoch_order(50, seed, epoch, True).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4
    assert epoch_order(50, 0, 0, True).tolist() == orders[0]
    assert epoch_order(50, 3, 9, False).tolist() == list(range(50))


def test_a_resumed_stream_goes_on_where_it_stopped() -> None:
    whole = take(13, 0, 40, 7, True)
    np.testing.assert_array_equal(np.concatenate([take(13, 0, 17, 7, True), take(13, 17, 23, 7, True)]), whole)


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_ranks_get_nearly_the_same_cost(ranks: int) -> None:
    """Log-normal lengths, as in real preference data; cost grows with the square."""
    rng = np.random.default_rng(0)
    tokens_G = np.clip(rng.lognormal(6, 0.6, 256), 16, 2048).astype(int)
    cost_G = tokens_G.astype(float) ** 2
    dealt = deal(tokens_G, cost_G, Budget(4096), ranks)
    loads = np.array([sum(cost_G[list(bin_)].sum() for bin_ in part) for part in dealt])
    assert loads.max() / loads.mean() < 1.05


def test_a_group_over_the_budget_is_an_error() -> None:
    with pytest.raises(ValueError, match="over the budget"):
        deal(np.array([5, 101]), np.ones(2), Budget(100), 1)
