# ruff: noqa: E501 (one mistake a line)
"""The run file: every mistake gets one line that names the place, what is allowed and what was meant."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from megadpo.config import Config, DataConfig, LogConfig, ModelConfig, ParallelConfig
from megadpo.config.check import check_grid, check_world, problems
from megadpo.config.decode import load_config, to_yaml
from megadpo.config.schema import json_schema
from megadpo.errors import ConfigError
from megadpo.objectives import DPO, OBJECTIVES, SFT

GOOD = """\
run_dir: runs/one
model:
  path: model
data:
  train: pairs.jsonl
"""


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Load a run file of GOOD and more text, with overrides; the file is called run.yaml in messages."""
    monkeypatch.chdir(tmp_path)

    def load(more: str = "", *overrides: str, base: str = GOOD) -> Config:
        Path("run.yaml").write_text(base + more)
        return load_config("run.yaml", list(overrides))

    return load


def complaint(load, more: str, *overrides: str, base: str = GOOD) -> str:
    with pytest.raises(ConfigError) as caught:
        load(more, *overrides, base=base)
    return str(caught.value)


def test_the_shortest_run_file(load):
    assert load() == Config("runs/one", ModelConfig("model"), DataConfig(("pairs.jsonl",)))


def test_every_kind_of_value(load):
    config = load(
        "seed: 7\n"
        "objective: {loss_type: sigmoid, beta: 1e-2, label_smoothing: 0}\n"
        "optimizer: {learning_rate: 1e-4, weight_decay: 1, warmup_steps: null}\n"
        "parallel: {sequence_parallel: yes, tensor_model_parallel_size: 2}\n"
        "reference:\n"
        "train: {max_steps: 10, shuffle: false}\n"
    )
    assert config.seed == 7
    assert config.objective == DPO(beta=0.01, label_smoothing=0.0)
    assert (config.optimizer.learning_rate, config.optimizer.weight_decay) == (1e-4, 1.0)
    assert isinstance(config.optimizer.weight_decay, float)
    assert config.optimizer.warmup_steps is None
    assert config.parallel == ParallelConfig(2, sequence_parallel=True)
    assert (config.train.max_steps, config.train.shuffle) == (10, False)


def test_an_objective_by_its_name(load):
    assert load("objective: {loss_type: sft}\n").objective == SFT()
    assert load("objective:\n").objective == DPO()


