"""Rules of a run file beyond the types of its settings, and the fit of a grid to a model and a machine.

Every function returns lines that say what was given, what is allowed and what to do; none means all is well.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from megadpo.config import Config, ModelConfig, ParallelConfig, ReferenceConfig, TrainConfig
from megadpo.objectives.kinds import kind_of
from megadpo.objectives.names import name_of

LARGEST_SEED = 2**32 - 1
SECRETS = re.compile(
    r"(?<![A-Za-z0-9])(hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}"
    r"|glpat-[\w-]{16,}|xox[abprs]-[\w-]{10,}|AKIA[A-Z0-9]{16}|[0-9a-f]{40})(?![A-Za-z0-9])|://[^/\s:@]+:[^/\s@]+@"
)
"""What keys of Hugging Face, OpenAI, GitHub, GitLab, Slack, AWS and W&B look like, and a password in a URL."""


def problems(config: Config) -> list[str]:
    """What is wrong with the settings, as far as the run file alone can tell."""
    return [
        *_sizes(config),
        *_ranges(config),
        *_paths(config),
        *_secrets(config),
        *_combinations(config),
        *_fp8(config),
        *_graphs(config),
        *_objective(config),
        *_reference(config),
        *_kinds(config),
    ]


def _objective(config: Config) -> list[str]:
    """Its own rules, and what it needs that this run cannot give."""
    objective = config.objective
    found = objective.problems()
    if found:
        return found  # a mix with a wrong part may not be able to say what it needs
    name, mode = name_of(objective), config.reference.mode
    or_swapped = "" if "kl_N" in objective.needs else " or swapped"
    if objective.needs & {"reference_N", "kl_N"} and mode == "precomputed":
        found.append(
            f"reference.mode = {mode}: objective.loss_type {name} looks at single tokens and the "
            f"stored column has one number per response; set reference.mode: resident{or_swapped}"
        )
    if "kl_N" in objective.needs and mode == "swapped":
        found.append(
            f"reference.mode = swapped: objective.loss_type {name} compares whole distributions, for which the "
            "reference's head must be there in every step; set reference.mode: resident"
        )
    if "kl_N" in objective.needs and config.model.logprob_backend == "triton":
        found.append(
            f"model.logprob_backend = triton: has no KL between two heads, which objective.loss_type {name} needs; "
            "must be auto, chunked or reference"
        )
    return found


def _reference(config: Config) -> list[str]:
    """Settings of one mode of the reference given with another."""
    reference, found = config.reference, []
    if reference.fp8_weights and reference.mode != "resident":
        found.append(
            f"reference.fp8_weights = true: is for reference.mode = resident and this is {reference.mode}, which takes "
            "little of the device's memory anyway; leave one out"
        )
    if reference.fp8_weights and config.model.fp8_emulation:
        found.append(
            "reference.fp8_weights = true: not with model.fp8_emulation, which would round these weights a second "
            "time, as no device does; leave one out"
        )
    if reference.swap_steps != ReferenceConfig().swap_steps and reference.mode != "swapped":
        found.append(
            f"reference.swap_steps = {reference.swap_steps}: is for reference.mode = swapped and this is "
            f"{reference.mode}; leave it out"
        )
    return found


def unused_reference(config: Config) -> list[str]:
    """Settings of a reference that nothing would look at. `megadpo eval --kl` does for every objective, so that this is
    no rule of the run file alone."""
    mode = config.reference.mode
    given = {"path": config.reference.path, "mode": None if mode == "precomputed" else mode}
    return [
        f"reference.{name} = {value}: objective.loss_type {name_of(config.objective)} has no reference and would load "
        "none; leave it out (or choose another objective.loss_type)"
        for name, value in given.items()
        if value is not None
    ]


def _kinds(config: Config) -> list[str]:
    """Whether the data section makes what the objective needs; what the data are shows itself when they are read."""
    if config.objective.problems():
        return []
    needed, data, found = kind_of(config.objective), config.data, []
    if data.convert is not None and not data.convert.partition("_to_")[2].startswith(needed):
        found.append(
            f"data.convert = {data.convert}: objective.loss_type {name_of(config.objective)} needs {needed}; take a "
            f"conversion to {needed} or leave it out"
        )
    if data.loss_on != "answer" and needed != "demonstrations":
        found.append(
            f"data.loss_on = {data.loss_on}: is for demonstrations (loss_type: sft); objectives that compare responses "
            "or use labels look at the answer only; leave it out"
        )
    return found


def _sizes(config: Config) -> list[str]:
    """Counts with a smallest value; None is no count."""
    grid, data, batch, train = config.parallel, config.data, config.batch, config.train
    counts = [
        ("parallel.tensor_model_parallel_size", grid.tensor_model_parallel_size, 1),
        ("parallel.pipeline_model_parallel_size", grid.pipeline_model_parallel_size, 1),
        ("parallel.data_parallel_size", grid.data_parallel_size, 1),
        ("parallel.expert_model_parallel_size", grid.expert_model_parallel_size, 1),
        ("data.max_length", data.max_length, 2),
        ("data.num_proc", data.num_proc, 1),
        ("batch.global_batch_size", batch.global_batch_size, 1),
        ("batch.micro_batch_size", batch.micro_batch_size, 1),
        ("batch.micro_batch_tokens", batch.micro_batch_tokens, 1),
        ("optimizer.warmup_steps", config.optimizer.warmup_steps, 0),
        ("train.num_train_epochs", train.num_train_epochs, 1),
        ("train.max_steps", train.max_steps, 1),
        ("train.eval_steps", train.eval_steps, 0),
        ("train.save_steps", train.save_steps, 0),
        ("train.save_total_limit", train.save_total_limit, 1),
        ("train.max_skipped", train.max_skipped, 0),
        ("train.fp8_probe_steps", train.fp8_probe_steps, 0),
        ("train.fp8_probe_groups", train.fp8_probe_groups, 1),
        ("reference.check_groups", config.reference.check_groups, 0),
        ("reference.swap_steps", config.reference.swap_steps, 1),
        ("model.num_layers_at_start_in_bf16", config.model.num_layers_at_start_in_bf16, 0),
        ("model.num_layers_at_end_in_bf16", config.model.num_layers_at_end_in_bf16, 0),
        ("seed", config.seed, 0),
    ]
    found = [
        f"{name} = {count}: must be at least {least}"
        for name, count, least in counts
        if count is not None and count < least
    ]
    if config.seed > LARGEST_SEED:
        found.append(f"seed = {config.seed}: must be at most {LARGEST_SEED}")
    return found


def _ranges(config: Config) -> list[str]:
    """Numbers with a range."""
    optimizer = config.optimizer
    checks = [
        ("learning_rate", optimizer.learning_rate > 0, "over 0; 5e-7 is usual for DPO"),
        ("warmup_ratio", 0 <= optimizer.warmup_ratio <= 1, "in [0, 1]; it is a fraction of all steps"),
        ("min_lr_ratio", 0 <= optimizer.min_lr_ratio <= 1, "in [0, 1]; it is a fraction of learning_rate"),
        ("adam_beta1", 0 <= optimizer.adam_beta1 < 1, "in [0, 1)"),
        ("adam_beta2", 0 <= optimizer.adam_beta2 < 1, "in [0, 1)"),
        ("adam_epsilon", optimizer.adam_epsilon > 0, "over 0; 1e-8 is usual"),
        ("weight_decay", optimizer.weight_decay >= 0, "at least 0"),
        ("max_grad_norm", optimizer.max_grad_norm >= 0, "at least 0; 0 switches clipping off"),
    ]
    found = [
        f"optimizer.{name} = {getattr(optimizer, name)}: must be {allowed}"
        for name, good, allowed in checks
        if not good
    ]
    if not 0 <= config.train.hang_timeout < float("inf"):
        found.append(f"train.hang_timeout = {config.train.hang_timeout}: must be at least 0; 0 switches it off")
    limit = config.train.fp8_drift_limit
    if limit is not None and not 0 < limit < float("inf"):
        found.append(f"train.fp8_drift_limit = {limit}: must be over 0, in nats per token; leave it out for no limit")
    if not config.export.max_shard_size_gb > 0:
        found.append(f"export.max_shard_size_gb = {config.export.max_shard_size_gb}: must be over 0; 5 is usual")
    return found


def _secrets(config: Config) -> list[str]:
    """The run file is copied into the run folder and to trackers, so a key has no place in it; nor in this line."""
    found = []
    for name, value in sorted(_texts(asdict(config), "")):
        if SECRETS.search(value):
            found.append(
                f"{name}: looks like a key or a password (not shown here); take it out: keys come from the environment "
                "(HF_TOKEN, WANDB_API_KEY) or from `hf auth login` and `wandb login`"
            )
    return found


def _texts(value: object, name: str) -> Iterator[tuple[str, str]]:
    """Every text of the settings with its dotted name."""
    if isinstance(value, str):
        yield name, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _texts(inner, f"{name}.{key}" if name else key)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _texts(inner, name)


def _paths(config: Config) -> list[str]:
    """Paths that are empty, and outputs that would fall on an input."""
    given = {
        "run_dir": config.run_dir,
        "model.path": config.model.path,
        "reference.path": config.reference.path,
        "data.tokenizer": config.data.tokenizer,
        "data.chat_template": config.data.chat_template,
        "data.cache_dir": config.data.cache_dir,
        "export.path": config.export.path,
    }
    found = [f'{name} = "": must be a path' for name, path in given.items() if path is not None and not path.strip()]
    if not config.data.train:
        found.append("data.train = []: must name at least one file, folder or Hub id")
    for name, entries in (("data.train", config.data.train), ("data.eval", config.data.eval)):
        if any(not entry.strip() for entry in entries):
            found.append(f'{name} has an empty entry: must be files, folders or Hub ids; delete ""')
    inputs = {name: given[name] for name in ("model.path", "reference.path") if given[name]}
    for output in ("run_dir", "export.path"):
        for name, path in inputs.items():
            if given[output] and _same(given[output], path):
                found.append(f"{output} = {given[output]}: is also {name} and would overwrite it; give another folder")
    return found


def _same(one: str | None, other: str | None) -> bool:
    return Path(one or "").expanduser().resolve() == Path(other or "").expanduser().resolve()


def _combinations(config: Config) -> list[str]:
    """Settings that need or exclude each other."""
    grid, train, batch = config.parallel, config.train, config.batch
    tensor, virtual = grid.tensor_model_parallel_size, grid.virtual_pipeline_model_parallel_size
    found = []
    if virtual is not None and virtual < 2:
        found.append(
            f"parallel.virtual_pipeline_model_parallel_size = {virtual}: must be at least 2; leave it out "
            "for one model chunk per pipeline rank"
        )
    elif virtual is not None and grid.pipeline_model_parallel_size < 2:
        found.append(
            f"parallel.virtual_pipeline_model_parallel_size = {virtual}: needs "
            "parallel.pipeline_model_parallel_size of at least 2; raise that or leave this out"
        )
    if grid.sequence_parallel and tensor == 1:
        found.append(
            "parallel.sequence_parallel = true: needs parallel.tensor_model_parallel_size of at least 2; "
            "raise that or leave this out"
        )
    if grid.overlap_param_gather and not (grid.use_distributed_optimizer and grid.overlap_grad_reduce):
        found.append(
            "parallel.overlap_param_gather = true: needs parallel.use_distributed_optimizer = true and "
            "parallel.overlap_grad_reduce = true; set both or leave this out"
        )
    if grid.sequence_parallel and tensor > 1 and (batch.micro_batch_tokens or 0) % tensor:
        found.append(
            f"batch.micro_batch_tokens = {batch.micro_batch_tokens}: must be a multiple of "
            f"parallel.tensor_model_parallel_size ({tensor}) under parallel.sequence_parallel"
        )
    if not grid.overlap_p2p_comm and (virtual is None or grid.pipeline_model_parallel_size == 2):
        why = "is for virtual stages" if virtual is None else "2 stages with virtual ones mix up what is not overlapped"
        found.append(f"parallel.overlap_p2p_comm = false: {why}; leave it out")
    if grid.tp_comm_overlap and not grid.sequence_parallel:
        found.append(
            "parallel.tp_comm_overlap = true: needs parallel.sequence_parallel = true, whose gathers and reductions it "
            "hides; set that or leave this out"
        )
    if grid.tp_comm_overlap and config.model.fp8_format and config.model.fp8_recipe in ("blockwise", "mxfp8"):
        found.append(
            f"parallel.tp_comm_overlap = true: its buffers hold one scale per tensor, not those of "
            f"{config.model.fp8_recipe}; use model.fp8_recipe tensorwise or delayed, or leave it out"
        )
    if train.eval_steps > 0 and not config.data.eval:
        found.append(f"train.eval_steps = {train.eval_steps}: needs data.eval; give held-out data or set it to 0")
    if 0 < (train.max_steps or 0) < (config.optimizer.warmup_steps or 0):
        found.append(
            f"optimizer.warmup_steps = {config.optimizer.warmup_steps}: must be at most train.max_steps "
            f"({train.max_steps}), else the learning rate never gets to its peak"
        )
    if config.log.wandb_mode == "offline" and config.log.wandb_project is None:
        found.append("log.wandb_mode = offline: does nothing without log.wandb_project; name a project or leave it out")
    return found


def _fp8(config: Config) -> list[str]:
    """What FP8's settings need of each other and of the rest."""
    model, grid = config.model, config.parallel
    plain = ModelConfig("")
    names = ["fp8_recipe", "fp8_param_gather", "first_last_layers_bf16", "fp8_emulation"]
    names += ["num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16"]
    given = {name: _written(getattr(model, name)) for name in names if getattr(model, name) != getattr(plain, name)}
    if model.fp8_format is None:
        watched = _drift_watch(config.train)
        return [
            f"{name} = {value}: does nothing without model.fp8_format; set that to hybrid or e4m3, or leave this out"
            for name, value in [*((f"model.{name}", value) for name, value in given.items()), *watched.items()]
        ]
    found = []
    if config.train.fp8_drift_limit is not None and model.fp8_recipe == "delayed" and not config.train.fp8_probe_steps:
        found.append(
            f"train.fp8_drift_limit = {config.train.fp8_drift_limit}: with model.fp8_recipe = delayed, whose drift can "
            "only be measured once it has scales, needs train.fp8_probe_steps over 0"
        )
    if model.first_last_layers_bf16 and model.fp8_recipe == "delayed":
        found.append(
            "model.first_last_layers_bf16 = true: not with model.fp8_recipe = delayed, whose scales are kept for all "
            "layers at once; use tensorwise, blockwise or mxfp8, or leave this out"
        )
    if not model.first_last_layers_bf16:
        found += [
            f"model.{name} = {value}: does nothing without model.first_last_layers_bf16; set that to true, or leave "
            "this out"
            for name, value in given.items()
            if name.startswith("num_layers")
        ]
    if model.dtype != "bfloat16" and model.real_fp8:
        found.append(f"model.dtype = {model.dtype}: model.fp8_format needs bfloat16 beside it (except emulated)")
    if model.fp8_param_gather and model.fp8_emulation:
        found.append(
            "model.fp8_param_gather = true: not with model.fp8_emulation, which keeps weights in model.dtype; leave "
            "one out"
        )
    elif model.fp8_param_gather and model.fp8_recipe == "delayed":
        found.append(
            "model.fp8_param_gather = true: not with model.fp8_recipe = delayed, which knows no scale yet when weights "
            "are loaded and would round them with scale 1, small ones to 0; use tensorwise, blockwise or mxfp8, or "
            "leave this out"
        )
    if model.fp8_param_gather and not grid.use_distributed_optimizer:
        found.append(
            "model.fp8_param_gather = true: needs parallel.use_distributed_optimizer = true, which keeps the float32 "
            "masters; set it, or leave this out"
        )
    if model.fp8_param_gather and model.fp8_recipe == "mxfp8" and grid.overlap_param_gather:
        found.append(
            "parallel.overlap_param_gather = true: not with model.fp8_param_gather and mxfp8, whose weights travel in "
            "the gradients' buffer, which a step clears first; leave one out"
        )
    rows = row_multiple(model, grid)
    if (config.batch.micro_batch_tokens or 0) % rows:
        found.append(
            f"batch.micro_batch_tokens = {config.batch.micro_batch_tokens}: must be a multiple of {rows} for "
            f"model.fp8_recipe = {model.fp8_recipe} on this grid"
        )
    return found


