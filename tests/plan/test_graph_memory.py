"""What the planner says that CUDA graphs hold. tests/train/test_graphs.py compares it with a tape of a graph."""

from dataclasses import replace

import pytest
from ranks import LLAMA, MIXED, Case

from megadpo.config import ParallelConfig
from megadpo.plan.fp8_memory import HOPPER, Kept
from megadpo.plan.graph_memory import Graphed, graphed
from megadpo.plan.numbers import RankNumbers
from megadpo.plan.profile import rank_numbers
from megadpo.plan.stage import Layer, kind_of

TOKENS, HIDDEN, FFN = 512, 128, 384
SHORT = replace(LLAMA, num_layers=8, hidden_size=HIDDEN, ffn_hidden_size=FFN, num_attention_heads=4, kv_channels=32)
FP8 = Kept("tensorwise", gathered=False, one_copy=False)


def of_layer(layer: Layer, case: Case) -> Graphed:
    return graphed(kind_of(case.shape, case.config, layer, 1, False, False, TOKENS, 256, True))


def numbers(case: Case, scopes: tuple[str, ...], ranks: int, rank: int, micro_batches: int) -> RankNumbers:
    model = replace(case.config.model, cuda_graphs=scopes)
    return rank_numbers(case.shape, replace(case.config, model=model), ranks, rank, TOKENS, 256, micro_batches, HOPPER)


def test_of_a_dense_layer() -> None:
    """Input, the norm's output, both halves, their product, the output; and the gradient of the output. In FP8 inputs
    of both products are a byte, and the casts are as many as the weights in two orientations."""
    case = Case("", SHORT, ParallelConfig(), 1)
    plain, fp8 = of_layer(Layer(), case), of_layer(Layer(fp8=FP8), case)
    row = 2 * (3 * HIDDEN + 3 * FFN)
    assert plain.saved == pytest.approx(TOKENS * row, rel=0.01)
    assert (plain.held - plain.saved, plain.casts) == (TOKENS * 2 * HIDDEN, 0)
    assert fp8.saved == pytest.approx(TOKENS * (row - HIDDEN - FFN), rel=0.01)
    assert fp8.casts == 2 * (3 * HIDDEN * FFN + 2 * 4)
    assert fp8.held - fp8.saved == TOKENS * 2 * HIDDEN + fp8.casts


def test_of_a_layer_with_experts() -> None:
    """Without routed experts: less than half of a dense layer that has their width."""
    experts = replace(MIXED, hidden_size=HIDDEN, kv_channels=32, num_attention_heads=4)
    found = of_layer(Layer(experts=True), Case("", experts, ParallelConfig(), 1))
    assert experts.experts is not None
    outputs = 2 * 2 * HIDDEN  # input and norm's output, which are saved; the shared experts' is not
    shared = 2 * 3 * experts.experts.shared_ffn_hidden_size
    assert outputs + shared < found.saved / TOKENS < 1.6 * (outputs + shared)
    assert found.held > found.saved + 3 * TOKENS * 2 * HIDDEN, "gradients of three outputs, the shared experts' output"


@pytest.mark.parametrize("fp8", [None, "tensorwise"])
def test_of_a_rank(fp8: str | None) -> None:
    """Graphs of four micro-batches on the first of four stages, though the step has but one."""
    case = Case("", SHORT, ParallelConfig(1, 4), 4, fp8=fp8)
    layer = of_layer(Layer(fp8=Kept.of(case.config.model, HOPPER)), case)
    for rank, turns in ((0, 4), (2, 2)):
        plain, with_graphs = (numbers(case, scopes, 4, rank, 1).memory for scopes in ((), ("mlp",)))
        assert with_graphs.weights == plain.weights - 2 * layer.casts
        more = with_graphs.activations - plain.activations
        assert more == turns * (2 * layer.held + layer.working) - 2 * layer.saved
        assert numbers(case, ("moe_router",), 4, rank, 1).memory == plain, "a model without such layers"


def test_chunks_that_are_never_full_at_once() -> None:
    """Interleaved, 4, 4, 2 and 2 graphs of each chunk's layer, and 9 micro-batches of all chunks in flight."""
    case = Case("", SHORT, ParallelConfig(1, 2, virtual_pipeline_model_parallel_size=4), 2)
    layer = of_layer(Layer(), case)
    plain, with_graphs = (numbers(case, scopes, 2, 0, 8).memory for scopes in ((), ("mlp",)))
    assert with_graphs.total - plain.total == 12 * (layer.held + layer.working) - 9 * layer.saved
