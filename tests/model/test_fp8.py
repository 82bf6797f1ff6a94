"""FP8's settings on their way to Megatron-Core, as far as a machine without Transformer Engine shows it. What its
kernels do with them is tests/gpu's."""

import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from distributed import run_ranks
from megatron.core.dist_checkpointing import ShardedTensor
from tiny import random_groups, write_llama
from train.engine import Case, build, pieces

from megadpo.config import Config, DataConfig, ModelConfig, ParallelConfig
from megadpo.config.check import row_multiple
from megadpo.convert.families import read_shape
from megadpo.convert.fit import fp8_misfits
from megadpo.convert.shape import ModelShape
from megadpo.data.cost import Cost
from megadpo.data.packing import Budget
from megadpo.data.stream import open_streams
from megadpo.errors import MachineError
from megadpo.model.build import build_chunks, transformer_config
from megadpo.model.fp8 import learning_nothing, machine_problem, precision, recipe_problem
from megadpo.objectives import DPO
from megadpo.parallel import mcore_fixes
from megadpo.parallel.context import grid
from megadpo.parallel.user_buffers import overlap_problem, start_user_buffers
from megadpo.train.identity import _fp8
from megadpo.train.optimizer import wrap
from megadpo.train.passes import score
from megadpo.train.step import train_step

CPU = torch.device("cpu")
FP8 = ModelConfig("m", fp8_format="hybrid", fp8_recipe="blockwise", fp8_param_gather=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("fp8") / "llama", layers=4, hidden=64, ffn=96)


@pytest.fixture
def shape(folder: Path) -> ModelShape:
    return read_shape(folder)


def test_settings_reach_megatron_core(shape: ModelShape, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mcore_fixes, "have_te", lambda: True)
    model = replace(FP8, first_last_layers_bf16=True, num_layers_at_end_in_bf16=2)
    config = transformer_config(shape, ParallelConfig(), model, CPU)
    got = {name: getattr(config, name) for name in ("fp8", "fp8_recipe", "fp8_param", "first_last_layers_bf16")}
    assert got == {"fp8": "hybrid", "fp8_recipe": "blockwise", "fp8_param": True, "first_last_layers_bf16": True}
    assert (config.num_layers_at_start_in_bf16, config.num_layers_at_end_in_bf16) == (1, 2)
    assert (config.fp8_amax_history_len, config.fp8_amax_compute_algo) == (1024, "max")


def test_an_emulation_and_bf16_leave_megatron_core_alone(shape: ModelShape) -> None:
    for model in (ModelConfig("m"), ModelConfig("m", fp8_format="e4m3", fp8_emulation=True)):
        config = transformer_config(shape, ParallelConfig(), model, CPU)
        assert config.fp8 is None
        assert not config.fp8_param


@pytest.mark.parametrize(("recipe", "through_gradients"), [("tensorwise", False), ("mxfp8", True)])
def test_settings_reach_gradient_buffers_and_optimizer(folder: Path, recipe: str, through_gradients: bool) -> None:
    [(ddp, optimizer)] = run_ranks(1, wrapped, folder, recipe)
    assert ddp == (True, through_gradients)
    assert optimizer == (recipe, through_gradients)


def wrapped(device: torch.device, folder: Path, recipe: str) -> tuple:
    from megadpo.config import OptimizerConfig
    from megadpo.train.optimizer import build_optimizer

    parallel = ParallelConfig()
    with grid(parallel, device, 0) as context:
        modules = build_chunks(read_shape(folder), parallel, context, ModelConfig("", "bfloat16"))
        modules[0].config.fp8_param, modules[0].config.fp8_recipe = True, recipe
        [chunk] = wrap(modules, parallel)
        optimizer = build_optimizer([chunk], OptimizerConfig(), parallel)
        ddp, config = chunk.ddp_config, optimizer.config
        return (
            (ddp.fp8_param_gather, ddp.reuse_grad_buf_for_mxfp8_param_ag),
            (config.fp8_recipe, config.reuse_grad_buf_for_mxfp8_param_ag),
        )


# ---- what FP8 needs