def _graphs(config: Config) -> list[str]:
    """What replays no Python, or keeps its memory, cannot go with."""
    model = config.model
    if not model.cuda_graphs:
        return []
    given = f"model.cuda_graphs = [{', '.join(model.cuda_graphs)}]"
    found = []
    if len(set(model.cuda_graphs)) < len(model.cuda_graphs):
        found.append(f"{given}: must name a part once")
    if model.recompute == "full":
        found.append(
            f"{given}: not with model.recompute = full, whose layers share the memory that graphs keep one by one; use "
            "selective or none, or leave one out"
        )
    if model.fp8_emulation:
        found.append(f"{given}: not with model.fp8_emulation, which is for numbers and not for speed; leave one out")
    if model.real_fp8 and model.fp8_recipe == "delayed":
        found.append(
            f"{given}: not with model.fp8_recipe = delayed, whose scales change with a step's first micro-batch: "
            "graphs would cast the weights to other numbers for the next ones; use tensorwise, blockwise or mxfp8, or "
            "leave this out"
        )
    if model.fp8_param_gather:
        found.append(
            f"{given}: not with model.fp8_param_gather, where Transformer Engine makes the transposed weights by code "
            "that no replay runs; leave one out"
        )
    if config.parallel.tp_comm_overlap:
        found.append(f"{given}: not with parallel.tp_comm_overlap, whose buffers layers share; leave one out")
    return found


