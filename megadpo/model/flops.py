"""Floating-point operations of a model: what MFU, the planner and the benchmark count. A multiply-add is two.

Only matrices count: linear layers, attention's two products, the head. A row of the packed stream counts once, so a
prompt that stands once for all its responses counts once; padding and recomputed layers do not count; the head counts
for scored rows only. (Norms, rotary embedding and softmax are under 1%.)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megadpo.convert.shape import ModelShape
from megadpo.data.cost import Cost
from megadpo.data.mismatch import MismatchedStore
from megadpo.data.store import GroupStore

TRAINING = 3
"""Forward passes' worth of work in forward and backward: each product has two in the backward pass."""


@dataclass(frozen=True)
class Flops:
    """Of one forward pass."""

    per_row: float
    """Linear layers of all layers, per row of the stream; of experts, those that a token goes to."""
    per_pair: float
    """Attention of all layers, per pair of rows of which one attends to the other, as if no layer had a window."""
    per_scored: float
    """The head, per scored row."""

    def forward(self, rows: float, pairs: float, scored: float) -> float:
        return self.per_row * rows + self.per_pair * pairs + self.per_scored * scored


def forward_flops(shape: ModelShape) -> Flops:
    """Of the whole model, over all ranks."""
    outputs = shape.vocab_size if shape.head == "vocabulary" else 1
    return Flops(
        per_row=2 * shape.num_layers * shape.linear_multiplications,
        per_pair=2 * shape.num_layers * shape.pair_multiplications,
        per_scored=2 * shape.hidden_size * outputs,
    )


def group_cost(shape: ModelShape) -> Cost:
    """What groups cost, for dealing them to ranks: linear layers, attention and head by their operations."""
    flops, window = forward_flops(shape), shape.window
    pair, scored = flops.per_pair / flops.per_row, flops.per_scored / flops.per_row
    if window is None:
        return Cost(pair, scored)
    return Cost(pair, scored, window.size, sum(window.layers) / shape.num_layers)


def attended_pairs(shape: ModelShape, store: GroupStore | MismatchedStore) -> np.ndarray:
    """float64 [G]: pairs of rows of each group of which one attends to the other, the mean over the layers: those with
    a window count what is inside it. The prompt stands once."""
    return group_cost(shape).attended_pairs(store, scalar=shape.head != "vocabulary")
