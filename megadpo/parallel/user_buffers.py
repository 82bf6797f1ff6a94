"""Tensor-parallel communication inside matrix products, by Transformer Engine's buffers that all ranks of a node see.

Not run on a device yet: what is here is what Megatron-LM does (megatron/training/initialize.py:
_initialize_tp_communicators), as it was read.
"""

from __future__ import annotations

import torch

from megadpo.config import ParallelConfig


def overlap_problem(parallel: ParallelConfig, device: torch.device, te: bool) -> str | None:
    """What keeps this machine from the overlap that the run file asks for; None: nothing, or nothing is asked for. te:
    whether the layers are Transformer Engine's."""
    if not parallel.tp_comm_overlap or (te and device.type == "cuda"):
        return None
    return (
        f"parallel.tp_comm_overlap = true: needs Transformer Engine's layers on GPUs; the device is a {device.type} "
        f"and the layers are {'' if te else 'not '}Transformer Engine's; leave it out"
    )


def start_user_buffers(parallel: ParallelConfig, rows: int, hidden_size: int, fp8: bool) -> None:
    """Make the buffers, once in a process and before the first pass; nothing where the run file does not ask for them.

    rows: of every stream. Two sets with fp8: layers in bf16, and passes that run in bf16, need their own.
    """
    if not parallel.tp_comm_overlap:
        return
    from transformer_engine.pytorch.module import base

    kinds = base.UserBufferQuantizationMode
    if base._ub_communicators is None:
        base.initialize_ub(
            shape=[rows, hidden_size],
            tp_size=parallel.tensor_model_parallel_size,
            quantization_modes=[kinds.FP8, kinds.NONE] if fp8 else [kinds.NONE],
            ub_cfgs={},
            bootstrap_backend="nccl",
        )
