"""What each step of a run trains on, and the reference that it is compared with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from megadpo.data.batch import PackedBatch
from megadpo.data.packing import Bin
from megadpo.data.stream import Scored
from megadpo.parallel.context import ParallelContext


@dataclass(frozen=True)
class Portion:
    """A global batch, and this rank's part of it."""

    groups: np.ndarray
    """int64: store numbers, of all ranks."""
    bins: list[list[Bin]]
    """Micro-batches of every rank."""
    batches: Sequence[PackedBatch]
    """This rank's."""
    mismatched: Sequence[PackedBatch] | None
    """For objectives that need `mismatched_kl`: its responses behind other prompts."""


class Portions:
    """A run's portions by place, which is the groups consumed before. size: groups of a global batch; end: of the run,
    whose last portion is what is left. reference: chunks of a resident one."""

    def __init__(
        self, train: Scored, size: int, end: int, context: ParallelContext, reference: Sequence[Any] | None = None
    ) -> None:
        self.resident = None if reference is None else list(reference)
        self.context = context
        self.end = end
        self._train, self._size = train, size

    def plain(self, consumed: int) -> Portion | None:
        """With what a stored column says of it; None at the end of the run."""
        count = min(self._size, self.end - consumed)
        if count <= 0:
            return None
        stream, rank = self._train.stream, self.context.data_rank
        groups = stream.next_groups(consumed, count)
        bins = stream.bins(groups)
        batches = stream.pack(bins[rank], self._train.column)
        return Portion(groups, bins, batches, self._train.mismatched_batches(consumed, count, rank))

    def at(self, consumed: int) -> Portion:
        """What the step at this place trains on."""
        portion = self.plain(consumed)
        assert portion is not None, "the run has no step behind its end"
        return portion

    def prepare(self, consumed: int) -> None:
        """Begin what the step at this place will wait for; called when memory is free."""

    @contextmanager
    def reference(self) -> Iterator[list[Any] | None]:
        """The reference's chunks, usable inside, where there are any."""
        yield self.resident
