"""From a model's shape and a grid to Megatron-Core's configuration, layer spec and this rank's model chunks."""

from __future__ import annotations

from typing import Any

import torch
from megadpo_kernels import Backend as LogprobBackend
from megadpo_kernels import triton_problem
from megatron.core.extensions.transformer_engine import TENorm
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

from megadpo.config import ParallelConfig
from megadpo.convert.shape import ModelShape
from megadpo.errors import MachineError
from megadpo.model.attention import Backend, SegmentAttention, choose_backend
from megadpo.model.policy import Policy
from megadpo.model.rope import inverse_frequencies
from megadpo.parallel import mcore_fixes
from megadpo.parallel.context import ParallelContext

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
    shape: ModelShape, parallel: ParallelConfig, dtype: str, recompute: str, device: torch.device
) -> TransformerConfig:
    """Megatron-Core's configuration of one model. Every model gets its own: the schedule keeps hooks in it."""
    on_gpu, te = device.type == "cuda", mcore_fixes.have_te()
    pipeline = parallel.pipeline_model_parallel_size
    virtual = parallel.virtual_pipeline_model_parallel_size
    options: dict[str, Any] = {}
    if pipeline > 1:
        options["pipeline_model_parallel_layout"] = pipeline_layout(shape.num_layers, pipeline * (virtual or 1))
    if virtual:
        # batched p2p mixes up the two directions between 2 ranks (mcore_fixes.refuse)
        options |= {"overlap_p2p_comm": True, "batch_p2p_comm": False}
    if recompute == "full":
        options |= {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        }
    elif recompute == "selective":
        options["recompute_granularity"] = "selective"
    config = TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.num_query_groups,
        kv_channels=shape.kv_channels,
        layernorm_epsilon=shape.layernorm_epsilon,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        add_qkv_bias=shape.qkv_bias,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=pipeline,
        virtual_pipeline_model_parallel_size=virtual,
        sequence_parallel=parallel.sequence_parallel,
        params_dtype=DTYPES[dtype],
        pipeline_dtype=DTYPES[dtype],
        bf16=dtype == "bfloat16",
        perform_initialization=False,  # every parameter is read from the Hugging Face folder
        use_cpu_initialization=not on_gpu,
        # "tokens" is what the objective counts: the sum of gradients is divided once, by the global count
        calculate_per_token_loss=True,
        bias_activation_fusion=on_gpu,
        bias_dropout_fusion=on_gpu,
        masked_softmax_fusion=False,
        apply_rope_fusion=on_gpu and te,
        gradient_accumulation_fusion=on_gpu and te,
        cuda_graph_scope=[],
        **options,
    )
    mcore_fixes.refuse(config)
    return config


class SequenceParallelRMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm as Megatron-Core builds norms, with the mark that makes its gradient summed over tensor-parallel
    ranks under sequence parallelism (Megatron-Core's own wrapper refuses that combination)."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


def with_bias(layer: type) -> type:
    """The same parallel linear layer, always with a bias: Llama's o_proj and MLP have theirs switched one by one,
    where Megatron-Core has one switch for all."""

    class WithBias(layer):
        def __init__(self, *args: Any, bias: bool = True, **kwargs: Any) -> None:
            super().__init__(*args, bias=True, **kwargs)

    return WithBias


def block_spec(
    config: TransformerConfig,
    shape: ModelShape,
    stage: int | None,
    attention_backend: Backend,
    kernels: LogprobBackend = "auto",
) -> TransformerBlockSubmodules | ModuleSpec:
    """Transformer Engine's layers where it is installed, Megatron-Core's own otherwise; our attention in both."""
    if mcore_fixes.have_te():
        layer = get_gpt_layer_with_transformer_engine_spec()
        final_norm = TENorm
    else:
        layer = get_gpt_layer_local_spec(normalization="RMSNorm")
        layer.submodules.input_layernorm = SequenceParallelRMSNorm
        layer.submodules.pre_mlp_layernorm = SequenceParallelRMSNorm
        final_norm = SequenceParallelRMSNorm
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = ModuleSpec(SegmentAttention, params={"backend": attention_backend, "kernels": kernels})
    if shape.proj_bias:
        attention.linear_proj = with_bias(attention.linear_proj)
    if shape.mlp_bias:
        mlp = layer.submodules.mlp.submodules
        mlp.linear_fc1, mlp.linear_fc2 = with_bias(mlp.linear_fc1), with_bias(mlp.linear_fc2)
    layers = get_num_layers_to_build(config, vp_stage=stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * layers, layer_norm=final_norm)


def mark_tensor_parallel(chunk: Policy) -> None:
    """Say which weights are split over tensor-parallel ranks. Megatron-Core marks them while it initialises them, which
    is off here; unmarked, they would be taken for replicas and left out of the gradient norm on all ranks but one."""
    for module in chunk.modules():
        if isinstance(module, ColumnParallelLinear | VocabParallelEmbedding) and module.weight is not None:
            _mark(module.weight, dim=0)
        elif isinstance(module, RowParallelLinear):
            _mark(module.weight, dim=1)


def _mark(weight: torch.nn.Parameter, dim: int) -> None:
    if not hasattr(weight, "tensor_model_parallel"):
        set_tensor_model_parallel_attributes(weight, is_parallel=True, dim=dim, stride=1)


def build_chunks(
    shape: ModelShape,
    parallel: ParallelConfig,
    context: ParallelContext,
    dtype: str,
    recompute: str = "none",
    logprob_backend: LogprobBackend = "auto",
) -> list[Policy]:
    """This rank's model chunks (one without interleaving), on its device, parameters not yet filled.

    Raises MachineError where the log-probability back end cannot run on this device.
    """
    problem = triton_problem(context.device) if logprob_backend == "triton" else None
    if problem:
        raise MachineError(f"model.logprob_backend = triton on {context.device.type}: {problem}")
    config = transformer_config(shape, parallel, dtype, recompute, context.device)
    backend = choose_backend(context.device, DTYPES[dtype])
    chunks = []
    for stage, first, last in context.stages():
        chunk = Policy(
            config,
            block_spec(config, shape, stage, backend, logprob_backend),
            vocab_size=padded_vocab(shape.vocab_size, context.tensor_size),
            max_sequence_length=shape.max_position_embeddings,
            pre_process=first,
            post_process=last,
            share_embeddings_and_output_weights=shape.tied,
            position_embedding_type="rope",
            rotary_base=int(shape.rotary_base),
            pg_collection=context.groups,
            vp_stage=stage,
            valid_vocab=shape.vocab_size,
            attention=backend,
            logprob_backend=logprob_backend,
        )
        mark_tensor_parallel(chunk)
        chunk.rotary_pos_emb.inv_freq = inverse_frequencies(shape).to(context.device)
        chunks.append(chunk)
    return chunks
