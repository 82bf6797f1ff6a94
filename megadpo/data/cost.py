"""What each group costs: what the dealing balances over the data-parallel ranks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megadpo.data.batch import attention_area, scored_rows, stream_tokens
from megadpo.data.mismatch import MismatchedStore
from megadpo.data.store import GroupStore


@dataclass(frozen=True)
class Cost:
    """In units of one row's linear layers. `model.flops.group_cost` gives a model's."""

    pair: float = 0.0
    """Of a pair of rows of which one attends to the other, in all layers."""
    scored: float = 0.0
    """Of a row that meets the head."""
    window: int | None = None
    """Rows that a layer with a window attends to, where the model has such layers."""
    windowed: float = 0.0
    """Their share of the layers."""

    def of(self, store: GroupStore | MismatchedStore, share: bool = True, scalar: bool = False) -> np.ndarray:
        """float64 [G]. share: whether a prompt stands once for all its responses; scalar: for a reward model."""
        attention = self.pair * self.attended_pairs(store, share, scalar)
        return stream_tokens(store, share, scalar) + attention + self.scored * scored_rows(store, scalar)

    def attended_pairs(
        self, store: GroupStore | MismatchedStore, share: bool = True, scalar: bool = False
    ) -> np.ndarray:
        """float64 [G]: pairs of rows of each group of which one attends to the other, the mean over the layers: those
        with a window count what is inside it."""
        whole = attention_area(store, share, scalar)
        if self.window is None:
            return whole
        inside = attention_area(store, share, scalar, self.window)
        return (1 - self.windowed) * whole + self.windowed * inside
