"""The same step on several GPUs as on one."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from models import VOCAB, small
from needs import gpus, wheel
from processes import on_gpus
from train.engine import Case, assemble, run, worst

NOISE = 2e-4
"""float32 on GPUs: products of other shapes take other kernels."""
SPLIT = {"tensor": 2, "sequence": True}
GRIDS: dict[int, list[dict[str, Any]]] = {
    2: [{}, {"tensor": 2}, SPLIT, {"pipeline": 2}, {"pipeline": 2, "virtual": 2}],
    4: [SPLIT, {**SPLIT, "pipeline": 2, "virtual": 2}, {"pipeline": 4}],
    8: [SPLIT, {**SPLIT, "pipeline": 2}, {"tensor": 4, "sequence": True}],
}


@pytest.mark.parametrize("world", list(GRIDS))
def test_grids(world: int, tmp_path: Path) -> None:
    gpus(world)
    case = small(tmp_path, dtype="float32", distributed=False, steps=2)
    [[single]] = on_gpus(1, run, [case])
    cases = [replace(case, **layout) for layout in GRIDS[world]]
    results = on_gpus(world, run, cases)
    for index, layout in enumerate(GRIDS[world]):
        ranks = [rank[index] for rank in results]
        assert [s.loss for s in ranks[0]["sums"]] == pytest.approx([s.loss for s in single["sums"]], rel=NOISE), layout
        for what in ("gradients", "weights"):
            difference, name = worst(assemble(ranks, what, VOCAB), assemble([single], what, VOCAB))
            assert difference < NOISE, f"{layout}: {what}: {name} differs by {difference:.1e}"


def test_overlapped_reductions_and_gathers(tmp_path: Path) -> None:
    gpus(2)
    case = small(tmp_path, dtype="float32", bucket_size=50_000)
    [one, other] = on_gpus(2, run, [case, replace(case, overlap=True)])[0]
    # gradients are added up bucket by bucket, in another order
    assert [s.loss for s in other["sums"]] == pytest.approx([s.loss for s in one["sums"]], rel=NOISE)
    assert other["grad_norms"] == pytest.approx(one["grad_norms"], rel=NOISE)


@pytest.mark.parametrize("fp8", [False, True])
def test_overlap_inside_products(fp8: bool, tmp_path: Path) -> None:
    """Transformer Engine's user buffers give the numbers of plain gathers and reductions."""
    wheel("transformer_engine")
    gpus(2)
    case = small(tmp_path, tensor=2, sequence=True, steps=2)
    if fp8:
        case = replace(case, model_options={"fp8_format": "hybrid"})
    [plain] = on_gpus(2, run, [case])[0]
    [overlapped] = on_gpus(2, with_user_buffers, case)[0]
    assert [s.loss for s in overlapped["sums"]] == pytest.approx([s.loss for s in plain["sums"]], abs=2e-2)
    assert overlapped["grad_norms"] == pytest.approx(plain["grad_norms"], rel=2e-2)


def with_user_buffers(device, case: Case):
    from megadpo.parallel.user_buffers import start_user_buffers

    overlapped = replace(case, tp_overlap=True)
    start_user_buffers(overlapped.parallel, case.budget.tokens, 256, fp8=bool(case.model_options))
    return run(device, [overlapped])
