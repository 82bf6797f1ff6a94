"""plan.profile.rank_numbers with short stages by closed forms instead of measured ones: a dense model, good enough to
test what is built on it, in milliseconds whatever its size."""

from contextlib import ExitStack
from functools import lru_cache
from typing import Any
from unittest.mock import patch

from megadpo.plan import profile
from megadpo.plan.buckets import Weight
from megadpo.plan.graph_memory import Graphed
from megadpo.plan.numbers import Collective, RankNumbers
from megadpo.plan.stage import Frozen, Pass, Stage, StageKind, Working

LOGITS = Working(logits=2**31)


@lru_cache
def stage(kind: StageKind) -> Stage:
    """As stage.measured."""
    shape, grid, tokens = kind.shape, kind.parallel, kind.tokens
    tensor = grid.tensor_model_parallel_size
    layers = shape.num_layers // grid.pipeline_model_parallel_size
    layer = Weight(int(shape.linear_multiplications) // tensor, expert=False, shared=False, summed=False)
    end = Weight(shape.vocab_size * shape.hidden_size // tensor, expert=False, shared=False, summed=False)
    row = 2 * shape.hidden_size // (tensor if grid.sequence_parallel else 1)
    of_row = {"none": 17 if grid.sequence_parallel else 9, "selective": 15 if grid.sequence_parallel else 8, "full": 1}
    kept = Working(layers * tokens * row * of_row[kind.model.recompute])
    in_layer = Working(tokens * row * 17)
    fullest = kept + in_layer + (LOGITS if kind.last else Working())
    calls: list[tuple[Collective, ...]] = []
    for forward in (True, False):
        again = 2 if kind.model.recompute == "full" and not forward else 0
        gathers, sums = (2, 2) if forward else (4 + again, 2 + again)
        counts = {"all_gather": gathers, "reduce_scatter": sums} if grid.sequence_parallel else {"all_reduce": sums}
        size = layers * tokens * shape.hidden_size * 2
        calls.append(tuple(Collective(name, "tensor", tensor, layers * n, n * size) for name, n in counts.items()))
    return Stage(
        weights=(*[end] * kind.first, *[layer] * layers, *[end] * kind.last),
        in_layer=(*[False] * kind.first, True, *[False] * (layers - 1), *[False] * kind.last),
        buffer_bytes=0,
        saved=kept,
        forward=Pass(fullest, calls[0], 0.0),
        backward=Pass(fullest, calls[1], 0.0),
        scoring=in_layer,
        buffers=2**30,
    )


@lru_cache
def frozen(kind: StageKind, fp8_weights: bool) -> Frozen:
    """As stage.frozen; the weights in bfloat16."""
    found = stage(kind)
    sizes = [(inside, 2 * weight.size) for inside, weight in zip(found.in_layer, found.weights, strict=True)]
    return Frozen(sum(size for inside, size in sizes if inside), sum(size for inside, size in sizes if not inside))


@lru_cache
def graphed(kind: StageKind) -> Graphed:
    """As graph_memory.graphed: of a layer's memory a half is captured."""
    saved = stage(kind).saved.activations // 2
    return Graphed(saved, saved + saved // 8, saved // 2, 0)


def count(*what: Any) -> RankNumbers:
    closed = (("measured", stage), ("frozen", frozen), ("graphed", graphed))
    with ExitStack() as stack:
        for name, instead in closed:
            stack.enter_context(patch.object(profile, name, instead))
        return REAL(*what)


REAL = profile.rank_numbers
"""As it was before a test puts `count` in its place."""
