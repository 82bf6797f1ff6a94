"""One rank of any world in this process, on tensors that have shapes and no data.

torch's fake process group says that the others are there and moves nothing; FakeTensorMode computes shapes and dtypes
only. Everything else is the code that trains: Megatron-Core's groups, our model, its schedule, its optimizer. What
differs from a real rank is in this file, each with its reason, and is undone at the end of the with-block.

A rank with a GPU is told that its device is one, so attention, fusions and Megatron-Core's settings are chosen as
there. The tensors are on the CPU all the same: torch's autograd refuses fake ones on CUDA where it is built without.
What looks at a tensor's own device, ours and torch's, is given the GPU's way below.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megadpo_kernels import gemm, logprob
from megatron.core import parallel_state
from megatron.core.fusions import fused_bias_swiglu
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.optimizer import clip_grads
from megatron.core.tensor_parallel import random
from megatron.core.transformer.moe import token_dispatcher
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megadpo.config import ParallelConfig
from megadpo.errors import MachineError
from megadpo.model import norms
from megadpo.model.experts import ExpertChoice
from megadpo.parallel import cpu_host, mcore_fixes
from megadpo.parallel.context import ParallelContext, grid

aten, c10d = torch.ops.aten, torch.ops.c10d


@contextmanager
def fake_rank(parallel: ParallelConfig, world_size: int, rank: int, gpu: bool = True) -> Iterator[ParallelContext]:
    """Inside, this process is rank `rank` of `world_size`, and new tensors are fake.

    gpu: as a rank with a GPU; otherwise as one on a CPU. The grid fits the world. Raises MachineError inside a process
    group.
    """
    if dist.is_initialized():
        raise MachineError("planning needs a process of its own: this one is in a process group already")
    cpu_host.install()
    mcore_fixes.install()
    device = torch.device("cuda", 0) if gpu else torch.device("cpu")
    with ExitStack() as undo:
        undo.callback(torch.set_rng_state, torch.get_rng_state())
        for owner, name, value in departures(gpu):
            undo.enter_context(replaced(owner, name, value))
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
        undo.callback(dist.destroy_process_group)
        undo.callback(RotaryEmbedding.forward.cache_clear)  # it holds fake tables, and the models they belong to
        context = undo.enter_context(grid(parallel, device, seed=0))
        undo.enter_context(NoDevice())
        # compiled functions would be compiled for the fake device; eager ones have the same results
        undo.enter_context(torch.compiler.set_stance("force_eager"))
        undo.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        undo.enter_context(NoData())
        yield context


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Another value for an attribute, for the length of a with-block."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


class NoDevice(cpu_host.CpuDevice):
    """As on a machine without a GPU, reads 'cuda' as 'cpu'; also in `.to(device)`, where the device is ours."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is Tensor.to and len(args) > 1 and isinstance(args[1], torch.device):
            args = (args[0], torch.device("cpu"), *args[2:])
        elif func is Tensor.type and len(args) == 1:  # as in cpu_host; here nobody else asks
            return "torch.cuda." + func(*args).rpartition(".")[2]
        return super().__torch_function__(func, types, args, kwargs)


# ---- what reads data


class NoData(TorchDispatchMode):
    """What fake tensors cannot do, because the result's shape, or a number for Python, depends on data.

    Real tensors are let be: what is computed from real ones alone is real. Only a micro-batch (lengths, rows, masks)
    and what comes from Python's numbers are, so what the host looks up in them is as in a run.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func in STAND_INS:
            return STAND_INS[func](*args, **kwargs)
        if FakeTensor not in types and any(isinstance(leaf, Tensor) for leaf in tree_leaves((args, kwargs))):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        return func(*args, **kwargs)


def _number(tensor: Tensor) -> bool | int | float:
    """.item(): the number where it is known, else 1. A finite loss and gradient norm, so that the step goes on."""
    known = getattr(tensor, "constant", None) if isinstance(tensor, FakeTensor) else tensor
    if known is not None:
        with unset_fake_temporarily():
            return known.item()
    return True if tensor.dtype == torch.bool else 1.0 if tensor.is_floating_point() else 1


def _masked_select(values: Tensor, mask: Tensor) -> Tensor:
    """The mask is real (`even_choice`)."""
    with unset_fake_temporarily():
        count = int(mask.expand(values.shape).sum())
    return values.new_empty(count)


def _segment_reduce(data: Tensor, reduce: str, *, lengths: Tensor, **_: Any) -> Tensor:
    return data.new_empty(lengths.shape)


def _segment_reduce_backward(grad: Tensor, output: Tensor, data: Tensor, *_: Any, **__: Any) -> Tensor:
    return torch.empty_like(data)


def _reduce_each(tensors: list[Tensor], group: Any, operation: Any, *_: Any) -> Any:
    """torch's coalesced collectives have no rule for fake tensors; one by one they have."""
    return c10d.allreduce_.default(tensors, group, operation, None)[1]


