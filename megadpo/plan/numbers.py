"""What is known of one rank of a grid before it runs. Bytes and counts, of one rank, for one step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Group = Literal["tensor", "pipeline", "data", "expert", "expert data", "embedding", "model", "world"]
"""expert: ranks that a layer's experts are dealt to. expert data: replicas of the same experts. embedding: first and
last stage, where they share a tied weight. model: tensor x pipeline, for the gradient norm."""


@dataclass(frozen=True)
class Collective:
    """The calls of one kind in one group."""

    kind: str
    """all_gather, reduce_scatter, all_reduce, all_to_all, broadcast, send, recv."""
    group: Group
    ranks: int
    """In the group."""
    calls: int
    bytes: int
    """Of the whole tensor that a call is about (the larger of what goes in and what comes out), summed over calls."""


@dataclass(frozen=True)
class Memory:
    """Bytes on the device, at the fullest instant of a step."""

    weights: int
    gradients: int
    optimizer: int
    """Master weights and moments, this rank's shard."""
    reference: int
    """Weights of a resident or swapped reference."""
    activations: int
    """Of all micro-batches in flight, with the chosen recompute; and all that CUDA graphs hold."""
    logits: int
    """The head's working memory."""
    buffers: int
    """Communication, and what kernels need while they run."""

    @property
    def total(self) -> int:
        return sum(vars(self).values())


@dataclass(frozen=True)
class RankNumbers:
    """Of one rank."""

    rank: int
    stage: int
    """Pipeline stage."""
    parameters: int
    memory: Memory
    collectives: tuple[Collective, ...]
    """In a fixed order. A group of one rank moves nothing and is left out."""
    flops: float = 0.0
    """Of the linear layers and the head, as they are executed: padding, recomputed layers and a resident reference's
    pass included. Attention is left out: it depends on how groups share a stream. A multiply-add is two."""
