"""Layers with a mixture of experts: Megatron-Core's, with the families' own ways of choosing experts.

No token is dropped, and nothing pulls the load even: preference training takes few steps from a model whose router is
trained, and an auxiliary loss would add a gradient that is none of the objective's.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe.router import Router
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules
from torch import Tensor

from megadpo.config import ParallelConfig
from megadpo.convert.shape import Experts
from megadpo.parallel.context import expert_tensor_size


def expert_options(experts: Experts, parallel: ParallelConfig, te: bool) -> dict[str, Any]:
    """Megatron-Core's settings of the experts, beside those of any model."""
    return {
        "num_moe_experts": experts.count,
        "moe_router_topk": experts.per_token,
        "moe_ffn_hidden_size": experts.ffn_hidden_size,
        "moe_layer_freq": [int(there) for there in experts.layers],
        "moe_shared_expert_intermediate_size": experts.shared_ffn_hidden_size or None,
        "moe_router_load_balancing_type": "none",
        "moe_router_dtype": "fp32" if experts.router_float32 else None,
        "moe_router_pre_softmax": True,  # read by nobody here; Megatron-Core refuses top-1 without it
        "moe_token_dispatcher_type": "alltoall",
        "moe_grouped_gemm": te,
        "activation_func_clamp_value": experts.clamp,
        "glu_linear_offset": 0.0 if experts.clamp is None else 1.0,
        "expert_model_parallel_size": parallel.expert_model_parallel_size,
        "expert_tensor_parallel_size": expert_tensor_size(parallel),
    }


def use_experts(layer: TransformerLayerSubmodules, experts: Experts, norm: type, te: bool) -> None:
    """Turn the spec of a layer with a plain MLP into one with experts. norm: the class of the norm in front of them,
    which with Transformer Engine's layers (te) is not part of the first linear layer here."""
    layer.mlp = get_moe_module_spec(use_te=te, num_experts=experts.count, moe_grouped_gemm=te)
    if experts.bias and not te:
        expert = layer.mlp.submodules.experts.submodules
        expert.linear_fc2 = _own_result(expert.linear_fc2)
    layer.mlp.submodules.router = ModuleSpec(ExpertChoice, params={"experts": experts})
    layer.pre_mlp_layernorm = norm
    layer.sharded_state_dict_keys_map.pop("pre_mlp_layernorm.", None)  # so it has a key of its own, with TE or without


def _own_result(layer: type) -> type:
    """The linear layer, with a result that may be changed in place. Megatron-Core's MLP adds an expert's bias so
    (mlp.py), which torch forbids for what the layer's reduction over ranks hands through."""

    class OwnResult(layer):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
            output, bias = super().forward(x)
            return output.clone(), bias

    return OwnResult


class ExpertChoice(Router):
    """Which experts a token goes to, and with what weight, as its family defines it."""

    def __init__(
        self, config: TransformerConfig, experts: Experts, pg_collection: ProcessGroupCollection | None = None
    ) -> None:
        super().__init__(config, pg_collection)
        self.experts = experts
        self.expert_bias: Tensor | None
        # A buffer: it is not trained, and stays float32 whatever the dtype of the weights.
        bias = torch.zeros(experts.count, device=self.weight.device) if experts.selection_bias else None
        self.register_buffer("expert_bias", bias)

    def forward(self, input: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """hidden [T, 1, D] -> weights [T, experts], 0 where not chosen, and bool [T, experts], True where chosen."""
        return self.routing(self.gating(input))

    def routing(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """As `forward`, from the router's logits [T, 1, experts]."""
        return choose(logits.flatten(0, -2), self.experts, self.expert_bias)


def choose(logits_TE: Tensor, experts: Experts, bias_E: Tensor | None) -> tuple[Tensor, Tensor]:
    """Weights [T, E] of the logits' dtype, and bool [T, E].

    Softmax: Mixtral (2401.04088, section 2.1). Groups worth their best score: DeepSeek-V2 (2405.04434, section 2.2.2).
    Sigmoid, bias, groups worth their two best scores: DeepSeek-V3 (2412.19437, equations 12 to 16).
    """
    scores = logits_TE.float()
    scores = scores.sigmoid() if experts.score == "sigmoid" else scores.softmax(-1)
    ranked = scores.detach() if bias_E is None else scores.detach() + bias_E
    if experts.groups > experts.groups_per_token:
        ranked = _in_best_groups(ranked, experts)
    chosen = ranked.topk(experts.per_token, -1).indices
    weights = scores.gather(1, chosen)
    if experts.normalised:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    weights = (weights * experts.scaling).to(logits_TE.dtype)
    # One expert per column: no two entries of a row meet, so the result does not depend on their order.
    everything = torch.zeros_like(logits_TE).scatter(1, chosen, weights)
    return everything, torch.zeros_like(logits_TE, dtype=torch.bool).scatter(1, chosen, True)


def _in_best_groups(ranked_TE: Tensor, experts: Experts) -> Tensor:
    """The scores, minus infinity outside each token's best groups."""
    grouped = ranked_TE.view(len(ranked_TE), experts.groups, -1)
    worth = grouped.topk(experts.group_score, -1).values.sum(-1)
    best = worth.topk(experts.groups_per_token, -1).indices
    outside = torch.ones_like(worth, dtype=torch.bool).scatter(1, best, False)
    return grouped.masked_fill(outside[..., None], float("-inf")).flatten(1)