@pytest.mark.parametrize(
    ("recipe", "parallel", "rows"),
    [
        ("tensorwise", ParallelConfig(), 16),
        ("delayed", ParallelConfig(4, sequence_parallel=True), 64),
        ("mxfp8", ParallelConfig(2, sequence_parallel=True), 64),
        ("blockwise", ParallelConfig(8, sequence_parallel=True), 1024),
        ("blockwise", ParallelConfig(8), 128),
    ],
)
def test_streams_come_in_whole_blocks(recipe: Any, parallel: ParallelConfig, rows: int) -> None:
    model = ModelConfig("m", fp8_format="e4m3", fp8_recipe=recipe)
    assert row_multiple(model, parallel) == rows
    config = Config("r", model, DataConfig(("d",)), parallel=parallel)
    [stream] = open_streams(config, [random_groups(20)], ranks=1, cost=Cost(), fixed_length=True)  # type: ignore[list-item]
    assert stream.budget.tokens % rows == 0
    for batch in stream.batches(np.arange(20), 0, None):
        assert len(batch.tokens_T) == stream.budget.tokens


def test_without_fp8_and_emulated_any_row_will_do() -> None:
    assert row_multiple(ModelConfig("m"), ParallelConfig(4)) == 1
    assert row_multiple(ModelConfig("m", fp8_format="e4m3", fp8_emulation=True), ParallelConfig(4)) == 1


def test_widths_that_cannot_be_multiplied_are_named(shape: ModelShape) -> None:
    assert fp8_misfits(shape, FP8, ParallelConfig()) == []
    assert fp8_misfits(shape, ModelConfig("m"), ParallelConfig(4)) == []
    [line] = fp8_misfits(shape, FP8, ParallelConfig(4))
    assert line.startswith("model.fp8_recipe = blockwise: the MLP is 24 on each rank and must be a multiple of 16")
    narrow = replace(shape, ffn_hidden_size=48)
    assert fp8_misfits(narrow, FP8, ParallelConfig()) == []
    [line] = fp8_misfits(narrow, replace(FP8, fp8_recipe="mxfp8"), ParallelConfig())
    assert "the MLP is 48 on each rank and must be a multiple of 32" in line
    assert fp8_misfits(narrow, replace(FP8, fp8_recipe="mxfp8", fp8_emulation=True), ParallelConfig()) == []


def test_layers_in_bf16_stay_within_a_stage(shape: ModelShape) -> None:
    model = replace(FP8, first_last_layers_bf16=True, num_layers_at_start_in_bf16=3)
    assert fp8_misfits(shape, model, ParallelConfig()) == []
    [line] = fp8_misfits(shape, model, ParallelConfig(pipeline_model_parallel_size=2))
    assert line == "model.num_layers_at_start_in_bf16 = 3: must be at most 2, the layers of a pipeline stage"


@pytest.mark.parametrize(
    ("recipe", "capability", "cuda", "said"),
    [
        ("tensorwise", (9, 0), "12.4", None),
        ("delayed", (8, 9), "12.4", None),
        ("tensorwise", (8, 0), "12.4", "needs compute capability 8.9 or more and this GPU has 8.0"),
        ("blockwise", (9, 0), "12.9", None),
        ("blockwise", (9, 0), "13.0", None),
        ("blockwise", (9, 0), "12.8", "needs CUDA 12.9 or newer and torch was built with 12.8"),
        ("blockwise", (8, 9), "12.9", "needs compute capability 9.0 or more (Hopper: H100, H200)"),
        ("mxfp8", (10, 0), "12.9", None),
        ("mxfp8", (9, 0), "12.9", "needs compute capability 10.x (Blackwell: B200, GB200) and this GPU has 9.0"),
        ("mxfp8", (12, 0), "12.9", "needs compute capability 10.x"),
    ],
)
def test_recipes_and_gpus(recipe: str, capability: tuple[int, int], cuda: str, said: str | None) -> None:
    line = recipe_problem(recipe, capability, cuda)
    assert line is None if said is None else said in str(line)


def test_without_a_gpu_it_is_refused_and_the_emulation_is_named(folder: Path) -> None:
    assert machine_problem(ModelConfig("m"), CPU) is None
    assert machine_problem(replace(FP8, fp8_param_gather=False, fp8_emulation=True), CPU) is None
    [text] = run_ranks(1, refused, folder)
    assert text.startswith("model.fp8_format = hybrid: needs a GPU and this run is on a cpu")
    assert "model.fp8_emulation: true" in text


