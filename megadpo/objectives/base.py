"""What every objective gets and gives.

Axes: G groups, S sequences (responses), response k of group g is row ``offsets_G1[g] + k``. Units: nats.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from megadpo_kernels import Backend
from torch import Tensor


@dataclass(frozen=True)
class Sequences:
    """Sums over the responses of one micro-batch.

    policy_S:    float32 [S], log-probability of each response under the policy; carries the gradient.
    reference_S: float32 [S], the same under the reference; None for objectives that need none.
    tokens_S:    int64 [S], scored tokens of each response, the end-of-sequence token included.
    offsets_G1:  int64 [G + 1], where each group's responses start; chosen first, then rejected.
    backend:     where it is triton, an objective that has a fused kernel uses it.
    """

    policy_S: Tensor
    reference_S: Tensor | None
    tokens_S: Tensor
    offsets_G1: Tensor
    backend: Backend = "auto"


@dataclass(frozen=True)
class Outcome:
    """loss: scalar sum that carries the gradient. count: what it is divided by, once, globally (int, scalar).
    metrics: float32 [len(objective.metrics)], detached sums; each is divided by the global count of groups."""

    loss: Tensor
    count: Tensor
    metrics: Tensor


class Objective(Protocol):
    """A frozen dataclass: its fields are its hyper-parameters, calling it is its formula."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def needs_reference(self) -> bool: ...

    @property
    def responses(self) -> int | None:
        """How many responses a group must have; None: any number."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of what `Outcome.metrics` carries, in its order."""

    def problems(self) -> list[str]:
        """What is wrong with its settings, one line each; checked when the run file is read."""

    def __call__(self, sequences: Sequences) -> Outcome: ...