def _drift_watch(train: TrainConfig) -> dict[str, object]:
    """What is given of the settings of FP8's probe."""
    names = ("fp8_probe_steps", "fp8_probe_groups", "fp8_drift_limit")
    given = {f"train.{name}": getattr(train, name) for name in names}
    return {name: value for name, value in given.items() if value != getattr(TrainConfig, name.partition(".")[2])}


def _written(value: object) -> object:
    return str(value).lower() if isinstance(value, bool) else value


FP8_ROWS = {"delayed": 16, "tensorwise": 16, "blockwise": 128, "mxfp8": 32}
"""Rows of a matrix that FP8 products come in: cuBLAS wants 16 along every axis that is summed over, MXFP8's scales
stand for 32 rows, and Transformer Engine gathers in FP8 what is whole blocks of 128 (Float8BlockQuantizer)."""


def row_multiple(model: ModelConfig, parallel: ParallelConfig) -> int:
    """What the rows of a stream must be a multiple of: every tensor-parallel rank holds as many under sequence
    parallelism, and FP8 wants whole blocks of what it holds."""
    ranks = parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
    return ranks * (FP8_ROWS[model.fp8_recipe] if model.real_fp8 else 1)


def check_grid(
    config: Config,
    num_attention_heads: int,
    num_query_groups: int,
    num_layers: int,
    ffn_hidden_size: int,
    world_size: int | None,
    kv_channels: int | None = None,
) -> list[str]:
    """What Megatron-Core needs of a model's sizes on this grid; of the world too, where its size is known."""
    tensor = config.parallel.tensor_model_parallel_size
    pipeline = config.parallel.pipeline_model_parallel_size
    virtual = config.parallel.virtual_pipeline_model_parallel_size or 1
    given = f"parallel.tensor_model_parallel_size = {tensor}"
    fitting = [
        size
        for size in range(1, num_attention_heads + 1)
        if not _tensor_misfits(size, num_attention_heads, num_query_groups, ffn_hidden_size, kv_channels)
    ]
    misfits = _tensor_misfits(tensor, num_attention_heads, num_query_groups, ffn_hidden_size, kv_channels)
    found = []
    if misfits:
        found.append(
            f"{given}: must divide {' and '.join(misfits)}; sizes that fit this model: {', '.join(map(str, fitting))}"
        )
    if pipeline * virtual > num_layers:
        chunks = f" x virtual_pipeline_model_parallel_size = {virtual}" if virtual > 1 else ""
        found.append(
            f"parallel.pipeline_model_parallel_size = {pipeline}{chunks}: {pipeline * virtual} stages for "
            f"{num_layers} layers; every stage needs at least one: ask for at most {num_layers} stages"
        )
    return found + (check_world(config.parallel, world_size) if world_size is not None else [])


