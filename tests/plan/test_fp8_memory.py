"""What FP8 keeps, by recipe: figures by hand from what Transformer Engine's sources say."""

from dataclasses import replace

import pytest
from ranks import HELD_IN_FP8, MIXED, RESIDENT, WIDE, Case

from megadpo.config import ModelConfig, ParallelConfig
from megadpo.plan.dry_run import walk
from megadpo.plan.even import Load
from megadpo.plan.fp8_memory import HOPPER, Kept
from megadpo.plan.numbers import RankNumbers
from megadpo.plan.profile import rank_numbers
from megadpo.plan.stage import Layer, kind_of, measured

BLACKWELL = (10, 0)
RECIPES = ("delayed", "tensorwise", "blockwise", "mxfp8")
TOKENS = 512
SHORT = replace(WIDE, num_layers=2, ffn_hidden_size=768)
HIDDEN, FFN = 256, 768
MATRICES = 256 * (256 + 2 * 64) + 256 * 256 + 3 * 256 * 768
"""Numbers in the linear layers of one layer: queries, keys and values of 8 and 2 x 2 heads of 32, projection, MLP."""


def kept(recipe: str, capability: tuple[int, int] = HOPPER, weights: bool = False) -> Kept:
    model = ModelConfig("", fp8_format="hybrid", fp8_recipe=recipe, fp8_param_gather=weights)  # type: ignore[arg-type]
    found = Kept.of(model, capability)
    assert found is not None
    return found


def test_of_a_weight() -> None:
    """[512, 1024]: numbers, and scales: a float32, one for 128 x 128, or a byte for 32."""
    numbers, blocks, bytes_ = 512 * 1024, 4 * 4 * 8, 512 * 1024 // 32
    assert kept("tensorwise").beside(512, 1024, trained=True) == 2 * (numbers + 4)
    assert kept("delayed", BLACKWELL).beside(512, 1024, trained=True) == numbers + 4
    assert kept("blockwise", BLACKWELL).beside(512, 1024, trained=True) == 2 * (numbers + blocks)
    assert kept("mxfp8", BLACKWELL).beside(512, 1024, trained=True) == 2 * (numbers + bytes_)
    assert kept("blockwise").beside(512, 1024, trained=False) == numbers + blocks
    # in FP8 alone: one orientation lies in the buffer, MXFP8's does not
    assert kept("blockwise", weights=True).beside(512, 1024, trained=True) == numbers + 2 * blocks
    assert kept("tensorwise", BLACKWELL, weights=True).beside(512, 1024, trained=True) == 4
    assert kept("mxfp8", BLACKWELL, weights=True).beside(512, 1024, trained=True) == 2 * (numbers + bytes_)
    assert Kept.of(ModelConfig("", fp8_format="hybrid", fp8_emulation=True), HOPPER) is None


def numbers(
    recipe: str | None, capability: tuple[int, int] = HOPPER, weights: bool = False, ranks: int = 1, **more: object
) -> RankNumbers:
    case = Case("", SHORT, ParallelConfig(), 1, fp8=recipe, fp8_weights=weights, **more)  # type: ignore[arg-type]
    return rank_numbers(case.shape, case.config, ranks, 0, TOKENS, 256, 1, capability)


@pytest.mark.parametrize("recipe", ["delayed", "blockwise"])
def test_of_a_rank(recipe: str) -> None:
    plain, fp8 = numbers(None), numbers(recipe)
    casts = fp8.memory.weights - plain.memory.weights
    assert 2 * 2 * MATRICES < casts < 1.07 * 2 * 2 * MATRICES  # two layers, both orientations, scales
    for part in ("gradients", "optimizer"):
        assert getattr(fp8.memory, part) == getattr(plain.memory, part)
    assert fp8.parameters == plain.parameters


@pytest.mark.parametrize("recipe", RECIPES)
def test_of_a_layers_activations(recipe: str) -> None:
    """Between forward and backward, inputs of queries, keys and values, and of both products of the MLP, take a byte
    instead of two; that of the projection stays for attention, and delayed scaling has its cast beside it."""

    def saved(layer: Layer) -> int:
        config = Case("", SHORT, ParallelConfig(), 1).config
        return measured(kind_of(SHORT, config, layer, 1, False, False, TOKENS, 256, True)).saved.activations

    widths = HIDDEN + HIDDEN + FFN
    scales = {"blockwise": 4 * TOKENS // 128 * widths, "mxfp8": TOKENS // 32 * widths, "tensorwise": 12, "delayed": 16}
    beside = TOKENS * HIDDEN if recipe == "delayed" else 0
    assert saved(Layer()) - saved(Layer(fp8=kept(recipe))) == TOKENS * widths - beside - scales[recipe]


def test_weights_in_fp8() -> None:
    """Half of the gather, and of the weights one byte for each orientation instead of two beside two."""
    plain, casts, alone = (numbers(*given, ranks=4) for given in ((None,), ("blockwise",), ("blockwise", HOPPER, True)))
    assert casts.memory.weights - alone.memory.weights == pytest.approx(2 * 2 * MATRICES, rel=0.01)
    gathered = [{one.kind: one.bytes for one in n.collectives}["all_gather"] for n in (plain, alone)]
    assert gathered[0] - gathered[1] == pytest.approx(2 * MATRICES, rel=0.01)
    assert alone.memory.optimizer == pytest.approx(plain.memory.optimizer, rel=0.01)
    # MXFP8's travel as bfloat16, and what is no FP8 weight is there twice
    mx = numbers("mxfp8", BLACKWELL, True, ranks=4)
    assert {one.kind: one.bytes for one in mx.collectives}["all_gather"] == pytest.approx(gathered[0], rel=0.01)
    others = plain.parameters - 2 * MATRICES
    assert mx.memory.weights == pytest.approx(2 * 2 * MATRICES * 33 / 32 + 2 * 2 * others, rel=0.01)


def test_of_a_reference() -> None:
    plain = numbers(None, reference=RESIDENT).memory.reference
    assert numbers("delayed", reference=RESIDENT).memory.reference == plain
    assert numbers("tensorwise", reference=RESIDENT).memory.reference == plain + 2 * (MATRICES + 4 * 4)
    held = numbers(None, reference=HELD_IN_FP8).memory.reference
    assert numbers("blockwise", reference=HELD_IN_FP8).memory.reference == held


CASES = [
    Case("recompute none", SHORT, ParallelConfig(2, sequence_parallel=True), 2, fp8="tensorwise"),
    Case("recompute full", SHORT, ParallelConfig(1, 2), 2, fp8="delayed", recompute="full"),
    Case(
        "experts",
        replace(MIXED, hidden_size=256, kv_channels=64, vocab_size=512),
        ParallelConfig(expert_model_parallel_size=2),
        2,
        fp8="blockwise",
        reference=RESIDENT,
    ),
]


@pytest.mark.parametrize(
    "case", [CASES[0], *(pytest.param(case, marks=pytest.mark.slow) for case in CASES[1:])], ids=lambda case: case.name
)
def test_the_short_way_is_the_long_way(case: Case) -> None:
    load = Load(tokens=TOKENS, scored=256, micro_batches=2)
    short = rank_numbers(case.shape, case.config, case.ranks, 0, load.tokens, load.scored, 2)
    long = walk(case.shape, case.config, case.ranks, 0, load).numbers
    assert (short.memory.weights, short.memory.reference) == (long.memory.weights, long.memory.reference)
    assert short.flops == pytest.approx(long.flops, rel=1e-12)
    assert short.memory.total == pytest.approx(long.memory.total, rel=0.03)