def _scatter_each(outputs: list[Tensor], inputs: list[Tensor], group: Any, operation: Any, *_: Any) -> Any:
    pairs = zip(outputs, inputs, strict=True)
    return [c10d._reduce_scatter_base_.default(out, given, group, operation)[1] for out, given in pairs][-1]


def _gather_each(outputs: list[Tensor], inputs: list[Tensor], group: Any, *_: Any) -> Any:
    pairs = zip(outputs, inputs, strict=True)
    return [c10d._allgather_base_.default(out, given, group)[1] for out, given in pairs][-1]


STAND_INS: dict[Any, Callable] = {
    aten._local_scalar_dense.default: _number,
    aten.masked_select.default: _masked_select,
    aten.masked_scatter.default: lambda values, mask, source: torch.empty_like(values),
    aten.segment_reduce.default: _segment_reduce,
    aten._segment_reduce_backward.default: _segment_reduce_backward,
    c10d.allreduce_coalesced_.default: _reduce_each,
    c10d.reduce_scatter_tensor_coalesced_.default: _scatter_each,
    c10d.allgather_into_tensor_coalesced_.default: _gather_each,
}


# ---- what Megatron-Core and torch do otherwise


def departures(gpu: bool) -> list[tuple[Any, str, Any]]:
    """(module or class, name, what stands there instead)."""
    found: list[tuple[Any, str, Any]] = [
        # groups of another back end (gloo, beside NCCL) would look for their ranks
        (parallel_state, "create_group", _any_backend(parallel_state.create_group)),
        # it pickles into tensors and reads lengths back; all ranks are alike
        (dist, "all_gather_object", _alike),
        # random states are data; nothing is drawn, as dropout is off
        (random, "_get_all_rng_states", lambda: (None, None, {})),
        (random, "_set_all_rng_states", lambda *states: None),
        # the one without Transformer Engine makes a tensor of Python's numbers, that with it calls a kernel
        (clip_grads, "l2_norm_impl", _norm),
        # how many tokens go to which expert decides shapes
        (ExpertChoice, "routing", even_choice(ExpertChoice.routing)),
        (token_dispatcher, "gather_from_sequence_parallel_region", _counts_of_all()),
        (token_dispatcher, "maybe_move_tensor_to_cpu", _on_host),
        # what Megatron-Core makes on the current device is on the CPU, also where there is a GPU
        (torch.cuda, "current_device", lambda: torch.device("cpu")),
        *_without_te(),
    ]
    return found + (_gpu_ways() if gpu else [])


def _gpu_ways() -> list[tuple[Any, str, Any]]:
    """What chooses by a tensor's device, and kernels that keep less than the operations they stand for."""
    of_gpu = torch.device("cuda")
    limits = logprob.limits
    return [
        (logprob, "limits", lambda columns, device: limits(columns, of_gpu)),
        # cuBLAS takes 16-bit operands and writes float32
        (gemm, "logits_into", _product_into),
        (gemm, "hidden_gradient", _hidden_gradient),
        (gemm, "add_weight_gradient", lambda total, slope, hidden: _product_into(total, slope.t(), hidden.t())),
        # one kernel, which keeps its input and a number per row
        (norms, "rms_norm", lambda x, shape, weight, eps: FusedNorm.apply(x, weight)),
        # the fused optimizers of Transformer Engine and Apex have no intermediate results; torch's AdamW needs another
        # float32 number for every parameter that it updates
        (mcore_fixes.StatelessStepAdam, "step", lambda self, closure=None: None),
        # compiled to one kernel each
        (fused_bias_swiglu, "swiglu", _swiglu),
        (fused_bias_swiglu, "swiglu_back", lambda grad, y: torch.empty_like(y)),
    ]


