"""Faults of Megatron-Core 0.16 that run and give wrong numbers, or hang, and what guards against each.

They are not faults of the CPU: the same code runs on GPUs. Each guard is shown by tests/parallel/test_mcore_fixes.py.

* Two pipeline ranks with virtual stages and batched messages get activations and gradients swapped
  (p2p_communication.py): `refuse`.
* `fully_reshardable` saves optimizer state shifted where several gradient buckets are padded (distrib_optimizer.py):
  `strip_bucket_padding`.
* Without TE and Apex, a load gives all parameters one `step` tensor (distrib_optimizer.py:825): `stateless_step_adam`.
* Without TE, fp8, fp8_param and tp_comm_overlap are ignored: `refuse`.
* The checkpoint format that is chosen by default cannot be saved: `checkpoint.METADATA`.
* `dist_checkpointing.save` hangs for ever without psutil (filesystem_async.py): `require_psutil`.
* A killed trainer leaves a manager process behind that keeps its terminal (filesystem_async.py): `queue_here`.
* Without CUDA, named random states are never applied (tensor_parallel/random.py): `cpu_host`.
* Without TE, routers call a kernel of it that is not there (moe_utils.py): `route_without_te`.
* Without TE, latent attention compares layers with TE's classes, which are None (multi_latent_attention.py):
  `latent_without_te`.
* With TE and without Apex, heads refuse fused gradients, which are TE's layers' to make (tensor_parallel/layers.py):
  `fuse_with_te`.
* Weights that are not initialised are not marked as split and miss in the gradient norm (tensor_parallel/layers.py):
  `model.build.mark_tensor_parallel`.
* Experts' biases are summed over tensor-parallel ranks under sequence parallelism, though each rank has other experts
  (tensor_parallel/layers.py); experts that are neither split nor dealt out are not summed where they should be (the
  same); the bias is added in place to what autograd calls a view (mlp.py): `model.build.mark_experts`,
  `parallel.context.expert_tensor_size`, `model.experts`, all shown by tests/train/test_experts.py.
* Latent attention counts positions from the start of the stream, and without TE does not sum the rotary key's gradient
  over tensor-parallel ranks (multi_latent_attention.py): `model.latent`, shown by tests/train/test_experts.py.
"""

from __future__ import annotations

import inspect
import queue
from typing import Any

import torch
from megatron.core.transformer import TransformerConfig

from megadpo.errors import ConfigError, MachineError


def install() -> None:
    """Guard against the faults that configuration alone cannot avoid. Safe to call twice."""
    require_psutil()
    queue_here()
    strip_bucket_padding()
    stateless_step_adam()
    route_without_te()
    latent_without_te()
    fuse_with_te()


def have_te() -> bool:
    """Whether Megatron-Core found Transformer Engine."""
    from megatron.core.extensions import transformer_engine

    return bool(transformer_engine.HAVE_TE)


def have_apex_gradients() -> bool:
    """Whether Megatron-Core's own layers can add weight gradients to the float32 buffer inside the product, which takes
    an extension of Apex; TE's layers do it themselves."""
    from megatron.core.tensor_parallel import layers

    return hasattr(layers, "fused_weight_gradient_mlp_cuda")


def adam_from() -> str:
    """Whose Adam the optimizer is: Megatron-Core takes TE's, else Apex's, else torch's functions here."""
    import megatron.core.optimizer as optimizers

    package = optimizers.Adam.__module__.partition(".")[0]
    return {"transformer_engine": "Transformer Engine's, fused", "apex": "Apex's, fused"}.get(package, "torch's")


def fuse_with_te() -> None:
    """ColumnParallelLinear raises where gradient accumulation is to be fused and Apex is not there, though with TE's
    layers the only one left is the head, which never runs that code: ours adds to the buffer by its own kernels."""
    from megatron.core.tensor_parallel import layers

    if have_te():
        layers._grad_accum_fusion_available = True


def refuse(config: TransformerConfig) -> None:
    """Raise for settings that Megatron-Core accepts and then computes wrongly or ignores."""
    if (
        config.pipeline_model_parallel_size == 2
        and config.virtual_pipeline_model_parallel_size
        and config.batch_p2p_comm
    ):
        raise ConfigError(
            "2 pipeline ranks with virtual stages and batched p2p: activations and gradients between the two ranks "
            "are mixed up; set overlap_p2p_comm=True, batch_p2p_comm=False"
        )
    if not have_te():
        for name in ("fp8", "fp8_param", "tp_comm_overlap"):
            if getattr(config, name, None):
                raise MachineError(
                    f"{name} needs Transformer Engine, which is not installed: Megatron-Core would ignore it "
                    "silently; install transformer-engine or switch it off"
                )


