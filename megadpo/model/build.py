"""From a model's shape and a grid to Megatron-Core's configuration, layer spec and this rank's model chunks."""

from __future__ import annotations

from typing import Any

import torch
from megadpo_kernels import Backend as LogprobBackend
from megadpo_kernels import triton_problem
from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TENorm
from megatron.core.fusions.fused_bias_geglu import quick_gelu
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer import MLATransformerConfig, TransformerConfig
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megadpo.config import ModelConfig, ParallelConfig
from megadpo.convert.shape import ModelShape
from megadpo.errors import MachineError
from megadpo.model.attention import Backend, SegmentAttention, choose_backend
from megadpo.model.experts import expert_options, use_experts
from megadpo.model.fp8 import fp8_options, machine_problem
from megadpo.model.fp8_emulation import Rounding, round_layers, rounded_layers
from megadpo.model.fp8_weights import hold_linear_layers
from megadpo.model.graphs import GraphedLayer
from megadpo.model.latent import latent_options, use_latent_attention
from megadpo.model.norms import ProjectionNorm, RMSNorm, with_norm_after
from megadpo.model.policy import Policy
from megadpo.model.rope import TwoBaseAttention, inverse_frequencies, softmax_scale
from megadpo.parallel import mcore_fixes
from megadpo.parallel.context import ParallelContext
from megadpo.parallel.cuda_graphs import graphs_problem
from megadpo.parallel.user_buffers import overlap_problem

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def padded_vocab(vocab_size: int, tensor_size: int) -> int:
    """Rows of the embedding: the vocabulary, rounded up to a multiple of the tensor-parallel size and no further."""
    return -(-vocab_size // tensor_size) * tensor_size


def stage_layers(num_layers: int, stages: int) -> list[int]:
    """Layers of every pipeline stage in order. What does not divide goes to the early stages: the last has the head."""
    base, extra = divmod(num_layers, stages)
    return [base + (stage < extra) for stage in range(stages)]


def pipeline_layout(num_layers: int, stages: int) -> list[list[str]]:
    """Megatron-Core's layout of uneven stages, one list of layer kinds per (virtual) stage."""
    layout = [["decoder"] * n for n in stage_layers(num_layers, stages)]
    layout[0].insert(0, "embedding")
    layout[-1].append("loss")
    return layout


def transformer_config(
    shape: ModelShape, parallel: ParallelConfig, model: ModelConfig, device: torch.device
) -> TransformerConfig:
    """Megatron-Core's configuration of one model. Every model gets its own: the schedule keeps hooks in it."""
    on_gpu, te = device.type == "cuda", mcore_fixes.have_te() and Rounding.of(model) is None
    pipeline = parallel.pipeline_model_parallel_size
    virtual = parallel.virtual_pipeline_model_parallel_size
    options: dict[str, Any] = fp8_options(model)
    if pipeline > 1:
        options["pipeline_model_parallel_layout"] = pipeline_layout(shape.num_layers, pipeline * (virtual or 1))
    if virtual:
        # batched p2p mixes up the two directions between 2 ranks (mcore_fixes.refuse)
        options |= {"overlap_p2p_comm": parallel.overlap_p2p_comm, "batch_p2p_comm": not parallel.overlap_p2p_comm}
    if model.recompute == "full":
        options |= {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        }
    elif model.recompute == "selective":
        options["recompute_granularity"] = "selective"
    # Megatron-Core sums the gradients of norms on single heads over the tensor-parallel ranks
    options["qk_layernorm"] = shape.norms.queries_keys == "head"
    if shape.experts is not None:
        options |= expert_options(shape.experts, parallel, te)
    if shape.latent is not None:
        options |= latent_options(shape.latent)
    config = (MLATransformerConfig if shape.latent else TransformerConfig)(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.num_query_groups,
        kv_channels=shape.kv_channels,
        layernorm_epsilon=shape.layernorm_epsilon,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=ACTIVATIONS[shape.activation],
        layernorm_zero_centered_gamma=shape.norms.zero_centred,
        softmax_scale=softmax_scale(shape),
        add_bias_linear=shape.experts is not None and shape.experts.bias,
        add_qkv_bias=shape.qkv_bias,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=pipeline,
        virtual_pipeline_model_parallel_size=virtual,
        sequence_parallel=parallel.sequence_parallel,
        params_dtype=DTYPES[model.dtype],
        pipeline_dtype=DTYPES[model.dtype],
        bf16=model.dtype == "bfloat16",
        perform_initialization=False,  # every parameter is read from the Hugging Face folder
        use_cpu_initialization=not on_gpu,
        # "tokens" is what the objective counts: the sum of gradients is divided once, by the global count
        calculate_per_token_loss=True,
        bias_activation_fusion=on_gpu and shape.activation == "silu",
        bias_dropout_fusion=on_gpu,
        masked_softmax_fusion=False,
        # our latent attention turns its queries and keys itself (model/latent.py)
        apply_rope_fusion=on_gpu and te and shape.latent is None,
        gradient_accumulation_fusion=on_gpu and (te or mcore_fixes.have_apex_gradients()),
        tp_comm_overlap=parallel.tp_comm_overlap,
        cuda_graph_scope=[],
        **options,
    )
    mcore_fixes.refuse(config)
    return config


def with_bias(layer: type) -> type:
    """The same parallel linear layer, always with a bias: Llama's o_proj and MLP have theirs switched one by one,
    where Megatron-Core has one switch for all."""

    class WithBias(layer):
        def __init__(self, *args: Any, bias: bool = True, **kwargs: Any) -> None:
            super().__init__(*args, bias=True, **kwargs)

    return WithBias


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """GELU by its tanh approximation (1606.08415, section 2)."""
    return torch.nn.functional.gelu(x, approximate="tanh")


ACTIVATIONS = {"silu": torch.nn.functional.silu, "gelu_tanh": gelu_tanh, "quick_gelu": quick_gelu}


def block_spec(
    config: TransformerConfig,
    shape: ModelShape,
    stage: int | None,
    attention_backend: Backend,
    context: ParallelContext,
    model: ModelConfig,
) -> TransformerBlockSubmodules:
    """Transformer Engine's layers where it is installed, Megatron-Core's own otherwise, and where FP8 is emulated; our
    attention in all."""
    rounding = Rounding.of(model)
    te = mcore_fixes.have_te() and rounding is None
    first = get_transformer_layer_offset(config, vp_stage=stage)
    layers = range(first, first + get_num_layers_to_build(config, vp_stage=stage))
    in_fp8 = rounded_layers(model, shape.num_layers)
    kinds = [(shape.experts is not None and shape.experts.layers[layer], in_fp8[layer]) for layer in layers]
    specs = {}
    for kind in set(kinds):
        with_experts, rounded = kind
        specs[kind] = layer_spec(shape, with_experts, attention_backend, context, model.logprob_backend, te)
        if rounded and rounding is not None:
            round_layers(specs[kind], rounding)
    return TransformerBlockSubmodules(layer_specs=[specs[kind] for kind in kinds], layer_norm=TENorm if te else RMSNorm)


def layer_spec(
    shape: ModelShape,
    with_experts: bool,
    attention_backend: Backend,
    context: ParallelContext,
    kernels: LogprobBackend,
    te: bool,
) -> ModuleSpec:
    """A layer with experts, or with the plain MLP. te: of Transformer Engine's layers."""
    latent = shape.latent is not None
    options: dict[str, Any] = {"multi_latent_attention": latent, "qk_layernorm": latent}
    if te:
        layer = get_gpt_layer_with_transformer_engine_spec(**options)
    else:
        layer = get_gpt_layer_local_spec(normalization="RMSNorm", **options)
    layer.module = GraphedLayer
    norm = TENorm if te else RMSNorm
    attention, mlp = layer.submodules.self_attention, layer.submodules.mlp.submodules
    linear = attention.submodules
    own = {"shape": shape, "backend": attention_backend, "kernels": kernels}
    linear.core_attention = ModuleSpec(SegmentAttention, params=own)
    if shape.local_rotary_base is not None and shape.window is not None:
        attention.module = TwoBaseAttention
        attention.params = {**attention.params, "layers": shape.window.layers}
    if not shape.norms.before:
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = IdentityOp
        if te:  # whose usual ones begin with the norm
            linear.linear_qkv = mlp.linear_fc1 = TEColumnParallelLinear
    elif not te:
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = norm
    if shape.norms.queries_keys == "head":
        linear.q_layernorm = linear.k_layernorm = norm
    elif shape.norms.queries_keys == "projection":
        group = context.groups.tp
        linear.q_layernorm = ModuleSpec(ProjectionNorm, params={"heads": shape.num_attention_heads, "group": group})
        linear.k_layernorm = ModuleSpec(ProjectionNorm, params={"heads": shape.num_query_groups, "group": group})
    _change_linear_layers(shape, linear, mlp, norm)
    if shape.latent is not None:
        use_latent_attention(layer.submodules, shape.latent, norm, te)
    if with_experts and shape.experts is not None:
        use_experts(layer.submodules, shape.experts, norm, te)
    return layer


def _change_linear_layers(shape: ModelShape, attention: Any, mlp: Any, norm: type) -> None:
    """Biases and norms of single linear layers, in the specs of attention and MLP."""
    if shape.proj_bias:
        attention.linear_proj = with_bias(attention.linear_proj)
    if shape.mlp_bias:
        mlp.linear_fc1, mlp.linear_fc2 = with_bias(mlp.linear_fc1), with_bias(mlp.linear_fc2)
    if shape.norms.after:
        attention.linear_proj = with_norm_after(attention.linear_proj, norm)
        mlp.linear_fc2 = with_norm_after(mlp.linear_fc2, norm)


def mark_tensor_parallel(chunk: Policy) -> None:
    """Say which weights are split over tensor-parallel ranks. Megatron-Core marks them while it initialises them, which
    is off here; unmarked, they would be taken for replicas and left out of the gradient norm on all ranks but one."""
    for module in chunk.modules():
        weight = getattr(module, "weight", None)  # held in FP8 there is none
        if isinstance(module, ColumnParallelLinear | VocabParallelEmbedding) and weight is not None:
            _mark(weight, dim=0)
        elif isinstance(module, RowParallelLinear) and weight is not None:
            _mark(weight, dim=1)
        elif isinstance(module, ProjectionNorm):
            _mark(module.weight, dim=0)
        elif isinstance(module, SegmentAttention) and module.softmax_offset is not None:
            _mark(module.softmax_offset, dim=0)


def _mark(weight: torch.nn.Parameter, dim: int) -> None:
    if not hasattr(weight, "tensor_model_parallel"):
        set_tensor_model_parallel_attributes(weight, is_parallel=True, dim=dim, stride=1)


def mark_experts(chunk: Policy) -> None:
    """Say which weights are experts'. Megatron-Core does it only where experts are dealt to several ranks; done always,
    optimizer state has one layout for all grids, and every checkpoint loads on every grid.

    Experts, biases too, count in the gradient norm on every rank: each has others, or other parts of them. For the same
    reason their biases are not to be summed over tensor-parallel ranks, as Megatron-Core does under sequence
    parallelism.
    """
    for module in chunk.modules():
        if isinstance(module, MoELayer):
            for parameter in module.experts.parameters():
                parameter.allreduce = False  # with the expert-data-parallel ranks only
                parameter.sequence_parallel = False
                _mark(parameter, dim=0)


def check_machine(model: ModelConfig, parallel: ParallelConfig, device: torch.device) -> None:
    """Raise MachineError where this device or what is installed cannot run the model as the run file says."""
    triton = triton_problem(device) if model.logprob_backend == "triton" else None
    if triton:
        raise MachineError(f"model.logprob_backend = triton on {device.type}: {triton}")
    te = mcore_fixes.have_te() and Rounding.of(model) is None
    problems = (machine_problem(model, device), overlap_problem(parallel, device, te), graphs_problem(model, device))
    if problem := next(filter(None, problems), None):
        raise MachineError(problem)


def build_chunks(
    shape: ModelShape,
    parallel: ParallelConfig,
    context: ParallelContext,
    model: ModelConfig,
    held_in_fp8: bool = False,
) -> list[Policy]:
    """This rank's model chunks (one without interleaving), on its device, parameters not yet filled.

    model: how they compute; its path is not looked at. held_in_fp8: see model/fp8_weights.py. The grid fits the model
    (convert/fit.py). Raises MachineError, see `check_machine`.
    """
    check_machine(model, parallel, context.device)
    config = transformer_config(shape, parallel, model, context.device)
    backend, _ = choose_backend(context.device, DTYPES[model.dtype], shape)
    chunks = []
    for stage, first, last in context.stages():
        spec = block_spec(config, shape, stage, backend, context, model)
        if held_in_fp8:
            for layer in {id(layer): layer for layer in spec.layer_specs}.values():  # several share one
                hold_linear_layers(layer)
        chunk = Policy(
            config,
            spec,
            vocab_size=padded_vocab(shape.vocab_size, context.tensor_size),
            max_sequence_length=shape.max_position_embeddings,
            pre_process=first,
            post_process=last,
            share_embeddings_and_output_weights=shape.tied,
            position_embedding_type="rope",
            rotary_percent=shape.rotary_percent,
            rotary_base=int(shape.rotary_base),
            pg_collection=context.groups,
            vp_stage=stage,
            shape=shape,
            attention=backend,
            logprob_backend=model.logprob_backend,
        )
        mark_tensor_parallel(chunk)
        mark_experts(chunk)
        if shape.latent is None:
            chunk.rotary_pos_emb.inv_freq = inverse_frequencies(shape).to(context.device)
        chunks.append(chunk)
    return chunks
