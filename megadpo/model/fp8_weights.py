"""Linear layers with weights in FP8 and nowhere else: half the memory of bfloat16, for a model that is not trained.

Blocks of 128 x 128 numbers share a float32 scale, the block's largest number over FP8's (DeepSeek-V3, 2412.19437,
section 3.3.2). A layer makes its weight of them when it is used and forgets it afterwards, and multiplies in the
model's dtype, so all that is lost is what rounding the weights once loses. For Megatron-Core's own layers; those of
Transformer Engine hold FP8 weights themselves (model/reference.py).
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor
from torch.nn.functional import pad

BLOCK = 128
FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max


class HeldWeight(torch.nn.Module):
    """A matrix [R, C] as FP8 numbers and scales."""

    def __init__(self, weight_RC: Tensor) -> None:
        """As large as this weight, in the place of its values nothing yet."""
        super().__init__()
        self.dtype, device = weight_RC.dtype, weight_RC.device
        rows, columns = weight_RC.shape
        self.numbers_RC: Tensor
        self.scales: Tensor
        self.register_buffer("numbers_RC", torch.empty(rows, columns, dtype=FP8, device=device))
        blocks = (-(-rows // BLOCK), -(-columns // BLOCK))
        self.register_buffer("scales", torch.empty(blocks, dtype=torch.float32, device=device))

    @torch.no_grad()
    def hold(self, weight_RC: Tensor) -> None:
        """Round a weight, of any dtype and device, into this."""
        rows, columns = weight_RC.shape
        wide = weight_RC.to(self.scales.device, torch.float32)
        blocks = pad(wide, (0, -columns % BLOCK, 0, -rows % BLOCK))
        blocks = blocks.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))  # [R blocks, 128, C blocks, 128]
        largest = blocks.abs().amax((1, 3))
        self.scales.copy_(torch.where(largest > 0, largest / LARGEST, 1.0))
        held = (blocks / self.scales[:, None, :, None]).clamp(-LARGEST, LARGEST).to(FP8)
        self.numbers_RC.copy_(held.flatten(2, 3).flatten(0, 1)[:rows, :columns])

    def plain(self) -> Tensor:
        """[R, C] in the model's dtype, rounded once more: FP8's numbers are exact there, their products are not."""
        rows, columns = self.numbers_RC.shape
        wide = pad(self.numbers_RC.to(self.dtype), (0, -columns % BLOCK))
        by_row = self.scales.repeat_interleave(BLOCK, 0)[:rows]
        wide.unflatten(1, (-1, BLOCK)).mul_(by_row[:, :, None])
        return wide[:, :columns].contiguous()


def held_in_fp8(layer: type) -> type:
    """The same parallel linear layer with its weight held in FP8. It has no `weight` except while it is used; its
    sharded_state_dict names one on no device, whose `held` takes the values (convert/importer.py)."""

    class HeldInFp8(layer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.weight: Tensor
            self.held = HeldWeight(self.weight)
            del self.weight  # one layer at a time, so that the whole model is never there in its dtype

        def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
            self.weight = self.held.plain()
            try:
                return super().forward(*args, **kwargs)
            finally:
                del self.weight

        def sharded_state_dict(
            self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
        ) -> dict[str, Any]:
            held = self._modules.pop("held")
            nowhere: Any = torch.empty(held.numbers_RC.shape, dtype=held.dtype, device="meta")
            nowhere = torch.nn.Parameter(nowhere, requires_grad=False)
            nowhere.held = held
            self.weight = nowhere
            try:
                return super().sharded_state_dict(prefix, sharded_offsets, metadata)
            finally:
                del self.weight
                self.held = held

    return HeldInFp8


def hold_linear_layers(layer: ModuleSpec) -> None:
    """Give every linear layer in the spec of a transformer layer, however deep, its weight in FP8. A router is none.

    Latent attention's projections to its small vectors stay as they are: Megatron-Core takes only classes of its own
    for them (multi_latent_attention.py).
    """
    for field in fields(layer.submodules):
        part = getattr(layer.submodules, field.name)
        if field.name.endswith("_down_proj"):
            continue
        if isinstance(part, type) and issubclass(part, ColumnParallelLinear | RowParallelLinear):
            setattr(layer.submodules, field.name, held_in_fp8(part))
        elif isinstance(part, ModuleSpec) and part.submodules is not None:
            hold_linear_layers(part)
