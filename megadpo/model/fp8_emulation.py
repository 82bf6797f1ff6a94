"""FP8 without FP8 hardware: linear layers whose operands are rounded to FP8 numbers and back.

The recipes are Transformer Engine's (common/recipe/__init__.py and recipe_common.cuh; FP8 formats: Micikevicius et al.,
2209.05433; MXFP8: OCP Microscaling Formats 1.0). Forward products take x and w, the gradient of x takes dy and w, that
of w takes dy and x; biases and everything else stay as they are. A product adds up in float32 and is rounded
once, to the model's dtype. (Transformer Engine's forward products with one scale per tensor add up in the tensor cores'
own registers, use_split_accumulator false, which on Hopper have fewer bits than float32.)

Axis letters of this file: T rows of the stream, I inputs and O outputs of a linear layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor

from megadpo.config import ModelConfig
from megadpo.parallel.context import ParallelContext

Kind = Literal["e4m3", "e5m2"]
Recipe = Literal["delayed", "tensorwise", "blockwise", "mxfp8"]

DTYPES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
LARGEST = {"e4m3": 448.0, "e5m2": 57344.0}
HISTORY = 1024
"""Steps that delayed scaling looks back on; Transformer Engine's own default, in passes."""
BLOCK = {"blockwise": 128, "mxfp8": 32}
"""Numbers that share a scale, in the direction in which the product adds up."""


# ---- numbers


def to_fp8(x: Tensor, kind: Kind) -> Tensor:
    """Float32: the nearest FP8 numbers, ties to even; what is too large, infinity included, becomes the largest one
    (the hardware's "satfinite"). NaN stays NaN."""
    most = LARGEST[kind]
    return x.float().clamp(-most, most).to(DTYPES[kind]).float()


def scale_of(amax: Tensor, kind: Kind) -> Tensor:
    """Float32: what brings amax to the format's largest number. 1 where amax is 0 or not finite; float32's largest
    number where the quotient is over it."""
    # Transformer Engine's quotient is the nearest float32 (recipe_common.cuh: __fdiv_rn); a plain number divided by a
    # tensor is, in torch, that number times a reciprocal.
    scale = (torch.full_like(amax, LARGEST[kind]) / amax).clamp(max=torch.finfo(torch.float32).max)
    return torch.where((amax > 0) & amax.isfinite(), scale, 1.0)


def power_below(scale: Tensor) -> Tensor:
    """The next power of two that is not over it; positive normal float32 numbers."""
    return (scale.view(torch.int32) & -(1 << 23)).view(torch.float32)


def mx_scale_of(amax: Tensor, kind: Kind) -> Tensor:
    """Float32: MXFP8's scale, a power of two: the largest that brings amax to at most the format's largest number.

    Its inverse is what is stored, 8 bits of exponent; so nothing saturates. A block whose numbers are too small for the
    smallest one (2^-127) becomes 0, one with a NaN becomes NaN.
    """
    inverse = amax * torch.tensor(1 / LARGEST[kind], dtype=torch.float32, device=amax.device)
    fraction, exponent = torch.frexp(inverse)  # fraction in [0.5, 1)
    exponent = exponent - (fraction == 0.5).int()  # inverse <= 2^exponent
    scale = torch.ldexp(torch.ones_like(amax), -exponent)
    scale = torch.where(exponent > -127, scale, 1.0)
    scale = torch.where(inverse.isinf(), 2.0**-127, scale)
    return torch.where(inverse.isnan(), inverse, scale)


def round_tensor(x: Tensor, kind: Kind, scale: Tensor) -> Tensor:
    """Float32: x through FP8 with one scale (float32 scalar) for all."""
    return to_fp8(x.float() * scale, kind) * (1 / scale)