# more of the run file; what the one line must say
MISTAKES = [
    # unknown keys, with what was meant
    ("learning_rate: 1e-4\n", "run.yaml:6: learning_rate: unknown key; did you mean optimizer.learning_rate?"),
    ("optimizer: {learning_rat: 1}\n", "run.yaml:6: optimizer.learning_rat: unknown key; did you mean optimizer.learning_rate?"),
    ("optimizer:\n  lr: 1e-4\n", "run.yaml:7: optimizer.lr: unknown key; did you mean optimizer.learning_rate?"),
    ("optimiser: {learning_rate: 1}\n", "optimiser: unknown key; did you mean optimizer?"),
    ("train: {learning_rate: 1}\n", "train.learning_rate: unknown key; did you mean optimizer.learning_rate?"),
    ("output_dir: x\n", "output_dir: unknown key; did you mean run_dir?"),
    ("parallel: {tp: 2}\n", "parallel.tp: unknown key; did you mean parallel.tensor_model_parallel_size?"),
    ("parallel: {tensor_parallel_size: 2}\n", "did you mean parallel.tensor_model_parallel_size?"),
    ("batch: {per_device_train_batch_size: 2}\n", "did you mean batch.micro_batch_size?"),
    ("train: {save_step: 5}\n", "did you mean train.save_steps?"),
    ("train: {zzz: 5}\n", "train.zzz: unknown key; train has num_train_epochs, max_steps, eval_steps"),
    ("path: x\n", "did you mean model.path or reference.path or export.path?"),
    ("model.dtype: float32\n", "model.dtype: dotted keys are for the command line; in the file write dtype under model:"),
    ("1: 2\n", "1: unknown key"),
    ("objective: {bta: 0.1}\n", "objective.bta: dpo has no such setting; did you mean objective.beta?"),
    ("objective: {loss_type: sft, beta: 0.1}\n", "objective.beta: sft has no such setting; its settings: none"),
    ("objective: {gamma: 1}\n", "objective.gamma: dpo has no such setting; its settings: beta, label_smoothing"),
    # wrong types
    ("seed: x\n", 'seed = "x": must be a whole number'),
    ("seed: true\n", "seed = true: must be a whole number"),
    ("seed: 1.5\n", "seed = 1.5: must be a whole number"),
    ("seed:\n", "seed = null: must be a whole number"),
    ("batch: {global_batch_size: 64.0}\n", "batch.global_batch_size = 64.0: must be a whole number (write 64)"),
    ('batch: {global_batch_size: "64"}\n', 'batch.global_batch_size = "64": must be a whole number (write 64)'),
    ("batch: {micro_batch_size: [1]}\n", "batch.micro_batch_size = [1]: must be a whole number or null"),
    ("optimizer: {learning_rate: fast}\n", 'optimizer.learning_rate = "fast": must be a finite number'),
    ("optimizer: {learning_rate: '5,0e-7'}\n", "must be a finite number"),
    ("optimizer: {learning_rate: true}\n", "optimizer.learning_rate = true: must be a finite number"),
    ("optimizer: {learning_rate: .nan}\n", "must be a finite number"),
    ("optimizer: {weight_decay: .inf}\n", "must be a finite number"),
    ("objective: {beta: .nan}\n", "objective.beta = NaN: must be a finite number"),
    ("objective: {loss_type: cdpo, label_smoothing: .nan}\n", "must be a finite number"),
    (f"optimizer: {{weight_decay: 1{'0' * 400}}}\n", "must be a finite number"),
    ("train: {shuffle: 1}\n", "train.shuffle = 1: must be true or false"),
    ('train: {shuffle: "false"}\n', 'train.shuffle = "false": must be true or false'),
    ("log: {run_name: 2024}\n", 'log.run_name = 2024: must be text (write "2024") or null'),
    ("log: {run_name: 2024-01-31}\n", 'log.run_name = 2024-01-31: must be text (write "2024-01-31") or null'),
    ("export: {path: no}\n", 'export.path = false: must be text (write "false") or null'),
    ("train: 3\n", "train = 3: must be a section with keys of: num_train_epochs, max_steps"),
    ("objective: dpo\n", 'objective = "dpo": must be a section with loss_type and its settings'),
    ("parallel: [1, 2]\n", "parallel = [1, 2]: must be a section"),
    # choices
    ("objective: {loss_type: dpoo}\n", 'objective.loss_type = "dpoo": is no objective; did you mean dpo? There are dpo, robust'),
    ("objective: {loss_type: [dpo, sft]}\n", 'objective.loss_type = ["dpo", "sft"]: must be one name; for several objectives write loss_type: mix'),
    ("reference: {mode: residant}\n", 'reference.mode = "residant": must be one of precomputed, resident, swapped (did you mean resident?)'),
    ("optimizer: {lr_scheduler_type: step}\n", "must be one of cosine, linear, constant"),
    ("export: {dtype: bf16}\n", 'must be one of bfloat16, float16, float32 (did you mean bfloat16?) or null'),
    # sizes and ranges
    ("batch: {global_batch_size: 0}\n", "batch.global_batch_size = 0: must be at least 1"),
    ("parallel: {tensor_model_parallel_size: 0}\n", "parallel.tensor_model_parallel_size = 0: must be at least 1"),
    ("train: {max_steps: -1}\n", "train.max_steps = -1: must be at least 1"),
    ("train: {save_steps: -5}\n", "train.save_steps = -5: must be at least 0"),
    ("seed: -1\n", "seed = -1: must be at least 0"),
    ("seed: 4294967296\n", "seed = 4294967296: must be at most 4294967295"),
    ("optimizer: {learning_rate: 0}\n", "optimizer.learning_rate = 0.0: must be over 0"),
    ("optimizer: {warmup_ratio: 10}\n", "optimizer.warmup_ratio = 10.0: must be in [0, 1]"),
    ("optimizer: {adam_beta2: 1}\n", "optimizer.adam_beta2 = 1.0: must be in [0, 1)"),
    ("optimizer: {max_grad_norm: -1}\n", "optimizer.max_grad_norm = -1.0: must be at least 0"),
    ("export: {max_shard_size_gb: 0}\n", "export.max_shard_size_gb = 0.0: must be over 0"),
    ("objective: {beta: 0}\n", "run.yaml:6: objective.beta = 0.0: must be over 0; 0.1 is usual"),
    ("objective: {label_smoothing: 0.5}\n", "objective.label_smoothing = 0.5: must be in [0, 0.5)"),
    # combinations
    ("parallel: {sequence_parallel: true}\n", "parallel.sequence_parallel = true: needs parallel.tensor_model_parallel_size"),
    ("parallel: {virtual_pipeline_model_parallel_size: 2}\n", "needs parallel.pipeline_model_parallel_size of at least 2"),
    ("parallel: {virtual_pipeline_model_parallel_size: 1, pipeline_model_parallel_size: 2}\n", "must be at least 2; leave it out"),
    ("parallel: {overlap_param_gather: true}\n", "needs parallel.use_distributed_optimizer = true and parallel.overlap_grad_reduce"),
    ("train: {eval_steps: 5}\n", "train.eval_steps = 5: needs data.eval"),
    ("train: {max_steps: 5}\noptimizer: {warmup_steps: 6}\n", "optimizer.warmup_steps = 6: must be at most train.max_steps (5)"),
    ("log: {wandb_mode: offline}\n", "log.wandb_mode = offline: does nothing without log.wandb_project"),
    ("parallel: {tensor_model_parallel_size: 2, sequence_parallel: true}\nbatch: {micro_batch_tokens: 33}\n", "must be a multiple of"),
    ("reference: {mode: swapped, swap_steps: 0}\n", "reference.swap_steps = 0: must be at least 1"),
    ("reference: {swap_steps: 4}\n", "reference.swap_steps = 4: is for reference.mode = swapped and this is precomputed"),
    ("reference: {fp8_weights: true}\n", "reference.fp8_weights = true: is for reference.mode = resident and this is precomputed"),
    ("reference: {mode: swapped}\nobjective: {loss_type: tdpo2}\n", "reference.mode = swapped: objective.loss_type tdpo2 compares whole distributions"),
    ("parallel: {overlap_p2p_comm: false}\n", "parallel.overlap_p2p_comm = false: is for virtual stages; leave it out"),
    ("parallel: {overlap_p2p_comm: false, pipeline_model_parallel_size: 2, virtual_pipeline_model_parallel_size: 2}\n", "2 stages with virtual ones mix up"),
    ("parallel: {tp_comm_overlap: true, tensor_model_parallel_size: 2}\n", "parallel.tp_comm_overlap = true: needs parallel.sequence_parallel = true"),
    # paths
    ("export: {path: model}\n", "export.path = model: is also model.path and would overwrite it"),
    ('reference: {path: ""}\n', 'reference.path = "": must be a path'),
    # YAML itself
    ("seed: 1\nseed: 2\n", "run.yaml:7: seed stands twice, first in line 6; mend the YAML there"),
    ("batch:\n  micro_batch_size: 1\n  micro_batch_size: 2\n", "run.yaml:8: batch.micro_batch_size stands twice"),
    ("batch: {a: b\n", "run.yaml:7: expected ',' or '}', but got '<stream end>'; mend the YAML there"),
    ("seed: [1\n", "mend the YAML there"),
    ("\tseed: 1\n", "run.yaml:6: found character"),
    ("seed: !!python/object/apply:os.getcwd []\n", "run.yaml:6: could not determine a constructor"),
    ("log: {run_name: 2024-13-45}\n", "run.yaml: month must be in 1..12; mend the YAML there"),
    ("--- \nseed: 1\n", "run.yaml:6: but found another document"),
]  # fmt: skip


