"""Megatron-Core on a machine without a GPU.

`install()` does nothing where CUDA is available and is safe to call twice; call it before the first model is built.
This is the project's only file that changes how Megatron-Core finds its device; each change names the Megatron-Core
0.16.1 code that needs it. Faults that GPUs have too are in `mcore_fixes.py`.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class CpuDevice(TorchFunctionMode):
    """Reads 'cuda' as 'cpu' in every torch call: schedules.py, p2p_communication.py, clip_grads.py, layers.py,
    mappings.py, distrib_optimizer.py and rotary_pos_embedding.py spell out device="cuda", `.cuda()` or pin_memory."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is torch.Tensor.cuda:
            return args[0]
        if kwargs:
            kwargs = dict(kwargs)
            if str(kwargs.get("device")).startswith("cuda"):
                kwargs["device"] = "cpu"
            if kwargs.get("pin_memory"):
                kwargs["pin_memory"] = False
            return func(*args, **kwargs)
        result = func(*args)
        # clip_grads.py:90-174 and optimizer.py:473 accept only 'torch.cuda.*Tensor' as the name of a gradient's type
        if func is torch.Tensor.type and len(args) == 1:
            caller = sys._getframe(1).f_globals.get("__name__", "")
            if caller.startswith("megatron.core.optimizer"):
                return result.replace("torch.", "torch.cuda.", 1)
        return result


class InOrder:
    """Stands for torch.cuda.Stream and Event: work on a CPU is in order already."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __enter__(self) -> InOrder:
        return self

    def __exit__(self, *args: Any) -> None:
        pass

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: InOrder) -> float:
        return 0.0

    def _nothing(self, *args: Any, **kwargs: Any) -> InOrder:
        return self

    wait_stream = wait_event = record_event = record = wait = synchronize = _nothing


_mode: CpuDevice | None = None


def install() -> None:
    """Make Megatron-Core run on this CPU; nothing where CUDA is available."""
    global _mode
    if torch.cuda.is_available() or _mode is not None:
        return
    _stand_in_for_cuda()
    _one_random_generator()
    _counts_on_the_host()
    _mode = CpuDevice()
    _mode.__enter__()


def _stand_in_for_cuda() -> None:
    """Names of torch.cuda that Megatron-Core calls on every path, with what they mean on a CPU."""
    cuda: Any = torch.cuda
    cuda.current_device = lambda: torch.device("cpu")
    cuda.set_device = lambda device: None
    cuda.synchronize = cuda.empty_cache = lambda *args: None
    cuda.current_stream = cuda.default_stream = cuda.Stream = cuda.Event = InOrder
    cuda.stream = lambda stream: contextlib.nullcontext()


def _counts_on_the_host() -> None:
    """token_dispatcher.py brings the numbers of tokens per rank from the device to the host as numpy arrays, which
    torch's collectives take as sizes; moe_utils.py:maybe_move_tensor_to_cpu leaves tensors that are on the host already
    as tensors, which they do not take."""
    from megatron.core.transformer.moe import token_dispatcher

    def on_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    token_dispatcher.maybe_move_tensor_to_cpu = on_host


def _one_random_generator() -> None:
    """tensor_parallel/random.py keeps named states of the CUDA generator. torch queues such calls for the day CUDA
    starts, so without this they silently never run and tensor-parallel ranks would share dropout masks."""
    from megatron.core.tensor_parallel import random

    def get_state(*args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        torch.set_rng_state(state)

    cuda: Any = torch.cuda
    cuda.get_rng_state, cuda.set_rng_state, cuda.manual_seed = get_state, set_state, torch.manual_seed
    random._get_cuda_rng_state, random._set_cuda_rng_state = get_state, set_state
    # It warns that the CPU generator moved inside a CUDA fork; here they are one and the same.
    logging.getLogger(random.__name__).addFilter(lambda record: "CPU RNG state changed" not in record.getMessage())
