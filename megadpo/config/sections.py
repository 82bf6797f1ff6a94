"""The run file: frozen dataclasses, one per section. What stands here is what a run file may say.

Names the field already knows are used as they are: Megatron's for parallelism, TRL's for the objective.
Batch sizes count groups: a prompt with its responses, so a preference pair counts once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megadpo.objectives import DPO, Objective


@dataclass(frozen=True)
class ModelConfig:
    """The policy."""

    path: str
    """Hugging Face folder (config.json, safetensors, tokenizer files), or one that `megadpo import` wrote."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """dtype of weights and activations. bfloat16 keeps float32 master weights in the optimizer."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activation recompute: nothing, the attention only, or every layer."""
    logprob_backend: Literal["auto", "reference", "chunked", "triton"] = "auto"
    """Code of the head. chunked: torch, a few rows at a time. triton: the same with kernels (not yet run on a device).
    reference: plain torch in float64 that holds the logits of a whole micro-batch, to compare with. auto: chunked.
    With triton, response sums, DPO's loss and the copies of prompts' keys and values run as kernels too."""
    fp8_format: Literal["hybrid", "e4m3"] | None = None
    """FP8 for the matrix products of attention and MLP: e4m3, or hybrid, which has e5m2 for gradients. Embedding, head,
    norms and the attention itself stay in dtype. Needs Transformer Engine, or fp8_emulation."""
    fp8_recipe: Literal["delayed", "tensorwise", "blockwise", "mxfp8"] = "tensorwise"
    """How FP8 is scaled: a tensor by the largest number of the passes before (delayed) or of this one (tensorwise);
    blocks of 128 x 128 weights and 1 x 128 activations (blockwise); every 32 numbers (mxfp8, Blackwell)."""
    fp8_param_gather: bool = False
    """Weights are kept in FP8 beside the optimizer's float32 masters, and gathered in FP8."""
    first_last_layers_bf16: bool = False
    """The first and last layers stay in bfloat16; not with the delayed recipe."""
    num_layers_at_start_in_bf16: int = 1
    num_layers_at_end_in_bf16: int = 1
    fp8_emulation: bool = False
    """Round the operands of the same products to FP8 and multiply in float32: FP8's numbers on any device, slower."""
    cuda_graphs: tuple[Literal["mlp", "moe_router"], ...] = ()
    """Parts of every layer that a training step replays as CUDA graphs, by Megatron's names: norm and MLP (mlp); in
    layers with experts the norm, the router and shared experts (moe_router). The same numbers with fewer launches, and
    memory that is never given back. Not with fp8_recipe: delayed. Not yet run on a device."""

    @property
    def real_fp8(self) -> bool:
        """Whether products run in FP8, not in an emulation of it."""
        return self.fp8_format is not None and not self.fp8_emulation


@dataclass(frozen=True)
class ReferenceConfig:
    """The frozen model that the objective compares with. Objectives that need none never load it, and a
    run of theirs with these settings is refused."""

    mode: Literal["precomputed", "resident", "swapped"] = "precomputed"
    """precomputed: one pass before training, kept on disk. resident: a second model beside the policy. swapped: one in
    host memory that comes to the device every swap_steps steps, for a pass over what these train on."""
    path: str | None = None
    """Hugging Face folder; the policy's own initial weights where not given."""
    check_groups: int = 8
    """At every start so many groups of a precomputed column are computed again and compared."""
    fp8_weights: bool = False
    """A resident reference's linear layers are kept in FP8 and nothing else: half the memory of bfloat16. Embedding,
    head and norms stay in model.dtype."""
    swap_steps: int = 8
    """Steps that one visit of a swapped reference is for."""


@dataclass(frozen=True)
class DataConfig:
    """Preference data and how it becomes tokens."""

    train: tuple[str, ...]
    """Files (.jsonl, .json, .parquet, .arrow), folders written by `datasets`, or Hub ids; one or a list."""
    eval: tuple[str, ...] = ()
    """Held-out data, in the same forms."""
    split: str | None = None
    """Split to read from a Hub id or a DatasetDict folder; `train` where not given."""
    format: str = "auto"
    """Name of the record format, or auto: detected from the columns."""
    convert: (
        Literal[
            "pairs_to_unpaired",
            "pairs_to_demonstrations",
            "unpaired_to_demonstrations",
            "lists_to_demonstrations",
            "lists_to_pairs_best_worst",
            "lists_to_pairs_best_random",
            "lists_to_pairs_all",
        ]
        | None
    ) = None
    """Makes the data the kind that the objective needs (docs/data.md); nothing is converted where it is not given."""
    loss_on: Literal["answer", "all_turns", "all_tokens"] = "answer"
    """Which tokens of a demonstration are trained on: the last answer, what the assistant says in every turn, or the
    prompt too. Objectives over several responses or over labels know only the answer."""
    tokenizer: str | None = None
    """Folder, or a bare sentencepiece .model file; the model's folder where not given."""
    chat_template: str | None = None
    """A file with a Jinja template; the model's own where not given, ChatML where it has none."""
    max_length: int = 1024
    """Most tokens of prompt + one response."""
    truncation_mode: Literal["keep_end", "keep_start", "drop"] = "keep_end"
    """A group over max_length first loses prompt tokens, from its start (keep_end) or its end (keep_start), then
    the ends of over-long responses; drop leaves the group out."""
    num_proc: int | None = None
    """Tokenising processes; the machine's cores (at most 8) where not given."""
    cache_dir: str = "~/.cache/megadpo"
    """Where tokenised stores and reference columns are kept; on a file system that all nodes share."""