@pytest.mark.parametrize(("more", "expected"), MISTAKES)
def test_a_mistake_gets_one_line(load, more, expected):
    text = complaint(load, more)
    assert expected in text
    assert text.startswith("run.yaml")
    assert "\n" not in text


MISTAKES_OF_FP8 = [
    ("fp8_recipe: mxfp8", "", "model.fp8_recipe = mxfp8: does nothing without model.fp8_format"),
    ("fp8_param_gather: true", "", "model.fp8_param_gather = true: does nothing without model.fp8_format"),
    ("fp8_emulation: true", "", "model.fp8_emulation = true: does nothing without model.fp8_format"),
    ("fp8_format: e4m3, num_layers_at_end_in_bf16: 2", "", "num_layers_at_end_in_bf16 = 2: does nothing without model.first_last_layers_bf16"),
    ("fp8_format: e4m3, fp8_recipe: delayed, first_last_layers_bf16: true", "", "model.first_last_layers_bf16 = true: not with model.fp8_recipe = delayed"),
    ("fp8_format: e4m3, first_last_layers_bf16: true, num_layers_at_start_in_bf16: -1", "", "num_layers_at_start_in_bf16 = -1: must be at least 0"),
    ("fp8_format: hybrid, dtype: float32", "", "model.dtype = float32: model.fp8_format needs bfloat16"),
    ("fp8_format: hybrid, fp8_emulation: true, fp8_param_gather: true", "", "model.fp8_param_gather = true: not with model.fp8_emulation"),
    ("fp8_format: hybrid, fp8_recipe: delayed, fp8_param_gather: true", "", "model.fp8_param_gather = true: not with model.fp8_recipe = delayed"),
    ("fp8_format: hybrid, fp8_emulation: true", "reference: {mode: resident, fp8_weights: true}\n", "reference.fp8_weights = true: not with model.fp8_emulation"),
    ("fp8_format: hybrid, fp8_param_gather: true", "parallel: {use_distributed_optimizer: false}\n", "needs parallel.use_distributed_optimizer = true"),
    ("fp8_format: hybrid, fp8_recipe: mxfp8, fp8_param_gather: true", "parallel: {overlap_grad_reduce: true, overlap_param_gather: true}\n", "parallel.overlap_param_gather = true: not with model.fp8_param_gather and mxfp8"),
    ("fp8_format: hybrid, fp8_recipe: blockwise", "batch: {micro_batch_tokens: 160}\n", "must be a multiple of 128 for model.fp8_recipe = blockwise"),
    ("fp8_format: hybrid", "parallel: {tensor_model_parallel_size: 4, sequence_parallel: true}\nbatch: {micro_batch_tokens: 96}\n", "must be a multiple of 64 for model.fp8_recipe = tensorwise"),
    ("fp8_form: hybrid", "", "model.fp8_form: unknown key; did you mean model.fp8_format?"),
    ("fp8: hybrid", "", "model.fp8: unknown key; did you mean model.fp8_format?"),
]  # fmt: skip


