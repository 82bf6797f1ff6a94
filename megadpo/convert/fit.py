"""Whether a model with experts, latent attention or norms over all heads fits a grid, and any model FP8 on it; the
rest: config/check.py."""

from __future__ import annotations

from megadpo.config import ModelConfig, ParallelConfig
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
    if parallel.tp_comm_overlap and (shape.experts or shape.latent):
        found.append(
            "parallel.tp_comm_overlap = true: its buffers are for plain attention and MLPs, and this model has "
            f"{'experts' if shape.experts else 'latent attention'}; leave it out"
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


FP8_WIDTHS = {"delayed": 16, "tensorwise": 16, "blockwise": 16, "mxfp8": 32}
"""What every width of a matrix must be a multiple of, on each rank (transformer_engine/pytorch/utils.py:
assert_dim_for_fp8_exec, MXFP8Quantizer.is_quantizable; cublaslt_gemm.cu for the widths that are summed over)."""


def fp8_misfits(shape: ModelShape, model: ModelConfig, parallel: ParallelConfig) -> list[str]:
    """Lines on the sizes of a model, split over this grid, that FP8 cannot multiply, and on layers in bf16.

    An emulation takes any size.
    """
    if not model.real_fp8:
        return _not_emulated(shape, model)
    unit = FP8_WIDTHS[model.fp8_recipe]
    found = [
        f"model.fp8_recipe = {model.fp8_recipe}: {name} is {size} on each rank and must be a multiple of {unit}; "
        "change parallel.tensor_model_parallel_size, or leave model.fp8_format out"
        for name, size in _widths(shape, parallel).items()
        if size % unit
    ]
    if model.first_last_layers_bf16:
        most = shape.num_layers // parallel.pipeline_model_parallel_size
        found += [
            f"model.{name} = {count}: must be at most {most}, the layers of a pipeline stage"
            for name, count in (
                ("num_layers_at_start_in_bf16", model.num_layers_at_start_in_bf16),
                ("num_layers_at_end_in_bf16", model.num_layers_at_end_in_bf16),
            )
            if count > most
        ]
    return found


def _not_emulated(shape: ModelShape, model: ModelConfig) -> list[str]:
    found = []
    if model.fp8_emulation and shape.latent is not None:
        found.append(
            "model.fp8_emulation = true: has no latent attention (DeepSeek-V2 and V3), whose layers Megatron-Core "
            "knows by their classes; leave model.fp8_format out"
        )
    if model.fp8_emulation and shape.experts is not None and model.fp8_recipe == "delayed":
        found.append(
            "model.fp8_recipe = delayed: its emulation has no experts, as other ranks have other ones; use tensorwise, "
            "blockwise or mxfp8"
        )
    return found


def _widths(shape: ModelShape, parallel: ParallelConfig) -> dict[str, int]:
    """Rows and columns of the linear layers' weights on one rank, by name; once each."""
    tensor = parallel.tensor_model_parallel_size
    widths = {"the hidden size": shape.hidden_size}
    if latent := shape.latent:
        width = latent.query_key_width + latent.rotary_width
        widths["the queries' low rank"] = latent.query_rank or 0
        widths["the keys' and values' low rank"] = latent.key_value_rank
        widths["the keys' and values' low rank with the rotary width"] = latent.key_value_rank + latent.rotary_width
        widths["the queries"] = shape.num_attention_heads * width // tensor
        both = latent.query_key_width + latent.value_width
        widths["the keys and values"] = shape.num_attention_heads * both // tensor
        widths["attention's output"] = shape.num_attention_heads * latent.value_width // tensor
    else:
        heads, groups = shape.num_attention_heads, shape.num_query_groups
        widths["attention's output"] = heads * shape.kv_channels // tensor
        widths["the joint q, k, v projection"] = (heads + 2 * groups) * shape.kv_channels // tensor
    if shape.experts is None or not all(shape.experts.layers):
        widths["the MLP"] = shape.ffn_hidden_size // tensor
    if experts := shape.experts:
        split = tensor if parallel.expert_model_parallel_size == 1 else 1
        widths["an expert"] = experts.ffn_hidden_size // split
        widths["the shared experts"] = experts.shared_ffn_hidden_size // tensor
    return widths


def graph_misfits(shape: ModelShape, model: ModelConfig) -> list[str]:
    """Lines on parts to capture that this model has nowhere."""
    experts = shape.experts.layers if shape.experts else (False,)
    there = {"mlp": not all(experts), "moe_router": any(experts)}
    has = {"mlp": "experts in every layer; write [moe_router]", "moe_router": "no experts; write [mlp]"}
    missing = [scope for scope in model.cuda_graphs if not there[scope]]
    return [f"model.cuda_graphs has {scope}: this model has {has[scope]}, or leave it out" for scope in missing]


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
