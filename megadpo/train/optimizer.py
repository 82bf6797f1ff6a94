"""Gradient buffers, AdamW over them, and the learning rate as a function of the step."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.transformer import TransformerConfig

from megadpo.config import OptimizerConfig, ParallelConfig
from megadpo.model.policy import Policy


def wrap(
    modules: list[Policy], parallel: ParallelConfig, bucket_size: int | None = None
) -> list[DistributedDataParallel]:
    """Megatron-Core's data parallelism with float32 gradient buffers, and the hooks that its schedule calls.

    bucket_size: parameters per gradient bucket; Megatron-Core's own choice where None.
    """
    config = modules[0].config
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        check_for_nan_in_grad=False,  # train_step looks at the gradient norm, on all ranks alike
        bucket_size=bucket_size,
        fp8_param_gather=config.fp8_param,
        reuse_grad_buf_for_mxfp8_param_ag=_through_gradients(config),
    )
    chunks = [DistributedDataParallel(config, ddp, module) for module in modules]
    config.finalize_model_grads_func = finalize_model_grads
    if parallel.overlap_grad_reduce:
        config.no_sync_func = _one_or_all([chunk.no_sync for chunk in chunks])
        config.grad_sync_func = _one_or_all([chunk.start_grad_sync for chunk in chunks])
    if parallel.overlap_param_gather:
        config.param_sync_func = _one_or_all([chunk.start_param_sync for chunk in chunks])
    return chunks


def _one_or_all(functions: list) -> object:
    """The schedule wants a list with interleaving and a bare function without."""
    return functions if len(functions) > 1 else functions[0]


def build_optimizer(
    chunks: list[DistributedDataParallel], optimizer: OptimizerConfig, parallel: ParallelConfig
) -> MegatronOptimizer:
    """AdamW over float32 master weights; biases and norms are not decayed."""
    config = chunks[0].config
    return get_megatron_optimizer(
        MegatronOptimizerConfig(
            optimizer="adam",
            lr=optimizer.learning_rate,
            weight_decay=optimizer.weight_decay,
            adam_beta1=optimizer.adam_beta1,
            adam_beta2=optimizer.adam_beta2,
            adam_eps=optimizer.adam_epsilon,
            clip_grad=optimizer.max_grad_norm,
            bf16=config.bf16,
            params_dtype=config.params_dtype,
            use_distributed_optimizer=parallel.use_distributed_optimizer,
            overlap_param_gather=parallel.overlap_param_gather,
            fp8_recipe=config.fp8_recipe if config.fp8_param else None,
            reuse_grad_buf_for_mxfp8_param_ag=_through_gradients(config),
        ),
        chunks,
    )


def _through_gradients(config: TransformerConfig) -> bool:
    """MXFP8 weights have no buffer that could be gathered: Megatron-Core sends them through the gradients' in bf16."""
    return bool(config.fp8_param and config.fp8_recipe == "mxfp8")


def learning_rate(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """Rate of update number `step` (from 0) of `total_steps`: linear warm-up, then the schedule down to its floor.

    The shapes of transformers' get_*_schedule_with_warmup, except that no update has rate 0: the first of w warm-up
    steps has 1 / (w + 1) of the rate (there 0), and a warm-up ratio is rounded down (there up).
    """
    warmup = config.warmup_steps
    if warmup is None:
        warmup = math.floor(config.warmup_ratio * total_steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(total_steps - warmup, 1)
    if config.lr_scheduler_type == "constant":
        factor = 1.0
    elif config.lr_scheduler_type == "linear":
        factor = max(1.0 - progress, 0.0)
    else:
        factor = 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))
    return config.learning_rate * (config.min_lr_ratio + (1.0 - config.min_lr_ratio) * factor)


def set_learning_rate(optimizer: MegatronOptimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_mult", 1.0)


def prepare_gradients(optimizer: MegatronOptimizer) -> float:
    """Bring the gradients to the master weights; returns their global norm, before clipping."""
    optimizer.prepare_grads()
    return float(optimizer.get_grad_norm())


def clip_and_update(optimizer: MegatronOptimizer, grad_norm: float) -> None:
    """Scale the gradients down to `max_grad_norm` where they are over it, then update."""
    most = optimizer.config.clip_grad
    # Experts have an optimizer of their own beside the other weights'; each clips by the norm of all.
    for part in optimizer.chained_optimizers if most > 0 else []:
        if parameters := part.get_parameters():
            clip_grad_by_total_norm_fp32(parameters, max_norm=most, total_norm=grad_norm)
    optimizer.step_with_ready_grads()


@contextmanager
def settled(chunks: list[DistributedDataParallel]) -> Iterator[None]:
    """Parameters are whole inside: an overlapped gather is finished first, and no new one starts from a forward pass.
    For evaluation, scoring and saving between updates."""
    # A model that is not trained is not wrapped.
    hooked = [chunk for chunk in chunks if getattr(chunk, "remove_forward_pre_hook_handles", None)]
    for chunk in hooked:
        chunk.disable_forward_pre_hook(param_sync=True)
    try:
        yield
    finally:
        for chunk in hooked:
            chunk.enable_forward_pre_hook()