MISTAKES_OF_GRAPHS = [
    ("cuda_graphs: true", "", "model.cuda_graphs = true: must be a list of mlp, moe_router"),
    ("cuda_graphs: mlp", "", 'model.cuda_graphs = "mlp": must be a list of mlp, moe_router'),
    ("cuda_graphs: [mpl]", "", 'model.cuda_graphs[0] = "mpl": must be one of mlp, moe_router (did you mean mlp?)'),
    ("cuda_graphs: [mlp, mlp]", "", "model.cuda_graphs = [mlp, mlp]: must name a part once"),
    ("cuda_graphs: [mlp], recompute: full", "", "model.cuda_graphs = [mlp]: not with model.recompute = full"),
    ("cuda_graphs: [mlp], fp8_format: e4m3, fp8_emulation: true", "", "model.cuda_graphs = [mlp]: not with model.fp8_emulation"),
    ("cuda_graphs: [mlp], fp8_format: hybrid, fp8_recipe: delayed", "", "model.cuda_graphs = [mlp]: not with model.fp8_recipe = delayed"),
    ("cuda_graphs: [mlp], fp8_format: e4m3, fp8_param_gather: true", "", "model.cuda_graphs = [mlp]: not with model.fp8_param_gather"),
    ("cuda_graphs: [mlp]", "parallel: {tensor_model_parallel_size: 2, sequence_parallel: true, tp_comm_overlap: true}\n", "model.cuda_graphs = [mlp]: not with parallel.tp_comm_overlap"),
    ("cuda_graph_scope: [mlp]", "", "model.cuda_graph_scope: unknown key; did you mean model.cuda_graphs?"),
    ("cuda_graph_impl: local", "", "model.cuda_graph_impl: unknown key; did you mean model.cuda_graphs?"),
]  # fmt: skip


