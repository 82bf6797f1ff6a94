"""FP8 by Transformer Engine: the settings of the run file as Megatron-Core takes them, and what they need.

Which products run in FP8 is Megatron-Core's to say: the linear layers of attention and MLP, inside the contexts that
its TransformerBlock enters (around the whole block for delayed scaling, around each layer otherwise). Embedding, head,
router, norms and our attention stay in the model's dtype.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from megadpo.config import ModelConfig
from megadpo.model.fp8_emulation import HISTORY, unrounded
from megadpo.parallel import mcore_fixes


def fp8_options(model: ModelConfig) -> dict[str, Any]:
    """Settings of Megatron-Core's TransformerConfig."""
    if not model.real_fp8:
        return {}
    return {
        "fp8": model.fp8_format,
        "fp8_recipe": model.fp8_recipe,
        "fp8_param": model.fp8_param_gather,
        "fp8_amax_history_len": HISTORY,
        "fp8_amax_compute_algo": "max",
        "first_last_layers_bf16": model.first_last_layers_bf16,
        "num_layers_at_start_in_bf16": model.num_layers_at_start_in_bf16,
        "num_layers_at_end_in_bf16": model.num_layers_at_end_in_bf16,
    }


def precision(model: ModelConfig) -> str:
    """What passes without a gradient compute in, in words; equal words, equal numbers. Hybrid and e4m3 differ in
    gradients alone; delayed scaling is for training alone (`learning_nothing`)."""
    if model.fp8_format is None or model.fp8_recipe == "delayed":
        return model.dtype
    kept = (model.num_layers_at_start_in_bf16, model.num_layers_at_end_in_bf16)
    layers = f" but {kept[0]} and {kept[1]} layers" if model.first_last_layers_bf16 else ""
    weights = ", weights in fp8" if model.fp8_param_gather else ""
    return f"{model.dtype}, fp8 {model.fp8_recipe}{layers}{weights}{', emulated' if model.fp8_emulation else ''}"


def machine_problem(model: ModelConfig, device: torch.device) -> str | None:
    """What keeps this machine from the FP8 that the run file asks for; None: nothing, or nothing is asked for."""
    if not model.real_fp8:
        return None
    given = f"model.fp8_format = {model.fp8_format}"
    instead = "or set model.fp8_emulation: true to try its numbers on any machine"
    if device.type != "cuda":
        return f"{given}: needs a GPU and this run is on a {device.type}; leave it out, {instead}"
    if not mcore_fixes.have_te():
        return (
            f"{given}: needs Transformer Engine, which is not installed: docs/install.md says how; or leave it out, "
            f"{instead}"
        )
    return recipe_problem(model.fp8_recipe, torch.cuda.get_device_capability(device), torch.version.cuda or "0")


def recipe_problem(recipe: str, capability: tuple[int, int], cuda: str) -> str | None:
    """Whether a GPU and torch's CUDA have a recipe; the limits are Transformer Engine's (pytorch/quantization.py:
    check_fp8_support, check_fp8_block_scaling_support, check_mxfp8_support)."""
    here = f"this GPU has {capability[0]}.{capability[1]}"
    given = f"model.fp8_recipe = {recipe}"
    if recipe == "mxfp8" and not (10, 0) <= capability < (12, 0):
        return (
            f"{given}: needs compute capability 10.x (Blackwell: B200, GB200) and {here}; use tensorwise or blockwise"
        )
    if recipe == "blockwise" and capability < (9, 0):
        return f"{given}: needs compute capability 9.0 or more (Hopper: H100, H200) and {here}; use tensorwise"
    if recipe == "blockwise" and tuple(int(part) for part in cuda.split(".")[:2]) < (12, 9):
        return f"{given}: needs CUDA 12.9 or newer and torch was built with {cuda}; use tensorwise, or a newer build"
    if capability < (8, 9):
        return f"{given}: FP8 needs compute capability 8.9 or more and {here}; leave model.fp8_format out"
    return None


@contextmanager
def without_fp8(chunks: Sequence[Any], only_delayed: bool = False) -> Iterator[None]:
    """The same model in its dtype, Transformer Engine's layers and emulated ones alike. only_delayed: models with
    another recipe stay as they are."""
    configs = {id(config): config for config in (getattr(chunk, "module", chunk).config for chunk in chunks)}.values()
    switched = [config for config in configs if config.fp8 and (config.fp8_recipe == "delayed" or not only_delayed)]
    formats = [config.fp8 for config in switched]
    for config in switched:
        config.fp8 = None
    try:
        with unrounded(chunks, only_delayed):
            yield
    finally:
        for config, fp8 in zip(switched, formats, strict=True):
            config.fp8 = fp8


@contextmanager
def learning_nothing(chunks: Sequence[Any]) -> Iterator[None]:
    """For passes without a gradient. With delayed scaling they run in bf16: Transformer Engine learns scales only from
    passes with one (quantization.py: autocast_exit), so that a model that was never trained would multiply with all
    scales 1; and it notes the largest numbers of every pass, so that the next step would depend on whether somebody
    looked. Other recipes keep nothing from pass to pass and stay as they are."""
    with without_fp8(chunks, only_delayed=True):
        yield
