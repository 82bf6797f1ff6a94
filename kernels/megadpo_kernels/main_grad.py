"""Where a weight's gradient goes: into Megatron's float32 gradient buffer, or back through autograd.

Megatron's data parallelism gives a parameter `main_grad` and the flag `grad_added_to_main_grad`. Once a kernel has
added to the buffer itself and set the flag, the parameter's hook drops what autograd delivers, unless the parameter has
`zero_out_wgrad` (an embedding that is also the head, on one stage): then it adds that too, which must hold zeros from
the head. A tensor has to be delivered in any case: the hook starts the overlapped reduction.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class WeightGradient:
    """Add this call's gradient to `total_VD`, float32 [V, D], then give `result()` to autograd."""

    weight_VD: Tensor
    total_VD: Tensor
    fused: bool

    @staticmethod
    def of(weight_VD: Tensor) -> WeightGradient:
        main_grad = getattr(weight_VD, "main_grad", None)
        if (
            main_grad is not None
            and hasattr(weight_VD, "grad_added_to_main_grad")
            and main_grad.dtype == torch.float32
            and main_grad.shape == weight_VD.shape
        ):
            return WeightGradient(weight_VD, main_grad, True)
        return WeightGradient(weight_VD, torch.zeros_like(weight_VD, dtype=torch.float32), False)

    def result(self) -> Tensor:
        """The gradient in the weight's dtype, or the stand-in that a fused gradient needs."""
        if not self.fused:
            return self.total_VD.to(self.weight_VD.dtype)
        self.weight_VD.grad_added_to_main_grad = True  # type: ignore[attr-defined]
        if getattr(self.weight_VD, "zero_out_wgrad", False):
            return torch.zeros_like(self.weight_VD)
        return torch.empty_like(self.weight_VD)