@pytest.mark.parametrize(("model", "more", "expected"), [*MISTAKES_OF_FP8, *MISTAKES_OF_GRAPHS])
def test_a_mistake_of_the_models_section_gets_one_line(load, model, more, expected):
    text = complaint(load, more, base=GOOD.replace("  path: model\n", f"  {{path: model, {model}}}\n"))
    assert expected in text
    assert "\n" not in text


MISTAKES_IN_WHOLE_FILES = [
    ("", "run.yaml has 3 problems", 4),
    ("- a\n- b\n", "run.yaml: is not a mapping", 1),
    ("text\n", "run.yaml: is not a mapping", 1),
    ("run_dir: r\nmodel: {path: m}\n", "run.yaml: data.train: missing; files (.jsonl, .json, .parquet", 1),
    ("run_dir: r\nmodel:\ndata: {train: d}\n", "run.yaml:2: model.path: missing; hugging Face folder", 1),
    ("run_dir: r\nmodel: m\ndata: {train: d}\n", 'run.yaml:2: model = "m": must be a section with keys of: path', 1),
    ("run_dir: r\nmodel: {path: m}\ndata: {train: 3}\n", "data.train = 3: must be text or a list of texts", 1),
    ("run_dir: r\nmodel: {path: m}\ndata: {train: [a, 3]}\n", 'data.train = ["a", 3]: must be text or a list of', 1),
    ("run_dir: r\nmodel: {path: m}\ndata: {train: []}\n", "data.train = []: must name at least one", 1),
    ("run_dir: m\nmodel: {path: ./m}\ndata: {train: d}\n", "run_dir = m: is also model.path", 1),
    ('run_dir: ""\nmodel: {path: m}\ndata: {train: d}\n', 'run_dir = "": must be a path', 1),
]  # fmt: skip


@pytest.mark.parametrize(("text", "expected", "lines"), MISTAKES_IN_WHOLE_FILES)
def test_mistakes_of_whole_files(load, text, expected, lines):
    found = complaint(load, "", base=text)
    assert expected in found
    assert found.count("\n") == lines - 1


def test_the_table_is_long_enough():
    assert len(MISTAKES) + len(MISTAKES_IN_WHOLE_FILES) >= 40


def test_all_mistakes_are_told_at_once(load):
    text = complaint(
        load,
        "seed: x\nparallel: {tensor_model_parallel_size: two, sequence_parallel: true}\n"
        "objective: {loss_type: sft, beta: 1}\nbatch: {global_batch_size: 0}\ntypo: 1\n",
    )
    lines = text.splitlines()
    assert lines[0] == "run.yaml has 5 problems"
    for expected in ("seed", "parallel.tensor", "objective.beta", "batch.global_batch_size", "typo"):
        assert sum(f": {expected}" in line for line in lines) == 1, expected
    assert "sequence_parallel" not in text, "a rule about a setting that is wrong itself would only confuse"


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match=r"nothing\.yaml: no such file"):
        load_config(tmp_path / "nothing.yaml", [])
    with pytest.raises(ConfigError, match="is a folder"):
        load_config(tmp_path, [])
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_config(tmp_path / "binary.yaml", [])
    (tmp_path / "control.yaml").write_text("run_dir: \x07\n")
    with pytest.raises(ConfigError, match=r"control\.yaml: .*mend the YAML"):
        load_config(tmp_path / "control.yaml", [])


