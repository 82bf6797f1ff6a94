"""Training of families whose norms are split or shared over tensor-parallel ranks: gradient norm and updated weights
are those of one rank."""

from dataclasses import replace
from pathlib import Path

import pytest
from distributed import run_ranks
from families_table import COMMON, write
from tiny import random_groups

from megadpo.data.packing import Budget
from train.engine import Case, assemble, run, worst

VOCAB = int(COMMON["vocab_size"])
NAMES = ("qwen3", "gemma3", "olmo2")
GRIDS = (
    {"tensor": 2},
    {"tensor": 2, "sequence": True, "distributed": True, "overlap": True},
    {"pipeline": 2, "distributed": True},
)


def test_two_ranks_train_as_one(tmp_path: Path) -> None:
    store = random_groups(11, vocab=VOCAB)
    bases = [Case(write(name, tmp_path / name), store, budget=Budget(400)) for name in NAMES]
    [single] = run_ranks(1, run, bases)
    results = run_ranks(2, run, [replace(base, **grid) for base in bases for grid in GRIDS])
    for number, name in enumerate(NAMES):
        want = assemble([single[number]], "weights", VOCAB)
        for index, grid in enumerate(GRIDS):
            ranks = [rank[number * len(GRIDS) + index] for rank in results]
            assert ranks[0]["grad_norms"] == pytest.approx(single[number]["grad_norms"], rel=1e-5), (name, grid)
            difference, key = worst(assemble(ranks, "weights", VOCAB), want)
            assert difference < 1e-5, f"{name} {grid}: {key} differs by {difference:.1e}"
