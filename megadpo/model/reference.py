"""A frozen model beside the policy, in the policy's layout."""

from __future__ import annotations

from dataclasses import replace

import torch

from megadpo.config import ModelConfig, ParallelConfig
from megadpo.convert.shape import ModelShape
from megadpo.model.build import build_chunks
from megadpo.model.fp8 import recipe_problem
from megadpo.model.policy import Policy
from megadpo.parallel import mcore_fixes
from megadpo.parallel.context import ParallelContext


def build_reference(
    shape: ModelShape, parallel: ParallelConfig, context: ParallelContext, model: ModelConfig, fp8_weights: bool
) -> list[Policy]:
    """This rank's chunks, parameters not yet filled.

    It computes as the policy does, so that the two agree before training, except with delayed scaling: a model that is
    never trained never learns its scales, so it computes in bf16. fp8_weights: the linear layers' weights are in FP8
    and nowhere else, by Transformer Engine (in the policy's recipe, so that a policy in FP8 has the very same ones) or,
    without it, by model/fp8_weights.py.
    """
    frozen = replace(model, fp8_param_gather=False)
    if model.real_fp8 and model.fp8_recipe == "delayed":
        frozen = replace(frozen, fp8_format=None)
    if not fp8_weights:
        chunks = build_chunks(shape, parallel, context, frozen)
    elif mcore_fixes.have_te():
        chunks = _with_fp8_weights(shape, parallel, context, frozen)
    else:
        chunks = build_chunks(shape, parallel, context, frozen, held_in_fp8=True)
    for chunk in chunks:
        chunk.eval().requires_grad_(False)
    return chunks


def _with_fp8_weights(
    shape: ModelShape, parallel: ParallelConfig, context: ParallelContext, model: ModelConfig
) -> list[Policy]:
    """By Transformer Engine. Without a gradient it keeps neither the weights that it was built with nor transposes of
    the FP8 ones (pytorch/module/base.py: reset_parameters)."""
    in_fp8 = model
    if not model.real_fp8:
        cuda, capability = torch.version.cuda or "0", torch.cuda.get_device_capability(context.device)
        in_fp8 = replace(model, fp8_format="e4m3", fp8_recipe="blockwise", fp8_emulation=False)
        if recipe_problem("blockwise", capability, cuda):
            in_fp8 = replace(in_fp8, fp8_recipe="tensorwise")
    with torch.no_grad():
        chunks = build_chunks(shape, parallel, context, replace(in_fp8, fp8_param_gather=True))
    if not model.real_fp8:
        # The layers make bf16 of their weights for each product (pytorch/module/linear.py: _get_weight_tensors).
        for chunk in chunks:
            chunk.config.fp8 = None
    return chunks
