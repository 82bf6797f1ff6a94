"""Seconds of a step: parts add up, and move the way they must."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from counted import count
from situations import candidate, config, search, with_experts
from tiny import random_groups

from megadpo.convert.shape import Window
from megadpo.data.packing import Budget
from megadpo.data.stream import Stream
from megadpo.model.flops import forward_flops
from megadpo.observe.gpus import GPUS
from megadpo.plan import constants
from megadpo.plan.grids import Candidate
from megadpo.plan.layers import Grid, linear_products
from megadpo.plan.machine import Device, wire
from megadpo.plan.search import Search
from megadpo.plan.time import Estimate, _stages, model_flops
from megadpo.plan.workload import Assumed, assumed, of_store
from megadpo.train.inputs import Shapes, read_shapes
from megadpo.train.speed import Meter

ON = {"overlap_grad_reduce": True, "overlap_param_gather": True}


def of(
    folder: Path, one: Candidate, gpus: int = 8, gpu: str = "h100-80gb", model: str = "llama3.1-8b", **sections: Any
) -> Estimate:
    return search(config(folder, model, **sections), gpus, gpu).estimate(one)


def test_parts_are_the_step(tmp_path: Path) -> None:
    ways = [
        candidate(),
        candidate(tensor=2, data=2, pipeline=2, sequence=True, recompute="full"),
        candidate(pipeline=4, virtual=4, data=2, recompute="selective", reference="resident"),
    ]
    for one in ways:
        how = of(tmp_path, one)
        assert sum(asdict(how.parts).values()) == how.step
        assert all(value >= 0 for value in asdict(how.parts).values())
        assert 0 < how.mfu < constants.GEMM_PEAK
        assert how.pairs_per_second == pytest.approx(64 / how.update)


def test_one_gpu_does_nothing_but_work(tmp_path: Path) -> None:
    """No waiting, no messages; and twice the micro-batches are twice the work."""
    alone = {"objective": {"loss_type": "sft"}, "batch": {"global_batch_size": 64, "micro_batch_size": 1}}
    twice = alone | {"batch": {"global_batch_size": 128, "micro_batch_size": 1}}
    one, two = (of(tmp_path, candidate(data=1), 1, **sections).parts for sections in (alone, twice))
    assert one.pipeline == one.data == one.tensor == one.reference == one.passes == one.recompute == 0
    assert two.layers == pytest.approx(2 * one.layers)
    assert two.optimizer == one.optimizer > 0


def test_more_costs_more(tmp_path: Path) -> None:
    base = of(tmp_path, candidate())
    assert of(tmp_path, candidate(recompute="selective")).step > base.step
    assert of(tmp_path, candidate(recompute="full")).step > of(tmp_path, candidate(recompute="selective")).step
    assert of(tmp_path, candidate(reference="resident")).step > 0.99 * base.step
    assert of(tmp_path, candidate(), model="llama3.1-70b").step > 5 * base.step
    assert of(tmp_path, candidate(), batch={"global_batch_size": 128}).step > base.step
    assert of(tmp_path, candidate(), gpu="a100-80gb").step > base.step > of(tmp_path, candidate(), gpu="b200").step
    assert of(tmp_path, candidate(), gpu="h200").step < base.step  # the same but for its memory's bandwidth
    assert of(tmp_path, candidate(), batch={"share_prompt": False}).step > base.step


def test_overlap_hides(tmp_path: Path) -> None:
    bare, overlapped = of(tmp_path, candidate(data=16), 16), of(tmp_path, candidate(data=16), 16, parallel=ON)
    assert 0 < overlapped.parts.data < bare.parts.data
    assert overlapped.parts.layers == bare.parts.layers


def test_sequence_parallelism_is_no_slower(tmp_path: Path) -> None:
    assert (
        of(tmp_path, candidate(tensor=8, data=1, sequence=True)).step <= of(tmp_path, candidate(tensor=8, data=1)).step
    )


def test_chunks_shorten_the_bubble(tmp_path: Path) -> None:
    plain = of(tmp_path, candidate(pipeline=4, data=2, tokens=4096))
    assert of(tmp_path, candidate(pipeline=4, data=2, tokens=4096, virtual=4)).parts.pipeline < plain.parts.pipeline


def test_the_head_is_on_the_last_stage_alone(tmp_path: Path) -> None:
    """The stage with the head is the one that has most to do where layers are even, and it alone has the part."""
    assert of(tmp_path, candidate(pipeline=4, data=2, tokens=4096)).parts.head > 0
    # 126 layers on 4 stages: 32 32 31 31, and a layer of this size is more than the head
    assert of(tmp_path, candidate(pipeline=4, data=2, tokens=4096), model="llama3.1-405b").parts.head == 0


def test_precomputed_reference_is_paid_once(tmp_path: Path) -> None:
    once = of(tmp_path, candidate())
    twice = of(tmp_path, candidate(), train={"num_train_epochs": 2})
    assert twice.parts.reference == pytest.approx(once.parts.reference / 2, rel=0.01)
    assert once.update == pytest.approx(once.step - once.parts.reference)
    resident = of(tmp_path, candidate(reference="resident"))
    assert resident.update == resident.step
    assert resident.parts.reference == pytest.approx(once.parts.reference, rel=0.01)  # no pipeline, no bubble
    swapped = of(tmp_path, candidate(reference="swapped"))
    assert resident.parts.reference < swapped.parts.reference < 1.5 * resident.parts.reference  # the copy
    stages = candidate(pipeline=4, data=2, tokens=4096)
    in_step, before = (of(tmp_path, replace(stages, reference=mode)) for mode in ("resident", "precomputed"))
    assert before.parts.reference < in_step.parts.reference  # fills the pipeline once for several steps
    assert of(tmp_path, candidate(), objective={"loss_type": "simpo"}).parts.reference == 0


def test_fp8(tmp_path: Path) -> None:
    plain = of(tmp_path, candidate())
    given = config(tmp_path)
    recipes = {
        name: search(replace(given, model=replace(given.model, fp8_format="hybrid", fp8_recipe=name)), 8)
        .estimate(candidate())
        .parts
        for name in constants.FP8_PEAK
    }
    for parts in recipes.values():
        assert plain.parts.layers / 2 < parts.layers < plain.parts.layers
        assert parts.attention == plain.parts.attention
        assert parts.head == plain.parts.head
    assert recipes["delayed"].layers < recipes["tensorwise"].layers < recipes["blockwise"].layers
    ends = replace(given.model, fp8_format="hybrid", first_last_layers_bf16=True)
    assert search(replace(given, model=ends), 8).estimate(candidate()).parts.layers > recipes["tensorwise"].layers


def test_products_are_those_of_the_flops(tmp_path: Path) -> None:
    """What is timed is what MFU counts (model/flops.py), over the ranks that share it."""
    for model in ("llama3.1-8b", "llama3.1-405b", with_experts(tmp_path)):
        shape = read_shapes(config(tmp_path, model), 1).policy
        for tensor, expert in ((1, 1), (8, 1), *(((1, 8), (2, 8)) if shape.experts else ())):
            grid = Grid(tensor, expert, tensor > 1)
            products = linear_products(shape, grid, 8192, shape.experts is not None)
            flops = sum(2 * p.batches * p.rows * p.columns * p.inner for p in products)
            assert flops * tensor * shape.num_layers == pytest.approx(
                forward_flops(shape).forward(8192, 0, 0), rel=0.002
            )


def test_products_and_streams() -> None:
    device = Device(GPUS["h100-80gb"])
    peak = device.gpu.bf16_flops
    large = 2 * 8192**3 / device.product(8192, 8192, 8192) / peak
    assert 0.65 < large < constants.GEMM_PEAK
    assert 2 * 128 * 8192**2 / device.product(128, 8192, 8192) / peak < large / 2  # a small one is far from the peak
    sizes = [device.product(rows, 4096, 4096) for rows in (1, 64, 256, 1024, 4096, 16384)]
    assert sizes == sorted(sizes)
    one_row = 2 * 4096 * 4096
    assert device.product(1, 4096, 4096) >= device.stream(one_row)  # the weights are read


def test_attention_is_the_papers() -> None:
    """FlashAttention-3, figure 5 (causal, forward, heads of 128): TFLOP/s at these lengths, 16k tokens in all."""
    device = Device(GPUS["h100-80gb"])
    for length, published in {512: 292, 1024: 423, 2048: 521, 4096: 579, 8192: 602, 16384: 616}.items():
        area = 16384 * length / 2
        flops = 4 * 2048 * area
        assert flops / device.attention(flops, area, 16384) / 1e12 == pytest.approx(published, rel=0.15)


def test_wires() -> None:
    gpu = GPUS["h100-80gb"]
    inside, between = wire(gpu, 8, 1, 64), wire(gpu, 8, 8, 64)
    assert (inside.nodes, between.nodes) == (1, 8)
    size = 2**30
    gather = inside.seconds("all_gather", 1, size)
    assert gather - inside.start == pytest.approx(7 / 8 * size / (gpu.link_bandwidth * constants.LINK_SHARE))
    assert inside.seconds("all_reduce", 1, size) - inside.start == pytest.approx(2 * (gather - inside.start))
    assert between.seconds("all_gather", 1, size) > 5 * gather
    whole = wire(gpu, 64, 1, 64)  # eight NICs a node
    assert whole.bandwidth == pytest.approx(min(8 * between.bandwidth, inside.bandwidth))
    assert wire(gpu, 1, 1, 8).seconds("all_reduce", 3, size) == 0


def test_a_reference_of_another_size_is_timed_with_its_own_numbers(tmp_path: Path) -> None:
    given = config(tmp_path, reference={"mode": "swapped", "swap_steps": 1})
    found = search(given, 8)
    policy = found.space.shapes.policy
    large = replace(policy, num_layers=2 * policy.num_layers)
    mixed, alike = (
        Search(replace(found.space, shapes=shapes), found.lengths, count)
        for shapes in (Shapes(policy, large), Shapes(large, large))
    )
    resident, swapped = (candidate(tensor=2, data=4, sequence=True, reference=mode) for mode in ("resident", "swapped"))
    alone = alike.estimate(resident).parts.reference
    assert mixed.estimate(resident).parts.reference == pytest.approx(alone)
    copied = (
        alike.numbers(resident, 0).memory.weights / constants.HOST_BANDWIDTH - mixed.estimate(swapped).parts.optimizer
    )
    assert copied > 0
    assert mixed.estimate(swapped).parts.reference == pytest.approx(alone + copied)


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("window", [None, Window(5, (True, True, False, True) * 8)])
def test_operations_are_the_logs(tmp_path: Path, share: bool, window: Window | None) -> None:
    """MFU here is what the log will say of the same data: every layout, layers with a window or without."""
    given = config(tmp_path, batch={"global_batch_size": 8, "share_prompt": share})
    shape = replace(read_shapes(given, 1).policy, window=window)
    store = random_groups(40)
    meter = Meter(shape, Stream(store, Budget(64), 2, 1, share=share), 2, None)
    lengths = of_store(store, share, shape)
    flops = forward_flops(shape)
    ours_G = flops.forward(1, 0, 0) * lengths.useful_rows_G + flops.forward(0, 1, 0) * lengths.useful_area_G
    assert ours_G == pytest.approx(meter.useful_G)
    # of one group many times, so that it does not matter which are drawn; several micro-batches on two ranks
    alike = replace(
        lengths,
        **{name: np.repeat(value[:1], 40) for name, value in vars(lengths).items() if name.endswith("_G")},
    )
    found = search(given, 2)
    found = Search(replace(found.space, shapes=Shapes(shape, shape)), alike, count)
    one = candidate(data=2, tokens=2 * int(lengths.rows_G[0]))
    situation = found.situation(one)
    assert situation.work.micro_batches > 1
    useful = meter.useful([0] * 8, 8 * int(lengths.scored_G[0]))
    assert model_flops(situation) == pytest.approx(useful)
    how = found.estimate(one)
    assert how.mfu * how.update * 2 * found.space.gpu.bf16_flops == pytest.approx(useful)


def test_layers_with_a_window_are_timed_one_by_one(tmp_path: Path) -> None:
    """Two stages, all windows in the first: it alone has less attention, by the pairs inside the window."""
    given = config(tmp_path, batch={"global_batch_size": 8})
    shape = read_shapes(given, 1).policy
    data = Assumed(100, 2, 700, 700, 0.0)

    def of_stages(window: Window | None) -> list[float]:
        has = replace(shape, window=window)
        lengths = assumed(data, 2048, True, has)
        found = Search(replace(search(given, 2).space, shapes=Shapes(has, has)), lengths, count)
        one = candidate(pipeline=2, data=1, tokens=4096)
        situation = found.situation(one)
        stages = _stages(situation, [found.numbers(one, stage) for stage in (0, 1)])
        work = situation.work
        assert (work.most_window_area < work.most_area) == (window is not None)
        return [stage.attention for stage in stages]

    plain, windows = of_stages(None), of_stages(Window(128, (True,) * 16 + (False,) * 16))
    assert plain[0] == plain[1] == windows[1]
    # of 128 rows each but the first ones of the prompt and what both responses see of it, over whole triangles; short
    # segments run at less of the peak
    assert 0.1 * plain[0] < windows[0] < 0.6 * plain[0]
    assert of_stages(Window(128, (True,) * 32))[1] == windows[0]


def test_ends_of_the_pipeline_stand_far_apart(tmp_path: Path) -> None:
    """Four stages of two ranks are a node of eight: the first and the last share it; of eight stages they do not."""
    found = search(config(tmp_path), 8)
    assert found.situation(candidate(pipeline=4, data=2)).wire("embedding", 2).nodes == 1
    wide = search(config(tmp_path), 16)
    situation = wide.situation(candidate(pipeline=8, data=2))
    assert situation.wire("embedding", 2).nodes == 2  # ranks 0 and 14
    assert situation.wire("pipeline", 2).nodes == 1
