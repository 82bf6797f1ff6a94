"""How fast a step was, in the terms of the training log and of `megadpo bench`. docs/bench.md has the formulas."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from megadpo.convert.shape import ModelShape
from megadpo.data.batch import stream_tokens
from megadpo.data.packing import Bin
from megadpo.data.stream import Stream
from megadpo.model.flops import TRAINING, attended_pairs, forward_flops
from megadpo.observe.gpus import GIB, gpu_named
from megadpo.parallel.context import ParallelContext


@dataclass(frozen=True)
class Meter:
    """The speed of the steps of one stream. "per GPU" is per rank, where there is none."""

    shape: ModelShape
    stream: Stream
    ranks: int
    """Of the world."""
    peak: float | None
    """Operations that a rank's device can do in a second; None where that is not known."""

    @staticmethod
    def of(shape: ModelShape, stream: Stream, dtype: str, context: ParallelContext) -> Meter:
        """Of a run on this rank's device; all are taken to be of one kind."""
        return Meter(shape, stream, context.world_size, peak_flops(context.device, dtype))

    @cached_property
    def useful_G(self) -> np.ndarray:
        """float64, operations of each group's forward pass outside the head, over all ranks. Its prompt counts once,
        whether it stands once in the stream or not."""
        flops, scalar = forward_flops(self.shape), self.shape.head != "vocabulary"
        rows = stream_tokens(self.stream.store, scalar=scalar)
        return flops.forward(1, 0, 0) * rows + flops.forward(0, 1, 0) * attended_pairs(self.shape, self.stream.store)

    def useful(self, groups: list[int], scored: int) -> float:
        """Operations of these groups' forward and backward pass, over all ranks; `scored`: their rows in the head."""
        return TRAINING * (float(self.useful_G[groups].sum()) + forward_flops(self.shape).forward(0, 0, scored))

    def step(self, bins: list[list[Bin]], scored: int, seconds: float, memory: float) -> dict[str, float]:
        """Of a global batch, dealt as `bins`. memory: bytes, the most that a rank has had."""
        filling = self.stream.filling(bins)
        groups = [group for part in bins for bin_ in part for group in bin_]
        rates = {"tokens": filling.rows, "scored_tokens": scored, "pairs": len(groups)}
        done = self.useful(groups, scored) / seconds / self.ranks
        return {
            "num_tokens": filling.rows,
            "padding_fraction": filling.padding_fraction,
            "prompt_tokens_saved": filling.prompt_tokens_saved,
            "load_imbalance": filling.load_imbalance,
            "seconds": seconds,
            **{f"{what}_per_second": count / seconds for what, count in rates.items()},
            **{f"perf/{what}_per_second_per_gpu": count / seconds / self.ranks for what, count in rates.items()},
            "perf/tflops_per_gpu": done / 1e12,
            **({"perf/mfu": done / self.peak} if self.peak else {}),
            "perf/peak_memory_gib": memory / GIB,
        }


def peak_flops(device: torch.device, dtype: str) -> float | None:
    """Operations per second by the device's data sheet, of dense bfloat16 matrices; None for a device that is not in
    the table, and for other dtypes. FP8 training counts against it too, so that its gain shows."""
    if device.type != "cuda" or dtype != "bfloat16":
        return None
    gpu = gpu_named(torch.cuda.get_device_name(device))
    return None if gpu is None else gpu.bf16_flops
