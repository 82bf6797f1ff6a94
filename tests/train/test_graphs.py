"""A step with CUDA graphs equals the same step without, to the last bit. There is no CUDA here: tests/tape.py replays
what was captured from the memory that a graph has, without running its Python. tests/gpu has the real ones."""

import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tape
import torch
from distributed import run_ranks
from families_table import COMMON, write
from megatron.core import parallel_state
from tape import Replayed, make_graphed_callables
from tiny import random_groups, write_llama

from megadpo import checkpoint
from megadpo.config import Config, DataConfig, ModelConfig
from megadpo.convert.families import read_shape
from megadpo.convert.fit import graph_misfits
from megadpo.data.packing import Budget
from megadpo.errors import MachineError
from megadpo.model import graphs
from megadpo.model.build import check_machine
from megadpo.objectives import OBJECTIVES
from megadpo.parallel import mcore_fixes
from megadpo.parallel.context import grid
from megadpo.parallel.cuda_graphs import graphs_problem, most_in_flight
from megadpo.plan.graph_memory import graphed, turns_of
from megadpo.plan.pipeline import order
from megadpo.plan.stage import Layer, kind_of
from megadpo.train.nonfinite import culprits
from megadpo.train.step import train_step
from train import engine
from train.engine import Case, assemble, build, run

VOCAB = 67


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """5 layers, which do not divide by 2 stages. The steps have different numbers of micro-batches."""
    folder = write_llama(tmp_path_factory.mktemp("llama"), layers=5, vocab=VOCAB, bias=True)
    return Case(folder, random_groups(16, vocab=VOCAB), budget=Budget(40))