def _tensor_misfits(size: int, heads: int, groups: int, ffn: int, channels: int | None) -> list[str]:
    """What of the model Megatron-Core cannot split over `size` tensor-parallel ranks."""
    found = []
    if heads % size:
        found.append(f"its {heads} attention heads")
    if groups % size and size % groups:
        found.append(f"its {groups} key-value heads (or be a multiple of them)")
    if ffn % size:
        found.append(f"its MLP size of {ffn}")
    # With fewer key-value heads than ranks the joint q, k, v projection is still cut into equal parts.
    if not found and channels is not None and (heads + 2 * groups) * channels % size:
        found.append(f"the {(heads + 2 * groups) * channels} rows of its joint q, k, v projection")
    return found


def check_world(parallel: ParallelConfig, world_size: int) -> list[str]:
    """Whether so many processes can carry the grid."""
    tensor, pipeline = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    data = parallel.data_parallel_size
    model = tensor * pipeline
    grid = f"tensor {tensor} x pipeline {pipeline}"
    if data is not None and model * data != world_size:
        return [
            f"the grid is {grid} x data {data} = {model * data} processes and {world_size} were started; "
            f"start {model * data}, or leave parallel.data_parallel_size out"
        ]
    if world_size % model:
        return [
            f"the grid is {grid} = {model} processes for one replica and {world_size} were started; start a "
            f"multiple of {model}, or change parallel.tensor_model_parallel_size or "
            "parallel.pipeline_model_parallel_size"
        ]
    experts = parallel.expert_model_parallel_size
    if experts > 1 and world_size // pipeline % experts:
        return [
            f"parallel.expert_model_parallel_size = {experts}: must divide tensor x data ranks, here {tensor} x "
            f"{world_size // model} = {world_size // pipeline}"
        ]
    return []
