"""Whether a model with experts, latent attention or norms over all heads fits a grid; the rest: config/check.py."""

from __future__ import annotations

from megadpo.config import ParallelConfig
from megadpo.convert.shape import Experts, ModelShape


def misfits(shape: ModelShape, parallel: ParallelConfig) -> list[str]:
    """Lines that say what was given, what is allowed and what to do; none means all is well."""
    dealt, tensor = parallel.expert_model_parallel_size, parallel.tensor_model_parallel_size
    found = []
    if shape.experts is not None:
        found += _expert_misfits(shape.experts, dealt, tensor)
    elif dealt > 1:
        found.append(f"parallel.expert_model_parallel_size = {dealt}: this model has no experts; leave it out")
    if tensor > 1 and (shape.experts or shape.latent) and not parallel.sequence_parallel:
        what = "experts" if shape.experts else "latent attention"
        found.append(
            f"parallel.sequence_parallel = false: models with {what} need it where "
            f"parallel.tensor_model_parallel_size is over 1 (here {tensor}); set it to true"
        )
    if shape.norms.queries_keys == "projection" and shape.num_query_groups % tensor:
        found.append(
            f"parallel.tensor_model_parallel_size = {tensor}: a {shape.family} model with num_key_value_heads "
            f"{shape.num_query_groups} has a norm over all keys; use a divisor of that number"
        )
    if latent := shape.latent:
        sizes = {"q_lora_rank": latent.query_rank or 0, "kv_lora_rank + qk_rope_head_dim": latent.key_value_rank}
        sizes["kv_lora_rank + qk_rope_head_dim"] += latent.rotary_width
        found += [
            f"parallel.tensor_model_parallel_size = {tensor}: must divide the model's {name} ({size})"
            for name, size in sizes.items()
            if size % tensor
        ]
    return found


def _expert_misfits(experts: Experts, dealt: int, tensor: int) -> list[str]:
    found = []
    if experts.count % dealt:
        fitting = ", ".join(str(size) for size in range(1, experts.count + 1) if experts.count % size == 0)
        found.append(
            f"parallel.expert_model_parallel_size = {dealt}: must divide the model's {experts.count} experts; sizes "
            f"that fit: {fitting}"
        )
    given = f"parallel.tensor_model_parallel_size = {tensor}"
    if dealt == 1 and experts.ffn_hidden_size % tensor:
        found.append(
            f"{given}: must divide the experts' size of {experts.ffn_hidden_size}; change it, or set "
            "parallel.expert_model_parallel_size over 1, which leaves experts whole"
        )
    if experts.shared_ffn_hidden_size % tensor:
        found.append(f"{given}: must divide the shared experts' size of {experts.shared_ffn_hidden_size}")
    if dealt == 1 and tensor > 1 and experts.bias:
        found.append(
            f"parallel.expert_model_parallel_size = 1: experts with biases cannot be split over tensor-parallel ranks; "
            f"set it to {tensor}, or parallel.tensor_model_parallel_size to 1"
        )
    return found