def refused(device: torch.device, folder: Path) -> str:
    with grid(ParallelConfig(), device, 0) as context, pytest.raises(MachineError) as caught:
        build_chunks(read_shape(folder), ParallelConfig(), context, FP8)
    return str(caught.value)


def test_without_transformer_engine_the_page_that_helps_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mcore_fixes, "have_te", lambda: False)
    line = machine_problem(FP8, torch.device("cuda"))
    assert "needs Transformer Engine, which is not installed: docs/install.md" in str(line)


# ---- what GPU tests compare by


class Wrapper(torch.Tensor):
    """Holds its numbers elsewhere, as Transformer Engine's FP8 tensors do; every one's address is 0."""

    @staticmethod
    def __new__(cls, numbers: torch.Tensor) -> "Wrapper":
        return torch.Tensor._make_wrapper_subclass(cls, numbers.shape, dtype=numbers.dtype)

    def __init__(self, numbers: torch.Tensor) -> None:
        self.numbers = numbers

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is torch.ops.aten.detach.default, func
        return cls(args[0].numbers)


def test_parameters_without_an_address_are_told_apart() -> None:
    """Each tensor gets its own parameter's numbers."""
    weights = {name: torch.nn.Parameter(Wrapper(torch.full((2, 3), value))) for name, value in (("a", 1.0), ("b", 2.0))}
    assert {weight.data_ptr() for weight in weights.values()} == {0}
    entries = {n: ShardedTensor.from_rank_offsets(n, weight) for n, weight in weights.items()}
    module = SimpleNamespace(parameters=weights.values, sharded_state_dict=lambda metadata: entries)
    found = pieces(SimpleNamespace(modules=[module]), lambda p: p.detach().numbers)  # type: ignore[arg-type]
    assert {name: piece.data[0, 0].item() for name, piece in found.items()} == {"a": 1, "b": 2}


# ---- what is not the same run, and not the same column


def test_what_decides_the_weights_is_part_of_whose_run_it_is() -> None:
    """A run file that goes on with other layers in bf16, or with weights in FP8, is refused; emulated or not is left
    to the machine."""
    plain = ModelConfig("m", fp8_format="hybrid")
    ends = replace(plain, first_last_layers_bf16=True)
    others = [
        ModelConfig("m"),
        replace(plain, fp8_format="e4m3"),
        replace(plain, fp8_recipe="mxfp8"),
        replace(plain, fp8_param_gather=True),
        ends,
        replace(ends, num_layers_at_start_in_bf16=2),
        replace(ends, num_layers_at_end_in_bf16=2),
    ]
    told = [_fp8(model).get("model.fp8") for model in [plain, *others]]
    assert len(set(told)) == len(told), told
    assert _fp8(replace(plain, fp8_emulation=True)) == _fp8(plain)


def test_columns_of_another_precision_are_told_apart() -> None:
    """What passes without a gradient compute in, weights gathered in FP8 included."""
    plain = ModelConfig("m", fp8_format="hybrid", fp8_recipe="blockwise")
    gathered = replace(plain, fp8_param_gather=True)
    bf16 = ModelConfig("m")
    assert len({precision(model) for model in (plain, gathered, bf16, replace(plain, fp8_emulation=True))}) == 4
    assert precision(replace(plain, fp8_format="e4m3")) == precision(plain)
    assert precision(replace(plain, fp8_recipe="delayed")) == precision(bf16)


# ---- where FP8 is on


def contexts(device: torch.device, case: Case, recipe: str) -> dict[str, Any]:
    """What Megatron-Core would enter, in a scoring pass and in a step; a stand-in notes it."""
    from megatron.core.transformer import transformer_block

    entered: list[tuple[int, bool]] = []

    @contextmanager
    def note(config: Any, layer_no: int = -1, is_init: bool = False) -> Any:
        entered.append((layer_no, torch.is_grad_enabled()))
        inside.append(True)
        yield
        inside.pop()

    inside: list[bool] = []
    found: dict[str, Any] = {}
    with grid(case.parallel, device, 0) as context:
        state, stream = build(case, context)
        [chunk] = state.modules
        config = chunk.config
        config.fp8, config.fp8_recipe = "hybrid", recipe
        transformer_block.get_fp8_context = note
        outside: list[bool] = []
        for name in ("embedding", "output_layer"):
            if hasattr(chunk, name):
                getattr(chunk, name).register_forward_pre_hook(lambda *_: outside.append(not inside))
        first: list[bool] = []
        layer = chunk.decoder.layers[0].self_attention.linear_qkv
        layer.is_first_microbatch = True

        def like_te(module: Any, *_: Any) -> None:
            first.append(module.is_first_microbatch)
            module.is_first_microbatch = False

        layer.register_forward_pre_hook(like_te)
        batches = stream.batches(np.arange(case.batch), context.data_rank, None)
        found["micro_batches"] = len(batches)
        score(state.modules, batches, context)
        found["scored"], found["scored_first"] = list(entered), list(first)
        entered.clear()
        first.clear()
        column = np.zeros(int(stream.store.offsets[-1]))
        batches = stream.batches(np.arange(case.batch), context.data_rank, column)
        train_step(state, batches, DPO(), None, context)
        found["trained"], found["trained_first"] = list(entered), list(first)
        found["outside"], found["fp8"] = outside, config.fp8
    return found