def round_blocks(x_RC: Tensor, kind: Kind, recipe: Recipe, block: tuple[int, int]) -> Tensor:
    """Float32: x through FP8, every block of so many rows and columns with its own scale, the last ones as small as
    they come. A power of two: of `blockwise` the next below what `scale_of` says, of `mxfp8` see `mx_scale_of`."""
    (rows, columns), (high, wide) = x_RC.shape, block
    padded = torch.nn.functional.pad(x_RC.float(), (0, -columns % wide, 0, -rows % high))
    blocks = padded.view(padded.shape[0] // high, high, padded.shape[1] // wide, wide)
    amax = blocks.abs().amax((1, 3), keepdim=True)
    scale = mx_scale_of(amax, kind) if recipe == "mxfp8" else power_below(scale_of(amax, kind))
    return round_tensor(blocks, kind, scale).view(padded.shape)[:rows, :columns]


# ---- which operand is rounded how


@dataclass(frozen=True)
class Rounding:
    """A recipe and a format."""

    recipe: Recipe
    gradients: Kind
    """Of dy; x and w are e4m3."""

    @staticmethod
    def of(model: ModelConfig) -> Rounding | None:
        """What the run file asks to emulate."""
        if model.fp8_format is None or not model.fp8_emulation:
            return None
        return Rounding(model.fp8_recipe, "e5m2" if model.fp8_format == "hybrid" else "e4m3")

    @property
    def whole(self) -> bool:
        """Whether a tensor has one scale."""
        return self.recipe not in BLOCK

    def activation(self, x_TC: Tensor, kind: Kind, scale: Tensor | None, along: int) -> Tensor:
        """x or dy in a product that adds up `along` this axis."""
        if scale is not None:
            return round_tensor(x_TC, kind, scale)
        size = BLOCK[self.recipe]
        return round_blocks(x_TC, kind, self.recipe, (size, 1) if along == 0 else (1, size))

    def weight(self, w_OI: Tensor, scale: Tensor | None, along: int) -> Tensor:
        """w in a product that adds up `along` this axis; `blockwise` has squares, the same both ways."""
        if self.recipe == "blockwise":
            size = BLOCK[self.recipe]
            return round_blocks(w_OI, "e4m3", self.recipe, (size, size))
        return self.activation(w_OI, "e4m3", scale, along)


class Operands(torch.nn.Module):
    """The operands of one linear layer: how they are rounded, and what is remembered of them.

    Scales of whole tensors are shared over the tensor-parallel ranks, so that the numbers do not depend on the grid.
    (Transformer Engine shares them so with `delayed`. With `tensorwise` it does under sequence parallelism, for a
    column-parallel layer's x and a row-parallel layer's dy; any other operand is scaled by what a rank holds of it.
    pytorch/module/linear.py: with_amax_reduction.)

    `delayed` scales an operand by its largest number in the last steps, the running one not among them: over all
    micro-batches and ranks (`amaxes_noted`, `remember_amaxes`), of steps that made an update. (Transformer Engine
    counts micro-batches instead of steps.) As long as nothing is known, the operand at hand is looked at. (Transformer
    Engine has scale 1 there.) The numbers are in checkpoints (`sharded_history`), so a run goes on as if it had not
    stopped.
    """

    history_HP: Tensor
    """Float32 [HISTORY, 3]: largest numbers of x, w and dy, the newest step first; 0 where unknown."""
    seen_P: Tensor
    """Float32 [3]: the same of the step that runs."""

    def __init__(self, rounding: Rounding, group: Any, device: torch.device) -> None:
        """group: the ranks that hold parts of the weight."""
        super().__init__()
        self.rounding, self.group = rounding, group
        self.enabled, self.noting = True, False
        if self.delayed:
            self.register_buffer("history_HP", torch.zeros(HISTORY, 3, device=device), persistent=False)
            self.register_buffer("seen_P", torch.zeros(3, device=device), persistent=False)

    @property
    def delayed(self) -> bool:
        return self.rounding.recipe == "delayed"

    def scales(self, tensors: Sequence[Tensor], kind: Kind, first: int) -> list[Tensor | None]:
        """Of each tensor its scale, None where blocks have theirs. first: place of the first in `seen_P`."""
        if not self.rounding.whole:
            return [None] * len(tensors)
        amax = torch.stack([_amax(tensor) for tensor in tensors])
        if self.group.size() > 1:
            dist.all_reduce(amax, op=dist.ReduceOp.MAX, group=self.group)
        if self.delayed:
            here = slice(first, first + len(tensors))
            if self.noting:
                self.seen_P[here] = torch.maximum(self.seen_P[here], amax)
            known = self.history_HP[:, here].amax(0)
            amax = torch.where(known > 0, known, amax)
        return list(scale_of(amax, kind))

    def step(self, seen_P: Tensor) -> None:
        """A step is over; seen: its largest numbers, of all ranks. What overflowed or did not occur is no number."""
        self.history_HP.copy_(self.history_HP.roll(1, 0))
        self.history_HP[0] = torch.where(seen_P.isfinite(), seen_P, 0.0)


def _amax(x: Tensor) -> Tensor:
    """Largest absolute value, float32 scalar; 0 of nothing."""
    return x.abs().amax().float() if x.numel() else torch.zeros((), device=x.device)


class RoundedProduct(torch.autograd.Function):
    """x [.., I] times w [O, I] -> [.., O], in x's dtype; products of the backward pass have rounded operands, too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w_OI: Tensor, operands: Operands) -> Tensor:
        x_TI, rounding = x.flatten(0, -2), operands.rounding
        scale_x, scale_w = operands.scales([x_TI, w_OI], "e4m3", first=0)
        ctx.save_for_backward(x, w_OI, scale_x, scale_w)
        ctx.operands = operands
        left = rounding.activation(x_TI, "e4m3", scale_x, along=1)
        return (left @ rounding.weight(w_OI, scale_w, along=1).t()).to(x.dtype).view(*x.shape[:-1], len(w_OI))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, w_OI, scale_x, scale_w = ctx.saved_tensors
        rounding, kind = ctx.operands.rounding, ctx.operands.rounding.gradients
        x_TI, dy_TO = x.flatten(0, -2), dy.flatten(0, -2)
        [scale_dy] = ctx.operands.scales([dy_TO], kind, first=2)
        dx = dw = None
        if ctx.needs_input_grad[0]:
            left = rounding.activation(dy_TO, kind, scale_dy, along=1)
            dx = (left @ rounding.weight(w_OI, scale_w, along=0)).to(x.dtype).view_as(x)
        if ctx.needs_input_grad[1]:
            left = rounding.activation(dy_TO, kind, scale_dy, along=0)
            dw = (left.t() @ rounding.activation(x_TI, "e4m3", scale_x, along=0)).to(w_OI.dtype)
        return dx, dw, None


# ---- layers


def with_rounding(layer: type, rounding: Rounding) -> type:
    """The same column- or row-parallel linear layer, with rounded operands."""

    class WithRounding(layer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.operands = Operands(rounding, self.tp_group, self.weight.device)

        def _forward_impl(self, input: Tensor, weight: Tensor, *args: Any, **options: Any) -> Tensor:
            """What Megatron-Core's layers call for the product with all that goes with it on the input's side: gathered
            rows under sequence parallelism, else the sum of its gradient."""
            if not self.operands.enabled:
                return super()._forward_impl(input, weight, *args, **options)
            assert not args
            if options["sequence_parallel"]:
                input = gather_from_sequence_parallel_region(input, group=self.tp_group)
            elif options["allreduce_dgrad"]:
                input = copy_to_tensor_model_parallel_region(input, group=self.tp_group)
            output = RoundedProduct.apply(input, weight, self.operands)
            return output if options["bias"] is None else output + options["bias"]

    return WithRounding


def round_layers(spec: ModuleSpec, rounding: Rounding) -> None:
    """Every linear layer in the spec of a transformer layer, however deep, gets rounded operands. A router is none."""
    for field in fields(spec.submodules):
        inner = getattr(spec.submodules, field.name)
        if isinstance(inner, type) and issubclass(inner, ColumnParallelLinear | RowParallelLinear):
            setattr(spec.submodules, field.name, with_rounding(inner, rounding))
        elif isinstance(inner, ModuleSpec) and inner.submodules is not None:
            round_layers(inner, rounding)


def rounded_layers(model: ModelConfig, num_layers: int) -> list[bool]:
    """For each layer of the whole model, whether it computes in FP8."""
    first = model.num_layers_at_start_in_bf16 if model.first_last_layers_bf16 else 0
    last = model.num_layers_at_end_in_bf16 if model.first_last_layers_bf16 else 0
    return [model.fp8_format is not None and first <= layer < num_layers - last for layer in range(num_layers)]


def _operands(chunks: Sequence[Any]) -> list[Operands]:
    return [module for chunk in chunks for module in chunk.modules() if isinstance(module, Operands)]


@contextmanager
def unrounded(chunks: Sequence[Any], only_delayed: bool = False) -> Iterator[None]:
    """The same model without rounding, for the length of a with-block."""
    here = [part for part in _operands(chunks) if part.enabled and (part.delayed or not only_delayed)]
    for operands in here:
        operands.enabled = False
    try:
        yield
    finally:
        for operands in here:
            operands.enabled = True


@contextmanager
def amaxes_noted(chunks: Sequence[Any]) -> Iterator[None]:
    """With the delayed recipe, note the largest numbers of the passes inside, for `remember_amaxes`. For a step's
    passes only: evaluation, scoring and probes leave them alone."""
    here = [operands for operands in _operands(chunks) if operands.delayed]
    for operands in here:
        operands.seen_P.zero_()
        operands.noting = True
    try:
        yield
    finally:
        for operands in here:
            operands.noting = False


def remember_amaxes(chunks: Sequence[Any], context: ParallelContext) -> None:
    """What was noted last scales the next step. Once per update, so that a batch that is left out leaves nothing
    behind. Every data-parallel rank calls it."""
    here = [operands for operands in _operands(chunks) if operands.delayed]
    if not here:
        return
    seen = context.max_over_data(torch.stack([operands.seen_P for operands in here]))
    for operands, seen_P in zip(here, seen, strict=True):
        operands.step(seen_P)


def sharded_history(chunks: Sequence[Any]) -> dict[str, ShardedTensor]:
    """What delayed scaling remembers, for a checkpoint of any grid; empty with other recipes. A place in the model has
    the same numbers on every rank that holds a part of it."""
    found = {}
    for chunk in chunks:
        replica = (0, chunk.pg_collection.tp.rank(), chunk.pg_collection.dp.rank())
        for layer in chunk.decoder.layers:
            for name, part in layer.named_modules():
                if isinstance(part, Operands) and part.delayed:
                    key = f"fp8_history.{layer.layer_number}.{name}"
                    found[key] = ShardedTensor.from_rank_offsets(key, part.history_HP, replica_id=replica)
    return found
