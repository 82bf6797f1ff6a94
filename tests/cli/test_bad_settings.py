"""Every setting, given wrongly in every way that its type allows: one line, exit code 2. `make soak` counts them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest

from megadpo.cli import main
from megadpo.config import Config
from megadpo.config.schema import field_types, optional
from megadpo.objectives import DPO, Objective

BASE = "run_dir: {folder}/run\nmodel: {{path: {folder}/model}}\ndata: {{train: {folder}/pairs.jsonl}}\n"

OUT_OF_RANGE = {
    "parallel.tensor_model_parallel_size": ["0", "-1"],
    "parallel.pipeline_model_parallel_size": ["0"],
    "parallel.data_parallel_size": ["0"],
    "parallel.virtual_pipeline_model_parallel_size": ["1", "2"],
    "parallel.sequence_parallel": ["true"],
    "parallel.overlap_param_gather": ["true"],
    "data.max_length": ["1", "-5"],
    "data.num_proc": ["0"],
    "data.train": ["[]", "['']"],
    "data.eval": ["['']"],
    "batch.global_batch_size": ["0"],
    "batch.micro_batch_size": ["0"],
    "batch.micro_batch_tokens": ["0"],
    "optimizer.learning_rate": ["0", "-1e-6", ".nan"],
    "optimizer.warmup_ratio": ["1.5", "-0.1"],
    "optimizer.warmup_steps": ["-1"],
    "optimizer.min_lr_ratio": ["2", "-1"],
    "optimizer.adam_beta1": ["1", "-0.1"],
    "optimizer.adam_beta2": ["1", "-0.1"],
    "optimizer.adam_epsilon": ["0"],
    "optimizer.weight_decay": ["-1"],
    "optimizer.max_grad_norm": ["-1"],
    "train.num_train_epochs": ["0"],
    "train.max_steps": ["0"],
    "train.eval_steps": ["-1", "5"],
    "train.save_steps": ["-1"],
    "train.save_total_limit": ["0"],
    "train.max_skipped": ["-1"],
    "train.hang_timeout": ["-1", ".inf", ".nan"],
    "reference.check_groups": ["-1"],
    "export.max_shard_size_gb": ["0"],
    "log.wandb_mode": ["offline"],
    "log.run_name": ["hf_" + "a" * 34, "https://me:secret@host/x", "sk-" + "b" * 40],
    "seed": ["-1", "4294967296"],
    "run_dir": ["''"],
    "model.path": ["''"],
    "objective.beta": ["0", "-1"],
    "objective.label_smoothing": ["0.5", "-0.1"],
}


def leaves() -> list[tuple[str, Any]]:
    """Every setting with its type; of the objective those of the default one."""
    found = []
    for name, kind in field_types(Config).items():
        if kind is Objective:
            found += [(f"objective.{key}", kind) for key, kind in field_types(DPO).items()]
        elif hasattr(kind, "__dataclass_fields__"):
            found += [(f"{name}.{key}", kind) for key, kind in field_types(kind).items()]
        else:
            found.append((name, kind))
    return found


def wrong(kind: Any) -> list[str]:
    """Values of other types than the setting's."""
    kind, nullable = optional(kind)
    values = ["{a: 1}"]
    if kind is bool:
        values += ["maybe", "3"]
    elif kind is int:
        values += ["many", "1.5", "true"]
    elif kind is float:
        values += ["much", "true"]
    elif get_origin(kind) is Literal:
        values += ["nonsense", get_args(kind)[0] + "x" if isinstance(get_args(kind)[0], str) else "x"]
    elif kind is str:
        values += ["[a]"]
    else:
        values += ["[[a]]"]
    return values if nullable else [*values, "null"]


def cases() -> list[list[str]]:
    found: list[list[str]] = []
    for name, kind in leaves():
        found += [[f"{name}={value}"] for value in wrong(kind)]
        found += [[f"{name}x=1"]]  # misspelt
    found += [[f"{name}={value}"] for name, values in OUT_OF_RANGE.items() for value in values]
    found += [["train.max_steps=5", "optimizer.warmup_steps=6"], ["nonsense"], ["=1"], ["data.train"], ["a.b.c=1"]]
    return found


def test_every_wrong_setting_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], record_property: Callable[[str, object], None]
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(BASE.format(folder=tmp_path))
    refused = 0
    for overrides in cases():
        code = main(["prepare", str(path), *overrides])
        output = capsys.readouterr()
        assert code == 2, f"{overrides} was taken"
        assert output.err.startswith("megadpo: error: "), (overrides, output.err)
        assert output.err.count("\n") == 1, (overrides, output.err)
        name = overrides[0].partition("=")[0]
        assert name.rpartition(".")[2] in output.err, (overrides, output.err)
        assert "secret" not in output.err
        assert "aaaa" not in output.err
        refused += 1
    assert refused >= 200
    assert not (tmp_path / "run").exists()
    record_property("cases", refused)