# ---- overrides


def test_overrides_replace_and_add(load):
    config = load(
        "seed: 1\nobjective: {beta: 0.5}\n",
        "seed=2",
        "data.train=[a, b]",
        "data.eval=held.jsonl",
        "optimizer.learning_rate=1e-6",
        "objective.label_smoothing=0.1",
        "log.run_name=a=b",
        "parallel={tensor_model_parallel_size: 2}",
        "train.max_steps=3",
        "train.max_steps=4",
        "data.split=",
    )
    assert config.seed == 2
    assert (config.data.train, config.data.eval, config.data.split) == (("a", "b"), ("held.jsonl",), None)
    assert config.optimizer.learning_rate == 1e-6
    assert config.objective == DPO(0.5, 0.1)
    assert config.log.run_name == "a=b"
    assert config.parallel.tensor_model_parallel_size == 2
    assert config.train.max_steps == 4


def test_an_override_of_the_objective(load):
    assert load("", "objective.loss_type=sft").objective == SFT()


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("seed", "command line: 'seed': an override is key=value"),
        ("=3", "command line: '=3': an override is key=value"),
        ("--seed=3", "an override is key=value"),
        ("seed=[", "the value is not valid YAML"),
        ("seed=x", 'command line: seed = "x": must be a whole number'),
        ("sed=3", "command line: sed: unknown key; did you mean seed?"),
        ("train.max_step=3", "command line: train.max_step: unknown key; did you mean train.max_steps?"),
        ("seed.more=3", "seed = {"),
        ("train.max_steps.x=3", "train.max_steps = {"),
    ],
)
def test_a_mistake_in_an_override(load, override, expected):
    text = complaint(load, "", override)
    assert expected in text
    assert "\n" not in text


def test_an_override_below_a_section_that_is_wrong(load):
    assert complaint(load, "train: 3\n", "train.max_steps=5").startswith("run.yaml:6: train = 3: must be a section")


# ---- writing


def test_a_resolved_run_file_reads_back(load, tmp_path):
    config = load(
        "objective: {loss_type: dpo, beta: 0.3}\noptimizer: {learning_rate: 3e-7, adam_epsilon: 1e-12}\n"
        "data: {train: [a, b], eval: 'c: d'}\nlog: {run_name: '2024', wandb_project: 'yes'}\n",
        base="run_dir: 'runs/\u00e9'\nmodel: {path: m, dtype: float32}\nseed: 4294967295\n",
    )
    (tmp_path / "again.yaml").write_text(to_yaml(config), encoding="utf-8")
    assert load_config(tmp_path / "again.yaml", []) == config


def test_every_objective_reads_back(load, tmp_path):
    for objective in (DPO(0.2), SFT()):
        config = replace(load(), objective=objective)
        (tmp_path / "again.yaml").write_text(to_yaml(config))
        assert load_config(tmp_path / "again.yaml", []) == config


TOKEN = "hf_" + "A1b2C3d4" * 4
SECRETS = ["https://me:canary@host/pairs.jsonl", "s3://key:canary@bucket/x", f"x/{TOKEN}/y"]


def test_secrets_are_refused_and_not_shown(load):
    text = complaint(load, f"reference: {{path: '{SECRETS[2]}'}}\n", f"data.train=[{SECRETS[0]}, {SECRETS[1]}]")
    assert text.count("looks like a key or a password (not shown here)") == 3
    assert "canary" not in text
    assert TOKEN not in text


def test_secrets_are_not_written_either():
    text = to_yaml(Config("r", ModelConfig("m"), DataConfig(tuple(SECRETS))))
    assert "canary" not in text
    assert TOKEN not in text
    assert "https://***@host/pairs.jsonl" in text


