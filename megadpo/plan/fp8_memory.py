"""What FP8 by Transformer Engine keeps in memory that bfloat16 does not, and the other way round.

Its kernels take no fake tensors, so Megatron-Core's own linear layers are counted, and here they are made to hold and
to save what Transformer Engine's would. Read in Transformer Engine 2.9 (pytorch/module/base.py: get_weight_workspace,
reset_parameters; linear.py, layernorm_linear.py, grouped_linear.py: what is cast and saved; pytorch/tensor: make_empty
and update_usage of each recipe) and Megatron-Core 0.16.1 (attention.py, shared_experts.py: set_save_original_input;
param_and_grad_buffer.py: uint8 buffers, MXFP8's shared one). Not compared with a device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import Tensor

from megadpo.config import ModelConfig
from megadpo.model.policy import Policy

HOPPER = (9, 0)
ORIGINAL = ("self_attention.linear_proj", "shared_experts.linear_fc1")
"""Layers whose input somebody else saves in bfloat16 anyway: they save that one, except with delayed scaling."""


@dataclass(frozen=True)
class Kept:
    """How the linear layers of one layer are in FP8."""

    recipe: str
    gathered: bool
    """fp8_param_gather: the weights themselves are FP8."""
    one_copy: bool
    """A product takes its operands in one orientation, so that there are no transposes: scales per tensor on a GPU with
    compute capability 10, 11 or from 13 on (utils.py: is_non_tn_fp8_gemm_supported)."""

    @staticmethod
    def of(model: ModelConfig, capability: tuple[int, int]) -> Kept | None:
        """None in bfloat16, and where FP8 is emulated."""
        if not model.real_fp8:
            return None
        whole = model.fp8_recipe in ("delayed", "tensorwise")
        return Kept(model.fp8_recipe, model.fp8_param_gather, whole and capability >= (10, 0) and capability[0] != 12)

    @property
    def frozen(self) -> Kept | None:
        """Of a reference beside such a policy (model/reference.py): its weights are not gathered, and with delayed
        scaling it is in bfloat16."""
        return None if self.recipe == "delayed" else replace(self, gathered=False)

    @property
    def in_buffer(self) -> bool:
        """Whether the weights lie in Megatron-Core's buffer as bytes. MXFP8's do not: they travel through the
        gradients' in bfloat16 and are cast on arrival."""
        return self.gathered and self.recipe != "mxfp8"

    def beside(self, rows: int, columns: int, trained: bool) -> int:
        """Bytes of FP8 that a weight [rows, columns] has outside the parameter buffer. Without `gathered` a cast is
        kept from step to step beside the bfloat16 weight. One that is not trained needs no transpose."""
        orientations = 1 if self.one_copy or not trained else 2
        in_buffer = self.gathered and trained and self.in_buffer
        numbers = rows * columns * (orientations - in_buffer)
        return numbers + sum(self._weight_scales(rows, columns, bool(turned)) for turned in range(orientations))

    def _weight_scales(self, rows: int, columns: int, turned: bool) -> int:
        if self.recipe == "blockwise":  # float32 for 128 x 128
            outer, inner = (columns, rows) if turned else (rows, columns)
            return 4 * -(-outer // 128) * _up(-(-inner // 128), 4)
        if self.recipe == "mxfp8":  # a byte for 32
            return _up(rows // 32, 4) * _up(columns, 128) if turned else _up(rows, 128) * _up(columns // 32, 4)
        return 4

    def of_input(self, rows: int, columns: int) -> int:
        """Bytes of an input [rows, columns] in one orientation."""
        scales = {"blockwise": 4 * -(-rows // 128) * columns, "mxfp8": _up(rows // 32, 4) * _up(columns, 128)}
        return rows * columns + scales.get(self.recipe, 4)


def layers_in_fp8(model: ModelConfig, layers: int) -> list[bool]:
    """Of every layer of the model."""
    ends = model.first_last_layers_bf16
    first = model.num_layers_at_start_in_bf16 if ends else 0
    last = layers - (model.num_layers_at_end_in_bf16 if ends else 0)
    return [model.real_fp8 and first <= layer < last for layer in range(layers)]


def linear_layers(layer: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Those of a transformer layer, by name: attention's and the MLPs', not the router."""
    kinds = (ColumnParallelLinear, RowParallelLinear)
    return {name: module for name, module in layer.named_modules() if isinstance(module, kinds)}


def keep_in_fp8(model: Policy, kept: Kept, in_fp8: Sequence[bool], trained: bool = True) -> None:
    """Let the linear layers of a chunk hold the casts of their weights, as buffers, and, where they are trained, make
    and save casts of activations as Transformer Engine does. in_fp8: of every layer of the whole model."""
    for layer in model.decoder.layers:
        if in_fp8[layer.layer_number - 1]:
            _keep(layer, kept, trained)


def _keep(layer: torch.nn.Module, kept: Kept, trained: bool) -> None:
    for name, module in linear_layers(layer).items():
        weight = getattr(module, "weight", None)
        if weight is None:  # held in FP8 alone: model/fp8_weights.py
            continue
        rows, columns = weight.shape
        size = kept.beside(rows, columns, trained)
        module.register_buffer("fp8_casts", torch.empty(size, dtype=torch.uint8, device=weight.device), False)
        weight.in_fp8 = kept.gathered
        if trained:
            original = kept.recipe != "delayed" and name.endswith(ORIGINAL)
            module.forward = partial(_forward, module.forward, kept, original)


def _forward(forward: Any, kept: Kept, original: bool, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
    """A linear layer's, with the casts of x and of the output's gradient beside it."""
    rows, columns = x.numel() // x.shape[-1], x.shape[-1]
    storage, device = x.untyped_storage()._cdata, x.device  # the hooks below live on, and must not hold x
    gradient: list[Tensor] = []
    saves = torch.is_grad_enabled()

    def pack(saved: Tensor) -> Any:
        if original or saved.untyped_storage()._cdata != storage:
            return saved
        cast = torch.empty(kept.of_input(rows, columns), dtype=torch.uint8, device=device)
        return cast, saved.shape, saved.dtype

    def unpack(packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        cast, shape, dtype = packed
        return cast.new_empty(1, dtype=dtype).expand(shape)  # the product reads the cast itself

    in_product = torch.empty(kept.of_input(rows, columns), dtype=torch.uint8, device=device)
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        output, bias = forward(After.apply(x, gradient) if saves else x, *args, **kwargs)
    del in_product
    return (Before.apply(output, gradient, kept) if saves else output), bias


class Before(torch.autograd.Function):
    """Backward it comes before the layer: the gradient is cast, in both orientations."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, held: list[Tensor], kept: Kept) -> Tensor:
        ctx.held, ctx.kept = held, kept
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        grad = grads[0]
        size = ctx.kept.of_input(grad.numel() // grad.shape[-1], grad.shape[-1]) * (1 if ctx.kept.one_copy else 2)
        ctx.held.append(grad.new_empty(size, dtype=torch.uint8))
        return grad, None, None


class After(torch.autograd.Function):
    """Backward it comes after the layer: the casts are not needed any more."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, held: list[Tensor]) -> Tensor:
        ctx.held = held
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        ctx.held.clear()
        return grads[0], None


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
