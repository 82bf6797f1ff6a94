"""Losses that stand out from those before them."""

from __future__ import annotations

import math
import statistics
from collections import deque

WINDOW = 128
LEAST = 32
"""Losses that must be known before one can stand out."""
SIGMAS = 6.0


class Spikes:
    """Tells a loss that is over the mean of the last WINDOW by more than SIGMAS standard deviations."""

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=WINDOW)

    def note(self, loss: float) -> str | None:
        """A sentence where this loss is a spike. It counts among the ones before the next in any case."""
        text = None
        if len(self._losses) >= LEAST and math.isfinite(loss):
            mean, sigma = statistics.fmean(self._losses), statistics.pstdev(self._losses)
            if loss > mean + SIGMAS * max(sigma, 1e-6):
                text = (
                    f"the loss {loss:.4f} is a spike: {mean:.4f} +- {sigma:.4f} in the {len(self._losses)} steps before"
                )
        if math.isfinite(loss):
            self._losses.append(loss)
        return text
