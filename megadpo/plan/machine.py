"""What products, streams of memory and collectives take on a GPU: seconds from sizes. Pure functions."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megadpo.observe.gpus import Gpu
from megadpo.plan import constants as c


@dataclass(frozen=True)
class Device:
    """A GPU and how its matrix products of the layers run."""

    gpu: Gpu
    fp8: str | None = None
    """Recipe; None: bfloat16."""

    @property
    def processors(self) -> int:
        starts = [count for name, count in c.PROCESSORS.items() if self.gpu.name.startswith(name)]
        return starts[0] if starts else c.PROCESSORS_ELSE

    def product(self, rows: float, columns: float, inner: float, fp8: bool = False, batches: float = 1) -> float:
        """Seconds of `batches` products [rows, inner] x [inner, columns] in one kernel.

        Work over the rate that a large product gets, and half a wave of tiles: the last wave is half empty on average.
        Never less than reading the operands and writing the result takes. fp8: as `self.fp8` says, casts left out.
        """
        recipe = self.fp8 if fp8 else None
        peak = self.gpu.bf16_flops * c.GEMM_PEAK
        if recipe is not None:
            assert self.gpu.fp8_flops is not None, self.gpu.name
            peak = self.gpu.fp8_flops * c.FP8_PEAK[recipe]
        seconds = 2 * batches * rows * columns * inner / peak
        seconds += self.processors * c.TILE**2 * inner / peak  # half of 2 flops x tile area x inner, on every processor
        size = 1 if recipe is not None else 2
        moved = batches * (size * inner * (rows + columns) + 2 * rows * columns)
        return max(seconds, self.stream(moved)) + c.KERNEL_SECONDS

    def cast(self, elements: float) -> float:
        """Seconds to bring an operand to FP8; 0 in bfloat16."""
        return 0.0 if self.fp8 is None else self.stream(elements * c.FP8_CAST_BYTES[self.fp8]) + c.KERNEL_SECONDS

    def stream(self, bytes_: float) -> float:
        """Seconds of reading and writing so many bytes of the GPU's memory."""
        return bytes_ / (self.gpu.memory_bandwidth * c.MEMORY_PEAK)

    def attention(self, flops: float, area: float, rows: float) -> float:
        """Seconds of the forward products over `area` attended pairs of `rows` rows, `flops` in all."""
        if not area:
            return 0.0
        length = 2 * area / max(rows, 1)  # of causal segments with as many pairs per row
        return flops / (self.gpu.bf16_flops * c.ATTENTION_PEAK) * (1 + c.ATTENTION_HALF_LENGTH / length)

    def attention_backward(self, flops: float, area: float, rows: float) -> float:
        share = c.ATTENTION_BACKWARD * c.ATTENTION_PEAK / c.ATTENTION_BACKWARD_PEAK
        return self.attention(flops, area, rows) * share


@dataclass(frozen=True)
class Wire:
    """A group of ranks as the network sees it."""

    ranks: int
    nodes: int
    bandwidth: float
    """Bytes per second that go into a rank."""
    start: float
    """Seconds before the first byte."""

    def seconds(self, kind: str, calls: float, bytes_: float) -> float:
        """Of `calls` collectives about `bytes_` bytes in all (of the whole tensor). In a ring everyone gets what the
        others have, once (all-gather, reduce-scatter) or twice (all-reduce).
        """
        if self.ranks == 1 or not calls:
            return 0.0
        others = (self.ranks - 1) / self.ranks
        factor = {"all_reduce": 2 * others, "send": 1.0, "recv": 1.0, "broadcast": 1.0}.get(kind, others)
        return calls * self.start + factor * bytes_ / self.bandwidth


def wire(gpu: Gpu, ranks: int, stride: int, world: int) -> Wire:
    """A group of `ranks` ranks that stand `stride` apart, of a world that fills its nodes in order.

    Over nodes, NCCL runs a ring over each NIC; a group with several ranks in a node has as many NICs, up to what the
    links within the node carry. (tensor groups: stride 1; data: tensor size; pipeline: tensor x data.)
    """
    inside = ranks if world <= gpu.per_node else min(max(gpu.per_node // stride, 1), ranks)  # of the group, in one node
    nodes = -(-ranks // inside)
    link = gpu.link_bandwidth * c.LINK_SHARE
    if nodes == 1:
        return Wire(ranks, 1, link, c.LINK_SECONDS)
    network = gpu.network_bandwidth * c.NETWORK_SHARE * inside
    start = c.NETWORK_SECONDS + c.HOP_SECONDS * math.log2(nodes)
    return Wire(ranks, nodes, min(link, network), start)
