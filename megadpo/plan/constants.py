"""Every number that the time model takes from outside, in one place: where it is from, or "assumed".

None was measured by this project. They are not fitted to anybody's published training speed either:
tools/plan_published.py compares, and leaves the differences standing.
"""

from __future__ import annotations

# ---- matrix products

GEMM_PEAK = 0.78
"""Share of a data sheet's bfloat16 peak that a large product gets. cuBLAS on an H200 at 8192^3: 769 to 798 of 989
TFLOP/s (linkedin/Liger-Kernel pull request 1356)."""
FP8_PEAK = {"delayed": 0.70, "tensorwise": 0.70, "blockwise": 0.55, "mxfp8": 0.70}
"""The same of the FP8 peak, by recipe, without the casts. Assumed: bfloat16's share less what operands of half the size
cost; blocks of 128 x 128 are scaled in software on Hopper."""
FP8_CAST_BYTES = {"delayed": 5, "tensorwise": 7, "blockwise": 6, "mxfp8": 6}
"""Memory traffic per element of an operand to bring it to FP8, in both orientations: read bfloat16 (2), write FP8 and
its transpose (2), scales and the backward pass's reading of the copy (1); tensorwise reads once more for the largest
number (2), blocks have more scales (1). Counted from the recipes; that it is not fused with a norm or activation is
assumed."""
TILE = 128
"""Side of the output tile of a product's kernel. The last wave of tiles is half empty on average. 128 is assumed."""
PROCESSORS = {"a100": 108, "h100": 132, "h200": 132, "b200": 148}
"""Streaming multiprocessors, by the beginning of the GPU's name. NVIDIA's architecture white papers."""
PROCESSORS_ELSE = 132
"""Of a GPU that is given in numbers: assumed."""
KERNEL_SECONDS = 4e-6
"""Start and end of a kernel on the device, where the host is ahead. Assumed."""
SMALL_KERNELS = 10
"""Kernels of a layer beside its products, in one pass: norms, rotary embedding, activation, additions. Counted."""

# ---- attention

ATTENTION_PEAK = 0.63
"""Share of the bfloat16 peak, forward, long causal segments, heads of 128: 616 of 989 TFLOP/s on an H100 at 16k (Shah
et al., FlashAttention-3, 2407.08608, figure 5; 623 in pytorch/benchmark pull request 2391)."""
ATTENTION_BACKWARD_PEAK = 0.50
"""Assumed: the same paper's backward passes are slower than its forward ones by a fifth to a quarter."""
ATTENTION_HALF_LENGTH = 450
"""Segments of so many rows get half of that: the same figure has 292, 423, 521, 579 TFLOP/s at 512, 1k,
2k, 4k."""
ATTENTION_BACKWARD = 2.5
"""Products of the backward pass over those of the forward: five of queries by keys against two."""

# ---- memory

MEMORY_PEAK = 0.85
"""Share of the memory bandwidth that a streaming kernel gets: 4.3 of 4.8 TB/s were copied on an H200 (0.9); less for
kernels that read several tensors. Assumed."""
OPTIMIZER_BYTES = 42
"""Memory traffic per parameter of the shard: norm (read gradient, 4), clipping (8), AdamW (read gradient, master, two
moments, 16; write three and the bfloat16 weight, 14). Counted from train/optimizer.py."""
ZERO_BYTES = 4
"""Per parameter of the rank: the gradient buffer is zeroed."""
RESERVE = 1 * 2**30
"""CUDA context and what libraries keep, bytes. Assumed."""
FRAGMENTATION = 0.04
"""Share of the device's memory that the allocator cannot use. Assumed."""

# ---- communication

LINK_SHARE = 0.80
"""Of NVLink's bandwidth in one direction that NCCL's large collectives get. Assumed."""
NETWORK_SHARE = 0.85
"""Of the network's. Assumed."""
LINK_SECONDS = 12e-6
"""Start of a collective within a node. Assumed."""
NETWORK_SECONDS = 25e-6
"""Start of a collective over nodes; HOP_SECONDS for each doubling of the nodes comes on top. Assumed."""
HOP_SECONDS = 5e-6
BUCKETS_LEFT = 40_000_000
"""Parameters of the last gradient bucket, whose exchange nothing can hide; Megatron-Core's default is max(40 M, 1 M x
data-parallel ranks) (distributed_data_parallel.py)."""
HOST_BANDWIDTH = 50e9
"""From pinned host memory to the device, bytes per second: PCIe 5 x16 has 64 by its standard. Assumed."""

# ---- head

HEAD_TRAFFIC_BYTES = 20
"""Per logit, forward and backward: float32 logits written and read by the row operations (kernels/README.md).
Counted."""

# ---- software

CUDA = "12.9"
"""That torch on the planned machine was built with: the oldest that has every FP8 recipe. Assumed."""

# ---- step

STEP_SECONDS = 0.02
"""What is left of a step: dealing, copies to the device, the read-back, Python between. Assumed."""

# ---- data, where the run's own are not prepared

ASSUMED_GROUPS = 60_000
ASSUMED_PROMPT = 250
"""Mean tokens, at most a quarter of data.max_length. Assumed; in the range of UltraFeedback's pairs."""
ASSUMED_RESPONSE = 350
"""Mean tokens, at most half of data.max_length. Assumed."""
ASSUMED_SPREAD = 0.7
"""Standard deviation of the logarithm of a length: lengths are log-normal, cut at data.max_length. Assumed."""
ASSUMED_LIST = 4
"""Responses of a ranked list. Assumed."""