def test_the_schema_describes_what_is_accepted():
    schema = json_schema()
    assert schema["required"] == ["run_dir", "model", "data"]
    assert schema["additionalProperties"] is False
    optimizer = schema["properties"]["optimizer"]["properties"]
    assert optimizer["learning_rate"] == {"type": "number", "default": 5e-07}
    assert "fraction of learning_rate" in optimizer["min_lr_ratio"]["description"]
    objectives = schema["properties"]["objective"]["anyOf"]
    named = {branch["properties"]["loss_type"]["enum"][0]: branch for branch in objectives}
    assert list(named) == list(OBJECTIVES)
    assert named["dpo"]["properties"]["loss_type"]["enum"] == ["dpo", "sigmoid", "cdpo", "conservative_dpo"]
    assert "beta" not in named["sft"]["properties"]
    assert named["mix"]["properties"]["parts"]["items"] == {"$ref": "#/properties/objective"}
    assert json.loads(json.dumps(schema)) == schema


def test_yaml_that_the_schema_calls_default_is_the_default(load):
    text = to_yaml(load())
    for name, section in json_schema()["properties"].items():
        for key, entry in section.get("properties", {}).items():
            if "default" in entry:
                assert yaml.safe_load(text)[name][key] == entry["default"], f"{name}.{key}"


# ---- the grid


def grid_problems(tensor=1, pipeline=1, virtual=None, world=None, heads=8, groups=4, layers=5, ffn=192, channels=8):
    grid = ParallelConfig(tensor, pipeline, virtual)
    config = Config("r", ModelConfig("m"), DataConfig(("d",)), parallel=grid)
    return check_grid(config, heads, groups, layers, ffn, world, channels)


@pytest.mark.parametrize(
    ("tensor", "pipeline", "virtual", "world"),
    [(1, 1, None, None), (2, 1, None, 2), (4, 1, None, 8), (8, 1, None, 8), (1, 5, None, 5), (2, 2, 2, 8), (1, 3, None, 3)],
)  # fmt: skip
def test_grids_that_fit(tensor, pipeline, virtual, world):
    """8 heads, 4 key-value heads (tensor 8 shares them), 5 layers (uneven stages)."""
    assert grid_problems(tensor, pipeline, virtual, world) == []


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"tensor": 3, "groups": 6, "heads": 8}, "parallel.tensor_model_parallel_size = 3: must divide its 8 attention heads; sizes that fit this model: 1, 2"),
        ({"tensor": 3}, "must divide its 8 attention heads and its 4 key-value heads (or be a multiple of them); sizes that fit this model: 1, 2, 4, 8"),
        ({"tensor": 16}, "must divide its 8 attention heads"),
        ({"tensor": 2, "groups": 3, "heads": 6}, "must divide its 3 key-value heads (or be a multiple"),
        ({"tensor": 4, "ffn": 190}, "must divide its MLP size of 190; sizes that fit this model: 1, 2"),
        ({"tensor": 8, "groups": 1, "channels": 2}, "must divide the 20 rows of its joint q, k, v projection"),
        ({"pipeline": 6}, "6 stages for 5 layers; every stage needs at least one: ask for at most 5 stages"),
        ({"pipeline": 3, "virtual": 2}, "pipeline_model_parallel_size = 3 x virtual_pipeline_model_parallel_size = 2"),
        ({"tensor": 2, "pipeline": 2, "world": 6}, "tensor 2 x pipeline 2 = 4 processes for one replica and 6 were"),
    ],
)  # fmt: skip
def test_grids_that_do_not_fit(given, expected):
    found = grid_problems(**given)
    assert len(found) == 1
    assert expected in found[0]


def test_a_world_of_another_size():
    assert check_world(ParallelConfig(2, 2, data_parallel_size=2), 8) == []
    assert "start 8, or leave parallel.data_parallel_size out" in check_world(ParallelConfig(2, 2, data_parallel_size=2), 4)[0]  # fmt: skip


def test_rules_hold_for_configs_made_in_python():
    config = Config("r", ModelConfig("m"), DataConfig(("d",)), seed=-1, log=LogConfig(wandb_mode="offline"))
    assert len(problems(config)) == 2