@dataclass(frozen=True)
class ParallelConfig:
    """The grid. Data parallelism is what is left of the world."""

    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    virtual_pipeline_model_parallel_size: int | None = None
    """Model chunks per pipeline rank (interleaved 1F1B); none where not given."""
    data_parallel_size: int | None = None
    """Replicas. Not given: world size / (tensor x pipeline) under torchrun or SLURM; on one machine without
    either, as many as its GPUs allow, and 1 without a GPU."""
    expert_model_parallel_size: int = 1
    """Ranks that a layer's experts are dealt to; it must divide tensor x data. With 1, every expert is split over the
    tensor-parallel ranks instead."""
    sequence_parallel: bool = False
    """Split activations outside attention and MLP over the tensor-parallel ranks. Models with experts need it where
    tensor_model_parallel_size is over 1."""
    use_distributed_optimizer: bool = True
    """Shard master weights and moments over the data-parallel ranks."""
    overlap_grad_reduce: bool = False
    """Reduce gradients over the data-parallel ranks while the backward pass goes on."""
    overlap_param_gather: bool = False
    """Gather updated weights while the next forward pass goes on."""
    overlap_p2p_comm: bool = True
    """With virtual stages: send to the neighbour stages while the next chunk computes."""
    tp_comm_overlap: bool = False
    """Gather and reduce over the tensor-parallel ranks inside the matrix products (Transformer Engine's user buffers).
    Needs sequence_parallel, and GPUs of one node that see each other's memory. Not yet run on a device."""


@dataclass(frozen=True)
class BatchConfig:
    """Batches count groups (for DPO: pairs)."""

    global_batch_size: int = 64
    """Groups per update, over all ranks."""
    micro_batch_size: int | None = None
    """Most groups in one micro-batch; as many as fit the token budget where not given."""
    micro_batch_tokens: int | None = None
    """Token budget of a micro-batch: on a GPU, and wherever there is a pipeline, every micro-batch of the run is one
    stream of exactly so many tokens, padded where it is not full; on a CPU without a pipeline streams end after their
    last group. A group that takes more is cut or dropped by data.truncation_mode. Where not given it is chosen from the
    data, never below the longest group, and written in the log."""
    share_prompt: bool = True
    """A prompt stands once in the stream for all its responses. false: once for each; same numbers, more work."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its learning rate."""

    learning_rate: float = 5e-7
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: int | None = None
    """Steps of linear warm-up; warmup_ratio x all steps where not given."""
    warmup_ratio: float = 0.1
    min_lr_ratio: float = 0.0
    """Floor of the schedule, as a fraction of learning_rate."""
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    """Gradient clipping; 0 switches it off."""


@dataclass(frozen=True)
class TrainConfig:
    """How long, and what is done every so many steps (0: never)."""

    num_train_epochs: int = 1
    max_steps: int | None = None
    """Stop after so many updates, whatever the epochs."""
    eval_steps: int = 0
    """Evaluate on data.eval every N steps. With data.eval given, the end of the run always evaluates."""
    save_steps: int = 0
    """Write a checkpoint every N steps. The end of the run, Ctrl-C and SIGTERM always write one."""
    save_total_limit: int = 2
    """Checkpoints to keep."""
    async_save: bool = False
    """Write checkpoints in the background: training goes on after a copy in host memory (12 bytes per parameter over
    the data-parallel ranks, and the weights on one of them). A failure is told at the next step; the end of the run
    waits."""
    on_nonfinite: Literal["stop", "skip", "rewind"] = "stop"
    """A loss or gradient that is NaN or infinite never reaches the weights. stop: end the run and name rank and groups.
    skip: go on without that batch's update. rewind: go back to the newest checkpoint and leave that batch out."""
    max_skipped: int = 10
    """Most batches that skip and rewind may leave out in a run; one more stops it."""
    hang_timeout: float = 50.0
    """Seconds without a finished step (at least three times the median step) after which a rank is taken as hung: all
    ranks' stacks go to RUN_DIR/logs and the job ends with exit code 75. 0: never."""
    fp8_probe_steps: int = 0
    """With model.fp8_format: compare log-probabilities in FP8 with those in model.dtype every N steps; 0: only at the
    start."""
    fp8_probe_groups: int = 8
    """Groups of the training data that are compared."""
    fp8_drift_limit: float | None = None
    """Nats per token (the mean difference; of a reward model, of its rewards) over which the run stops with exit code
    3; no limit where not given."""
    shuffle: bool = True
    """New order every epoch, from seed and epoch. false: file order."""


@dataclass(frozen=True)
class ExportConfig:
    """The Hugging Face folder written at the end of the run."""

    path: str | None = None
    """Where to; RUN_DIR/export where not given."""
    enabled: bool = True
    dtype: Literal["bfloat16", "float16", "float32"] | None = None
    """dtype of the written weights; the source folder's where not given."""
    max_shard_size_gb: float = 5.0


@dataclass(frozen=True)
class LogConfig:
    """metrics.jsonl and the progress line are always on."""

    tensorboard: bool = False
    wandb_project: str | None = None
    """Log to Weights & Biases under this project."""
    wandb_mode: Literal["online", "offline"] = "online"
    run_name: str | None = None


@dataclass(frozen=True)
class Config:
    """A run. The same file, data and grid give the same numbers."""

    run_dir: str
    """Everything the run writes: metrics, checkpoints, logs, export. A run folder that has a checkpoint goes on."""
    model: ModelConfig
    data: DataConfig
    seed: int = 0
    objective: Objective = field(default_factory=DPO)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    log: LogConfig = field(default_factory=LogConfig)