def _product_into(out_MV: Tensor, left_MD: Tensor, right_VD: Tensor) -> None:
    """left @ right^T, as far as a recorder sees it."""
    aten.mm.out(left_MD, right_VD.t(), out=out_MV.view(left_MD.dtype)[:, : len(right_VD)])


def _hidden_gradient(slope_MV: Tensor, weight_VD: Tensor) -> Tensor:
    """slope @ weight in float32, as far as a recorder sees it."""
    out_MD = torch.empty(len(slope_MV), weight_VD.shape[1], dtype=torch.float32, device=slope_MV.device)
    _product_into(out_MD, slope_MV, weight_VD.t())
    return out_MD


class FusedNorm(torch.autograd.Function):
    """torch's RMSNorm on a GPU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


def _without_te() -> list[tuple[Any, str, Any]]:
    """Transformer Engine's and Apex's kernels take no fake tensors: layers and optimizer are those without them."""
    import megatron.core.optimizer as optimizers
    import megatron.core.optimizer.distrib_optimizer as distributed
    from megatron.core.transformer import multi_latent_attention
    from megatron.core.transformer.moe import moe_utils
    from megatron.core.utils import local_multi_tensor_applier, local_multi_tensor_scale

    return [
        (mcore_fixes, "have_te", lambda: False),
        (mcore_fixes, "have_apex_gradients", lambda: False),
        (optimizers, "Adam", mcore_fixes.StatelessStepAdam),
        (distributed, "Adam", mcore_fixes.StatelessStepAdam),
        (clip_grads, "multi_tensor_applier", local_multi_tensor_applier),
        (clip_grads, "multi_tensor_scale_impl", local_multi_tensor_scale),
        (multi_latent_attention, "HAVE_TE", False),
        (moe_utils, "te_general_gemm", None),
    ]


def _any_backend(create_group: Callable) -> Callable:
    def create(*args: Any, backend: str | None = None, **kwargs: Any) -> Any:
        return create_group(*args, **kwargs)

    return create


def _alike(found: list, value: Any, group: Any = None) -> None:
    found[:] = [value] * len(found)


def _norm(chunk_size: int, flag: Tensor, lists: list[list[Tensor]], *_: Any) -> tuple[Tensor, None]:
    return torch.stack([tensor.norm() for tensor in lists[0]]).norm().reshape(1), None


def _swiglu(y: Tensor) -> Tensor:
    return y.new_empty(*y.shape[:-1], y.shape[-1] // 2)


def even_choice(routing: Callable) -> Callable:
    """The router with a choice that is real, and even: token t goes to the experts that follow t x tokens' experts."""

    def choose(self: ExpertChoice, logits: Tensor) -> tuple[Tensor, Tensor]:
        weights, chosen = routing(self, logits)
        with unset_fake_temporarily():
            tokens, experts = chosen.shape
            per_token = self.experts.per_token
            first = torch.arange(tokens)[:, None] * per_token
            every = torch.zeros(tokens, experts, dtype=torch.bool)
            every.scatter_(1, (first + torch.arange(per_token)) % experts, True)
        return weights, every

    return choose


def _counts_of_all() -> Callable:
    """Megatron-Core's gather over ranks. Real numbers (tokens per expert) stay real: every rank has the same."""
    original = token_dispatcher.gather_from_sequence_parallel_region

    def gather(values: Tensor, *args: Any, group: Any = None, **kwargs: Any) -> Tensor:
        everyone = original(values, *args, group=group, **kwargs)
        return everyone if isinstance(values, FakeTensor) else values.repeat(group.size())

    return gather


def _on_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor
