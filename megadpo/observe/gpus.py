"""What GPUs can do by their makers' data sheets; peaks are of dense matrices, without sparsity."""

from __future__ import annotations

import re
from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """One GPU and its share of the machine that it usually sits in (8 to a node)."""

    name: str
    """As in `--gpu`."""
    memory: int
    """Bytes that the driver shows."""
    bf16_flops: float
    """Peak, per second."""
    fp8_flops: float | None
    """Peak, per second; None where it has no FP8."""
    memory_bandwidth: float
    """Bytes per second."""
    link_bandwidth: float
    """To the GPUs of its node, bytes per second in one direction (NVLink)."""
    network_bandwidth: float
    """To other nodes, bytes per second in one direction: one NIC per GPU."""
    capability: tuple[int, int]
    """Compute capability, by which FP8 recipes are refused."""
    per_node: int = 8


GPUS = {
    gpu.name: gpu
    for gpu in (
        # NVIDIA A100 80GB SXM data sheet (2021); HDR InfiniBand, 200 Gb/s
        Gpu("a100-80gb", 80 * GIB, 312e12, None, 2.039e12, 300e9, 25e9, (8, 0)),
        # NVIDIA H100 SXM data sheet (2023): 989.4 and 1978.9 without sparsity; NDR InfiniBand, 400 Gb/s
        Gpu("h100-80gb", int(79.6 * GIB), 989.4e12, 1978.9e12, 3.35e12, 450e9, 50e9, (9, 0)),
        # NVIDIA H200 SXM data sheet (2024)
        Gpu("h200", int(140.4 * GIB), 989.4e12, 1978.9e12, 4.8e12, 450e9, 50e9, (9, 0)),
        # NVIDIA HGX B200 data sheet (2025): 2.25 and 4.5 PFLOP/s without sparsity
        Gpu("b200", int(179 * GIB), 2.25e15, 4.5e15, 7.7e12, 900e9, 50e9, (10, 0)),
    )
}


def gpu_named(device_name: str) -> Gpu | None:
    """The row of a device by what CUDA calls it ("NVIDIA H100 80GB HBM3"); None where there is none."""
    said = set(re.findall(r"\w+", device_name.lower()))
    if said & {"pcie", "nvl", "mig"}:  # other clocks, other links; a slice
        return None
    sizes = {word for word in said if re.fullmatch(r"\d+gb", word)}
    for gpu in GPUS.values():
        kind, _, size = gpu.name.partition("-")
        if kind in said and (not size or not sizes or size in sizes):
            return gpu
    return None
