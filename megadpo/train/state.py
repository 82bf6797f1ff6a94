"""Everything that changes during a run, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer

from megadpo.model.policy import Policy


@dataclass
class TrainState:
    """step: batches done. consumed: groups taken from the stream, its whole cursor. skipped: batches of these that gave
    no update, as their numbers were not finite.

    There is no random state to keep: dropout is off and the data's order is a function of seed and epoch.
    """

    chunks: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    step: int = 0
    consumed: int = 0
    skipped: int = 0
    until_free: Callable[[], None] = lambda: None
    """Waits until nobody else reads weights and optimizer state (a save copies them); called before they change."""

    @property
    def modules(self) -> list[Policy]:
        """The bare model chunks."""
        return [chunk.module for chunk in self.chunks]