@pytest.fixture(scope="module", params=["deepseek_v3", pytest.param("gpt_oss", marks=pytest.mark.slow)])
def experts(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Shared experts, a selection bias and a plain layer; biases."""
    folder = write(request.param, tmp_path_factory.mktemp("model") / request.param)
    return Case(
        folder, random_groups(16, vocab=int(COMMON["vocab_size"])), learning_rate=1e-4, budget=Budget(64), steps=1
    )


def replays(state: Any) -> list[list[int]]:
    """Of every captured layer, how often each of its graphs ran."""
    layers = [layer for module in state.modules for layer in module.decoder.layers if layer.graphs]
    return [[graph._replay.replays for graph in layer.graphs] for layer in layers]


def run_counting(device: torch.device, cases: list[Case]) -> list[dict[str, Any]]:
    """Every case, and how often its graphs ran."""
    states: list[Any] = []
    original = engine.build

    def remembered(case: Case, context: Any) -> Any:
        state, stream = original(case, context)
        states.append(state)
        return state, stream

    engine.build = remembered
    results = run(device, cases)
    return [result | {"replays": replays(state)} for result, state in zip(results, states, strict=True)]


def same(world: int, cases: list[Case], scopes: tuple[str, ...], vocab: int = VOCAB) -> list[list[dict[str, Any]]]:
    """Run every case with graphs and without; the results with them, of every rank."""
    results = run_ranks(world, run_counting, [*cases, *(replace(case, graphs=scopes) for case in cases)])
    for index, case in enumerate(cases):
        plain, graphed = ([rank[i] for rank in results] for i in (index, index + len(cases)))
        for what in ("weights",) if case.distributed else ("gradients", "weights"):
            want, got = (assemble(ranks, what, vocab) for ranks in (plain, graphed))
            different = [key for key in want if not torch.equal(want[key], got[key])]
            assert not different, f"{case}: {what} of {different}"
        for one, other in zip(plain, graphed, strict=True):
            assert one["sums"] == other["sums"]
            assert one["grad_norms"] == other["grad_norms"]
            assert one.get("held_out") == other.get("held_out")
            assert one["replays"] == []
            assert all(min(layer) > 0 for layer in other["replays"]), "one that is never replayed"
            assert all(sum(layer) == sum(other["micro_batches"]) for layer in other["replays"]), "training alone"
    return [rank[len(cases) :] for rank in results]


def test_one_rank(base: Case) -> None:
    """Among them passes without a gradient: of a column, of held-out data, of a whole batch before its loss."""
    cases = [
        replace(base, evaluated=True),
        replace(base, recompute="selective", resident=True, objective=OBJECTIVES["aot"]()),
        replace(base, dtype="bfloat16", distributed=True),
    ]
    [results] = same(1, cases, ("mlp",))
    assert len(set(results[0]["micro_batches"])) > 1, "of different numbers of micro-batches"
    assert all(len(layers) == 5 and all(len(layer) == 1 for layer in layers) for layers in [results[0]["replays"]])


def test_two_ranks(base: Case) -> None:
    cases = [
        replace(base, tensor=2, sequence=True, steps=1),
        replace(base, pipeline=2),
        replace(base, pipeline=2, virtual=2, steps=1),
        replace(base, distributed=True, overlap=True, bucket_size=500),
    ]
    first, last = same(2, cases, ("mlp",))
    assert len(set(first[1]["micro_batches"])) > 1
    assert [len(rank[1]["replays"][0]) for rank in (first, last)] == [2, 1]


@pytest.mark.slow
def test_four_stages(base: Case) -> None:
    cases = [replace(base, pipeline=4), replace(base, tensor=2, pipeline=2, sequence=True), replace(base, tensor=2)]
    results = same(4, cases, ("mlp",))
    assert [len(rank[0]["replays"][0]) for rank in results] == [4, 3, 2, 1]


def test_experts(experts: Case) -> None:
    same(1, [experts], ("mlp", "moe_router"), int(COMMON["vocab_size"]))
    same(2, [replace(experts, tensor=2, sequence=True, expert=2)], ("moe_router",), int(COMMON["vocab_size"]))


@pytest.mark.slow
def test_experts_in_a_pipeline(experts: Case) -> None:
    same(2, [replace(experts, pipeline=2, steps=2)], ("moe_router",), int(COMMON["vocab_size"]))


def add_inside() -> None:
    """Weights' gradients are added to the float32 buffer inside the product, as by Apex and Transformer Engine."""
    from megatron.core.tensor_parallel import layers

    class Apex:
        @staticmethod
        def wgrad_gemm_accum_fp32(x: torch.Tensor, dy: torch.Tensor, main_grad: torch.Tensor) -> None:
            main_grad.addmm_(dy.t(), x)

    original = engine.wrap

    def wrap(modules: list, *args: Any) -> list:
        for module in modules[0].decoder.modules():
            if hasattr(module, "gradient_accumulation_fusion"):
                module.gradient_accumulation_fusion = True
        return original(modules, *args)

    layers.fused_weight_gradient_mlp_cuda, engine.wrap = Apex, wrap


def run_added_inside(device: torch.device, cases: list[Case]) -> list[dict[str, Any]]:
    add_inside()
    return run(device, cases)


def test_gradients_added_inside_the_product(base: Case) -> None:
    """Only by Python does data parallelism know that it need not add them; what stands in their place is no number."""
    [[plain, graphed]] = run_ranks(1, run_added_inside, [base, replace(base, graphs=("mlp",))])
    for what in ("gradients", "weights"):
        for key, piece in plain[what].items():
            assert torch.equal(piece.data, graphed[what][key].data), f"{what} of {key}"
    assert plain["grad_norms"] == graphed["grad_norms"]


def in_flight(stages: int, chunks: int, rank: int, monkeypatch: pytest.MonkeyPatch) -> tuple[int, ...]:
    monkeypatch.setattr(parallel_state, "get_pipeline_model_parallel_world_size", lambda: stages)
    monkeypatch.setattr(parallel_state, "get_pipeline_model_parallel_rank", lambda: rank)
    monkeypatch.setattr(
        parallel_state, "get_virtual_pipeline_model_parallel_world_size", lambda: chunks if chunks > 1 else None
    )
    context: Any = SimpleNamespace(pipeline_size=stages, virtual_size=chunks)
    return most_in_flight(context)


@pytest.mark.parametrize(
    ("stages", "chunks"), [(1, 1), (2, 1), (4, 1), (5, 1), (2, 2), (2, 5), (4, 2), (3, 3), (4, 10), (8, 4)]
)
def test_as_many_graphs_as_are_ever_in_flight(stages: int, chunks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every chunk of every rank, neither more nor less, against the planner's own walk of the schedule; the oldest
    micro-batch goes backward first, so that turns do."""
    for rank in range(stages):
        most = [0] * chunks
        for count in range(stages, 8 * stages + 1, stages if chunks > 1 else 1):
            waiting: list[list[int]] = [[] for _ in range(chunks)]
            for backward, chunk, batch in order(rank, stages, chunks, count):
                if backward:
                    assert waiting[chunk].pop(0) == batch
                else:
                    waiting[chunk].append(batch)
                most[chunk] = max(most[chunk], len(waiting[chunk]))
        assert in_flight(stages, chunks, rank, monkeypatch) == tuple(most), f"rank {rank}"
        assert turns_of(rank, stages, chunks) == tuple(most), "the planner's"


def test_later_chunks_need_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the walk above, by hand."""
    assert in_flight(4, 10, 0, monkeypatch) == (8, 8, 8, 8, 8, 4, 4, 4, 4, 4)
    assert in_flight(8, 4, 7, monkeypatch) == (16, 9, 8, 1)
    assert in_flight(4, 2, 3, monkeypatch) == (5, 1)


def too_few(device: torch.device, case: Case, checked: bool) -> Any:
    """One graph less than can be in flight."""
    graphs.most_in_flight = lambda context: tuple(max(turns - 1, 1) for turns in most_in_flight(context))
    if not checked:
        graphs.Graph.in_flight = property(lambda self: False, lambda self, value: None)  # type: ignore[assignment]
    return run(device, [case])


def test_one_graph_too_few_is_noticed(base: Case) -> None:
    with pytest.raises(AssertionError, match="would be written while a backward pass needs it"):
        run_ranks(2, too_few, replace(base, pipeline=2, graphs=("mlp",)), True)


def test_and_would_be_wrong(base: Case) -> None:
    """The comparison of this file can fail: memory that is written too early gives NaN or other numbers."""
    with pytest.raises(AssertionError, match="the gradient norm is nan"):
        run_ranks(2, too_few, replace(base, pipeline=2, graphs=("mlp",)), False)


def held(graph: Replayed) -> int:
    """Bytes that no other graph may use: its input, what its backward pass reads of its own, its output, and the
    gradient that goes in."""
    gone_in = [graph.static, *(gradient for gradient in graph.gradients_out if gradient is not None)]
    made = {storage: tensor for storage, tensor in graph.forward.made.items() if storage in graph.left}
    made |= {tape.key(tensor): tensor for tensor in [*gone_in, *graph.outputs]}
    return sum(tensor.untyped_storage().nbytes() for tensor in made.values())


def captured(device: torch.device, case: Case) -> dict[str, Any]:
    """What capturing leaves behind, and what a graph refuses."""
    add_inside()
    with grid(case.parallel, device, seed=1) as context:
        state, _ = build(case, context)
        weights = [p.clone() for p in state.modules[0].parameters()]
        noise = torch.get_rng_state()
        linear = state.modules[0].decoder.layers[0].mlp.linear_fc1  # as if it were Transformer Engine's
        linear.disable_parameter_transpose_cache, linear._fp8_workspaces = False, {"weight": torch.zeros(1)}
        line = graphs.capture(state.chunks, ("mlp",), case.budget.tokens, 32, context, make_graphed_callables)
        layer = state.modules[0].decoder.layers[0]
        layer.current_microbatch = 0
        found: dict[str, Any] = {
            "line": line,
            "held": held(layer.graphs[0]._replay),
            "casts": (linear.disable_parameter_transpose_cache, linear._fp8_workspaces),
            "weights": all(torch.equal(p, w) for p, w in zip(state.modules[0].parameters(), weights, strict=True)),
            "gradients": [float(buffer.grad_data.abs().sum()) for buffer in state.chunks[0].buffers],
            "own": [p for p in state.modules[0].parameters() if p.grad is not None],
            "noise": torch.equal(noise, torch.get_rng_state()),
            "keys": [key for key in state.modules[0].state_dict() if "graph" in key],
        }
        for name, rows in (("rows", 39), ("moved", 40)):
            if name == "moved":
                layer.mlp.linear_fc1.weight.data = layer.mlp.linear_fc1.weight.data.clone()
            try:
                layer._forward_mlp(torch.zeros(rows, 1, 32, requires_grad=True))
            except AssertionError as error:
                found[name] = str(error)
        return found


def test_capturing_leaves_nothing_behind(base: Case) -> None:
    """Though its passes have gradients of NaN."""
    [found] = run_ranks(1, captured, base)
    assert found["weights"]
    config = Config(run_dir="", model=base.model, data=DataConfig(train=()), objective=base.objective)
    planned = graphed(kind_of(read_shape(base.folder), config, Layer(), 1, False, False, base.budget.tokens, 8, False))
    assert found["held"] == planned.held, "as the planner counts it"
    assert found["noise"]
    assert found["casts"] == (True, {}), "graphs have their own"
    assert found["gradients"] == [0.0]
    assert found["own"] == found["keys"] == []
    assert found["line"] == "CUDA graphs of mlp: 5 layers here, at most 1 micro-batches in flight, 10 graphs"
    assert found["rows"].startswith("a stream of other length: torch.Size([39, 1, 32])")
    assert found["moved"] == "weights have moved"


def beside_a_wider_reference(device: torch.device, case: Case, folder: Path) -> list[str | None]:
    """What a graph of the policy says behind a reference's pass, whose width was told when it was captured, or not."""
    found: list[str | None] = []
    for told in (True, False):
        with grid(case.parallel, device, seed=1) as context:
            policy, _ = build(replace(case, graphs=()), context)
            reference, _ = build(replace(case, folder=folder, graphs=()), context)
            width = [state.modules[0].config.hidden_size for state in (policy, reference)]
            tokens = case.budget.tokens
            graphs.capture(policy.chunks, case.graphs, tokens, width[told], context, make_graphed_callables)
            with torch.no_grad():
                reference.modules[0].decoder.layers[0]._forward_mlp(torch.zeros(tokens // 2, 1, width[1]))
            layer = policy.modules[0].decoder.layers[0]
            layer.current_microbatch = 0
            try:
                layer._forward_mlp(torch.zeros(tokens // 2, 1, width[0], requires_grad=True))
                found.append(None)
            except AssertionError as error:
                found.append(str(error))
    return found


def test_a_wider_reference_leaves_gathered_rows_in_place(base: Case, tmp_path: Path) -> None:
    """Layers of both models gather into the same memory, which is replaced when it is too small."""
    folder = write_llama(tmp_path / "wide", layers=1, vocab=VOCAB, hidden=64)
    case = replace(base, tensor=2, sequence=True, graphs=("mlp",))
    assert run_ranks(2, beside_a_wider_reference, case, folder) == 2 * [
        [None, "the memory for gathered rows has moved"]
    ]


def gone_back(device: torch.device, case: Case, run_dir: Path) -> list[Any]:
    """A step, a checkpoint, a step, back to the checkpoint, the same step again; then the search for culprits."""
    torch.use_deterministic_algorithms(True)  # what nobody wrote to is NaN
    with grid(case.parallel, device, seed=1) as context:
        state, stream = build(case, context)
        column, found = np.zeros(len(case.store.response_lengths)), []

        def step() -> None:
            batches = stream.batches(stream.next_groups(state.consumed, case.batch), 0, column)
            found.append(train_step(state, batches, case.objective, None, context))

        step()
        checkpoint.save(state, run_dir, 2, 1, context)
        step()
        newest = checkpoint.latest(run_dir)
        assert newest is not None
        checkpoint.load(state, newest)
        step()
        batches = stream.batches(stream.next_groups(0, case.batch), 0, column)
        assert culprits(state, batches, case.objective, None, context) == []
        return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_checkpoint_is_loaded_under_the_graphs(base: Case, dtype: str, tmp_path: Path) -> None:
    case = replace(base, dtype=dtype, distributed=dtype == "bfloat16", graphs=("mlp",))
    [[_, before, after]] = run_ranks(1, gone_back, case, tmp_path / "run")
    assert before == after


def test_a_machine_without_a_gpu_is_refused(base: Case) -> None:
    model = replace(base.model, cuda_graphs=("mlp", "moe_router"))
    with pytest.raises(MachineError, match=r"model.cuda_graphs = \[mlp, moe_router\]: needs a GPU and this run is on"):
        check_machine(model, base.parallel, torch.device("cpu"))


def test_segments_that_move_under_nccl_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, gpu = ModelConfig("m", cuda_graphs=("mlp",)), torch.device("cuda")
    assert graphs_problem(model, gpu) is None
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    assert "set NCCL_GRAPH_REGISTER=0" in str(graphs_problem(model, gpu))
    assert graphs_problem(ModelConfig("m"), gpu) is None
    monkeypatch.setenv("NCCL_GRAPH_REGISTER", "0")
    assert graphs_problem(model, gpu) is None


def test_parts_that_the_model_has_nowhere(base: Case, experts: Case) -> None:
    both = ModelConfig("m", cuda_graphs=("mlp", "moe_router"))
    assert graph_misfits(read_shape(base.folder), both) == [
        "model.cuda_graphs has moe_router: this model has no experts; write [mlp], or leave it out"
    ]
    shape = read_shape(experts.folder)
    assert shape.experts is not None
    every = replace(shape, experts=replace(shape.experts, layers=(True,) * shape.num_layers))
    assert [line.partition(";")[0] for line in graph_misfits(every, both)] == [
        "model.cuda_graphs has mlp: this model has experts in every layer"
    ]


def test_what_transformer_engine_is_asked_for(base: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its layers, its own function, and the layers that stay in bfloat16."""
    asked: list[dict[str, Any]] = []
    engine_module = ModuleType("transformer_engine.pytorch")
    engine_module.make_graphed_callables = lambda parts, samples, **more: asked.append(more)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "transformer_engine", ModuleType("transformer_engine"))
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", engine_module)
    monkeypatch.setattr(mcore_fixes, "have_te", lambda: True)
    config: Any = SimpleNamespace(
        fp8="hybrid", num_layers=3, first_last_layers_bf16=True, num_layers_at_start_in_bf16=1,
        num_layers_at_end_in_bf16=1,
    )  # fmt: skip
    layers: Any = [SimpleNamespace(layer_number=number) for number in (1, 2, 3)]
    context: Any = SimpleNamespace(amax_group=lambda: "group")
    graphs._make(layers, config, context)((), ())
    config.fp8 = None
    graphs._make(layers, config, context)((), ())
    fp8 = {"enabled": (False, True, False), "recipe": None, "amax_reduction_group": "group"}
    assert asked == [{"allow_unused_input": True, **fp8}, {"allow_unused_input": True}]


def test_replays_run_no_python() -> None:
    """The stand-in itself: new input, the old code's constants; overwritten and poisoned memory."""

    class Scaled(torch.nn.Linear):
        by = 2.0

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
            return ((super().forward(x) * self.by).sin(),)

    part = Scaled(3, 3)
    [graph] = make_graphed_callables([part], [(torch.zeros(2, 3, requires_grad=True),)])
    assert isinstance(graph, Replayed)
    x, other = torch.randn(2, 3, requires_grad=True), torch.randn(2, 3)
    part.by = 5.0
    (got,), want = graph(x), torch.sin(torch.nn.functional.linear(x, part.weight, part.bias) * 2.0)
    assert torch.equal(got, want)
    [dx], [right] = torch.autograd.grad(got.sum(), x), torch.autograd.grad(want.sum(), x)
    assert torch.equal(dx, right)
    assert got.isnan().all(), "after its backward pass"
    (late,) = graph(x)
    graph(other)  # before the backward pass
    assert not torch.equal(torch.autograd.grad(late.sum(), x)[0], right)
