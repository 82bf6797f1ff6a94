"""Which code a model runs, in words for the log."""

from __future__ import annotations

import torch

from megadpo.config import ModelConfig, ParallelConfig
from megadpo.convert.shape import ModelShape
from megadpo.model.attention import choose_backend
from megadpo.model.build import DTYPES, transformer_config
from megadpo.model.fp8_emulation import Rounding, rounded_layers
from megadpo.parallel import mcore_fixes


def parts(shape: ModelShape, parallel: ParallelConfig, model: ModelConfig, device: torch.device) -> list[str]:
    """Lines on layers, FP8, attention and kernels. The rest of the machine was looked at (`check_machine`)."""
    te, rounding = mcore_fixes.have_te(), Rounding.of(model)
    layers = "Transformer Engine's" if te else "Megatron-Core's own (no Transformer Engine)"
    if te and rounding is not None:
        layers = "Megatron-Core's own (FP8 is emulated in them)"
    attention, why = choose_backend(device, DTYPES[model.dtype], shape)
    config = transformer_config(shape, parallel, model, device)
    head = "chunked" if model.logprob_backend == "auto" else model.logprob_backend
    gradients = "added inside the product" if config.gradient_accumulation_fusion else "added by themselves"
    graphs = f"CUDA graphs of {' and '.join(model.cuda_graphs)}" if model.cuda_graphs else "no CUDA graphs"
    return [
        f"layers     {layers}; {model.dtype} on {device.type}",
        *_fp8(model, shape.num_layers),
        f"attention  {attention} ({why})",
        f"kernels    log-probabilities {head}; RoPE {'fused' if config.apply_rope_fusion else 'in torch'}; weight "
        f"gradients {gradients}; {graphs}",
    ]


def _fp8(model: ModelConfig, num_layers: int) -> list[str]:
    if model.fp8_format is None:
        return []
    layers = f"products of {sum(rounded_layers(model, num_layers))} of {num_layers} layers"
    if (rounding := Rounding.of(model)) is not None:
        return [
            f"fp8        emulated: {rounding.recipe}, gradients in {rounding.gradients}, {layers}; its numbers, not "
            "its speed"
        ]
    gathered = "; weights gathered in FP8" if model.fp8_param_gather else ""
    return [f"fp8        {model.fp8_format}, {model.fp8_recipe}: {layers}{gathered}"]