@pytest.mark.parametrize("recipe", ["tensorwise", "delayed"])
def test_contexts_are_those_of_megatron_core(folder: Path, recipe: str) -> None:
    """Each layer's own for tensorwise, by its number in the whole model; one around the stage for delayed, and none
    without a gradient. Weights are cast in the first micro-batch of every pass. Embedding and head are outside."""
    case = Case(folder, random_groups(8), pipeline=2, budget=Budget(64))
    for stage, found in enumerate(run_ranks(2, contexts, case, recipe)):
        count = found["micro_batches"]
        assert count > 1
        layers = [2 * stage, 2 * stage + 1] if recipe == "tensorwise" else [-1]
        assert found["trained"] == [(layer, True) for layer in layers] * count
        assert found["scored"] == ([(layer, False) for layer in layers] * count if recipe == "tensorwise" else [])
        assert found["trained_first"] == [True] + [False] * (count - 1)
        if recipe == "tensorwise":
            assert found["scored_first"] == [True] + [False] * (count - 1)
        assert found["outside"]
        assert all(found["outside"])
        assert found["fp8"] == "hybrid"


def test_delayed_scaling_learns_from_training_alone() -> None:
    def chunk(recipe: str) -> SimpleNamespace:
        return SimpleNamespace(config=SimpleNamespace(fp8="hybrid", fp8_recipe=recipe), modules=list)

    delayed, tensorwise = chunk("delayed"), chunk("tensorwise")
    tensorwise.module = SimpleNamespace(config=tensorwise.config)
    with learning_nothing([delayed, delayed, tensorwise]):
        assert (delayed.config.fp8, tensorwise.config.fp8) == (None, "hybrid")
    assert (delayed.config.fp8, tensorwise.config.fp8) == ("hybrid", "hybrid")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_overlap_in_products_needs_transformer_engines_layers(device: str) -> None:
    overlapped = ParallelConfig(2, sequence_parallel=True, tp_comm_overlap=True)
    for te in (False, True):
        problem = overlap_problem(overlapped, torch.device(device), te)
        assert (problem is None) == (te and device == "cuda")
        assert overlap_problem(ParallelConfig(2), torch.device(device), te) is None


def test_buffers_are_made_as_transformer_engine_wants_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a stand-in with the names and arguments of 2.9: once, for FP8 and for bf16."""
    made: list[dict[str, Any]] = []

    def initialize_ub(
        shape: list, tp_size: int, quantization_modes: list, ub_cfgs: dict, bootstrap_backend: str
    ) -> None:
        base._ub_communicators = {}
        made.append({"shape": shape, "tp_size": tp_size, "modes": quantization_modes})

    kinds = SimpleNamespace(FP8="fp8", NONE="none")
    base = SimpleNamespace(UserBufferQuantizationMode=kinds, initialize_ub=initialize_ub, _ub_communicators=None)
    for name in ("transformer_engine", "transformer_engine.pytorch"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace())
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch.module", SimpleNamespace(base=base))
    start_user_buffers(ParallelConfig(2, sequence_parallel=True), 4096, 512, fp8=True)
    assert made == []
    for _ in range(2):
        start_user_buffers(ParallelConfig(2, sequence_parallel=True, tp_comm_overlap=True), 4096, 512, fp8=True)
    assert made == [{"shape": [4096, 512], "tp_size": 2, "modes": ["fp8", "none"]}]
