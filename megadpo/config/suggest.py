"""What was probably meant: the nearest valid name of a key or a choice."""

from __future__ import annotations

from difflib import get_close_matches

from megadpo.config.schema import leaf_paths

# What the settings are called elsewhere: TRL, Megatron-LM, everyday speech.
ALSO_CALLED = {
    "output_dir": "run_dir",
    "model_name_or_path": "model.path",
    "bf16": "model.dtype",
    "torch_dtype": "model.dtype",
    "gradient_checkpointing": "model.recompute",
    "fp8": "model.fp8_format",
    "fp8_param": "model.fp8_param_gather",
    **dict.fromkeys(("cuda_graph_impl", "cuda_graph_scope", "enable_cuda_graph"), "model.cuda_graphs"),
    "ref_model": "reference.path",
    "dataset_name": "data.train",
    "train_file": "data.train",
    "max_seq_length": "data.max_length",
    "seq_length": "data.max_length",
    "tp": "parallel.tensor_model_parallel_size",
    "pp": "parallel.pipeline_model_parallel_size",
    "dp": "parallel.data_parallel_size",
    "batch_size": "batch.global_batch_size",
    "per_device_train_batch_size": "batch.micro_batch_size",
    "gradient_accumulation_steps": "batch.global_batch_size",
    "lr": "optimizer.learning_rate",
    "clip_grad": "optimizer.max_grad_norm",
    "epochs": "train.num_train_epochs",
    "train_iters": "train.max_steps",
    "save_interval": "train.save_steps",
    "eval_interval": "train.eval_steps",
    "loss": "objective.loss_type",
}

NOT_HERE = {
    "context_parallel_size": "context parallelism cannot be combined with prompts that stand once: Transformer Engine "
    "refuses bottom-right causal attention with it; use tensor and sequence parallelism for long streams",
    "hidden_dropout": "dropout is off: one prompt row serves all responses",
    "attention_dropout": "dropout is off: one prompt row serves all responses",
}
"""Settings of other programs that are left out, and why."""


def unknown_key(key: str, names: list[str], section: str) -> str:
    """The line for a key that a section (empty: the top level) does not have.

    It names what was probably meant: a setting of that very name in another section, the setting that other
    programs call so, a near name here, a near name elsewhere, in this order; or else all that there is.
    """
    prefix = f"{section}." if section else ""
    if "." in key:
        home, _, last = key.rpartition(".")
        return f"{prefix}{key}: dotted keys are for the command line; in the file write {last} under {home}:"
    homes: dict[str, list[str]] = {}
    for leaf in leaf_paths():
        homes.setdefault(leaf.rpartition(".")[2], []).append(leaf)
    if key in NOT_HERE:
        return f"{prefix}{key}: not a setting; {NOT_HERE[key]}"
    meant = homes.get(key, [])
    meant = meant or [ALSO_CALLED[name] for name in [key] if name in ALSO_CALLED]
    meant = meant or [prefix + close for close in get_close_matches(key, names, 1)]
    meant = meant or [homes[close][0] for close in get_close_matches(key, list(homes), 1, cutoff=0.75)]
    advice = f"did you mean {' or '.join(meant)}?" if meant else f"{section or 'a run file'} has {', '.join(names)}"
    return f"{prefix}{key}: unknown key; {advice}"


def one_of(choices: tuple[str, ...], given: object) -> str:
    """The choices in words, with the nearest one."""
    close = get_close_matches(str(given), choices, 1, cutoff=0.5)
    return f"one of {', '.join(choices)}" + (f" (did you mean {close[0]}?)" if close else "")