def require_psutil() -> None:
    """Megatron-Core's checkpoint writers die without psutil, which it does not declare, and the trainer waits for
    them for ever."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    if not getattr(filesystem_async, "HAVE_PSUTIL", True):
        raise MachineError("psutil is not installed: saving a checkpoint would hang; pip install psutil")


def route_without_te() -> None:
    """Routers look for TE's general_gemm under a name that moe_utils binds only where TE is there; without the name
    they raise NameError, with None under it they take torch's product."""
    from megatron.core.transformer.moe import moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


def latent_without_te() -> None:
    """multi_latent_attention.py takes TE for installed as soon as Megatron-Core's own wrappers import, which they do
    without it, too."""
    from megatron.core.transformer import multi_latent_attention

    if not have_te():
        multi_latent_attention.HAVE_TE = False


def queue_here() -> None:
    """The first save spawns a manager process for one queue, which imports the program again (6 s a rank) and outlives
    a rank that is killed. Saves are synchronous here, so both ends of the queue are in this process."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    results: queue.Queue = queue.Queue()
    filesystem_async._get_write_results_queue = lambda: results


def strip_bucket_padding() -> None:
    """`fully_reshardable` gathers the optimizer state without the padding at the ends of gradient buckets, but looks
    parameters up at their padded places: every parameter after the first padded bucket is saved shifted. Mended
    upstream after 0.19 (32a03b77c5); here the lookup table is given the unpadded places during the save."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    original = DistributedOptimizer.sharded_param_state_fully_reshardable
    if hasattr(original, "unpadded") or "cumulative_padding_stripped" in inspect.getsource(original):
        return

    def unpadded(self: Any, *args: Any, **kwargs: Any) -> Any:
        padded = [buffer.param_index_map for buffer in self.buffers]
        try:
            for buffer in self.buffers:
                buffer.param_index_map = _without_padding(buffer)
            return original(self, *args, **kwargs)
        finally:
            for buffer, table in zip(self.buffers, padded, strict=True):
                buffer.param_index_map = table

    unpadded.unpadded = True  # type: ignore[attr-defined]
    DistributedOptimizer.sharded_param_state_fully_reshardable = unpadded


def _without_padding(buffer: Any) -> dict:
    padding_before = [0]
    for bucket in buffer.buckets[:-1]:
        padding_before.append(padding_before[-1] + bucket.grad_data.numel() - bucket.numel_unpadded)
    return {
        parameter: (start - padding_before[bucket], end - padding_before[bucket], bucket)
        for parameter, (start, end, bucket) in buffer.param_index_map.items()
    }


class StatelessStepAdam(torch.optim.Optimizer):
    """AdamW whose step count lives in the parameter group, as in TE's and Apex's FusedAdam.

    torch's own AdamW keeps a `step` tensor per parameter. Megatron-Core's load hands one shared tensor to all of them,
    which is then incremented once per parameter. This layout also makes checkpoints equal with and without TE.
    Loshchilov and Hutter 2019, algorithm 2 (arXiv 1711.05101).
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        **_: Any,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        if not adam_w_mode:
            raise ConfigError("only decoupled weight decay (AdamW) is supported; set decoupled_weight_decay")

    def initialize_state(self, parameter: torch.Tensor, *_: Any) -> None:
        """Zero moments; called by Megatron-Core before it loads into them."""
        self.state[parameter]["exp_avg"] = torch.zeros_like(parameter, dtype=torch.float32)
        self.state[parameter]["exp_avg_sq"] = torch.zeros_like(parameter, dtype=torch.float32)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One AdamW update of every parameter that has a gradient."""
        from torch.optim.adamw import adamw

        for group in self.param_groups:
            if not group["params"]:
                continue
            group["step"] = group.get("step", 0) + 1
            parameters = [p for p in group["params"] if p.grad is not None]
            for parameter in parameters:
                if not self.state[parameter]:
                    self.initialize_state(parameter)
            if not parameters:
                continue
            adamw(
                parameters,
                [p.grad.float() for p in parameters],
                [self.state[p]["exp_avg"] for p in parameters],
                [self.state[p]["exp_avg_sq"] for p in parameters],
                [],
                [torch.tensor(float(group["step"] - 1)) for _ in parameters],
                foreach=True,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )


def stateless_step_adam() -> None:
    """Give Megatron-Core an Adam with FusedAdam's state layout where neither TE nor Apex is installed."""
    import megatron.core.optimizer as optimizers
    import megatron.core.optimizer.distrib_optimizer as distributed

    if optimizers.USING_PYTORCH_OPTIMIZER:
        optimizers.Adam, optimizers.USING_PYTORCH_OPTIMIZER = StatelessStepAdam, False
        distributed.Adam = StatelessStepAdam
        distributed.HAVE_APEX_OR_TE, distributed.USING_TE_OPTIMIZER = True, True
