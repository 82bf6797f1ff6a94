"""The RMSNorms that model families need beyond Megatron-Core's, and where they are put."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region, reduce_from_tensor_model_parallel_region
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor
from torch.nn.functional import rms_norm


class RMSNorm(torch.nn.Module):
    """RMSNorm as Megatron-Core builds norms (Zhang and Sennrich 2019, equation 4), computed in float32; with
    `layernorm_zero_centered_gamma` it multiplies by 1 + weight.

    Megatron-Core's own, without Transformer Engine, refuses sequence parallelism. The mark on the weight makes its
    gradient summed over tensor-parallel ranks there.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.weight = _weight(hidden_size, config)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.eps, self.zero_centred = eps, config.layernorm_zero_centered_gamma

    def forward(self, x: Tensor) -> Tensor:
        if self.zero_centred:
            weight = 1.0 + self.weight.float()
            return rms_norm(x.float(), weight.shape, weight, self.eps).to(x.dtype)
        return rms_norm(x, self.weight.shape, self.weight, self.eps)


class ProjectionNorm(torch.nn.Module):
    """RMSNorm over all `heads` heads of the queries, or of the keys, together, when each tensor-parallel rank holds
    some of them: the sum of squares is the whole projection's, the weight is split as the heads are (OLMo 2,
    2501.00656, section 3)."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, heads: int, group: Any) -> None:
        """hidden_size: of one head. group: the tensor-parallel ranks; their number divides `heads`."""
        super().__init__()
        self.group, self.eps, self.width = group, eps, heads * hidden_size
        self.weight = _weight(self.width // group.size(), config)

    def forward(self, x: Tensor) -> Tensor:
        """[T, 1, heads here, W] -> the same."""
        wide = x.float()
        squares = wide.square().sum((-2, -1), keepdim=True)
        # summed over the ranks forward, and its gradient backward: every rank's output depends on the sum
        squares = reduce_from_tensor_model_parallel_region(squares, group=self.group)
        squares = copy_to_tensor_model_parallel_region(squares, group=self.group)
        normed = wide * torch.rsqrt(squares / self.width + self.eps)
        return (normed * self.weight.view(x.shape[-2:]).float()).to(x.dtype)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """The weight is split along its only axis."""
        state = self.state_dict(prefix="", keep_vars=True)
        groups = {"tp_group": self.group, "dp_cp_group": (metadata or {}).get("dp_cp_group")}
        return make_sharded_tensors_for_checkpoint(state, prefix, {"weight": 0}, sharded_offsets, **groups)


def _weight(size: int, config: TransformerConfig) -> torch.nn.Parameter:
    """On the device of Megatron-Core's own layers: a model that no data parallelism wraps is not moved later."""
    device = None if config.use_cpu_initialization else torch.cuda.current_device()
    return torch.nn.Parameter(torch.empty(size, dtype=config.params_dtype, device=device))


def with_norm_after(layer: type, norm: Any) -> type:
    """The same row-parallel linear layer with a norm over its output, bias included; what is added to the residual."""

    class WithNormAfter(layer):
        def __init__(self, input_size: int, output_size: int, *, config: TransformerConfig, **kwargs: Any) -> None:
            super().__init__(input_size, output_size, config=config, **kwargs)
            self.norm_after = norm(config=config, hidden_size=output_size, eps=config.layernorm_epsilon)

        def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
            output, bias = super().forward(*args, **kwargs)
            return self.norm_after(output if bias is None else output + bias), None

    return WithNormAfter
