"""The numbers of the training log: operations as torch counts them, and rates that give back what they were made of."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from distributed import run_ranks
from families_table import COMMON, write
from tiny import MemoryStore, random_groups, write_llama
from torch.utils.flop_counter import FlopCounterMode

from megadpo.config import ModelConfig, ParallelConfig
from megadpo.convert.families import read_shape
from megadpo.convert.shape import ModelShape, Window
from megadpo.data.batch import attention_area, pack, stream_tokens
from megadpo.data.packing import Budget
from megadpo.data.stream import Stream
from megadpo.model.build import build_chunks
from megadpo.model.drawn import draw_weights
from megadpo.model.flops import TRAINING, attended_pairs, forward_flops
from megadpo.observe import gpus
from megadpo.parallel.context import grid
from megadpo.train.speed import Meter, peak_flops

FAMILIES = ("qwen3", "qwen3_moe", "deepseek_v2")
"""A dense one with windows; experts in some layers, a router; latent attention with shared experts."""


def rectangle(query: torch.Size, key: torch.Size, value: torch.Size, *args: object, **more: object) -> int:
    """Of an attention call as it runs here, every query with every key, masked or not: torch's counter has no formula
    for the CPU's kernel."""
    batch, heads, rows, width = query
    return 2 * batch * heads * rows * key[2] * (width + value[3])


def add_product(total: torch.Size, a: torch.Size, b: torch.Size, *args: object, **more: object) -> int:
    """Of addmm_, by which a head's weight gets its gradient: torch's counter knows only addmm."""
    return 2 * a[0] * a[1] * b[1]


MODEL = ModelConfig("", "float32", logprob_backend="chunked")
FUSED = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
FORMULAS = {FUSED: rectangle, torch.ops.aten.addmm_: add_product}


def counted(device: torch.device, folders: list[Path], store: MemoryStore) -> list[dict[str, int]]:
    """Operations of a forward pass of all groups, and of the backward pass behind it, by torch's own counter."""
    found: list[dict[str, int]] = []
    for folder in folders:
        shape = read_shape(folder)
        with grid(ParallelConfig(), device, seed=0) as context:
            [model] = build_chunks(shape, ParallelConfig(), context, MODEL)
            draw_weights([model], shape, 0, context)
            batch = pack(store, range(len(store)), int(stream_tokens(store).sum()), None)
            with FlopCounterMode(display=False, custom_mapping=FORMULAS) as forward:
                output = model(batch)
            with FlopCounterMode(display=False, custom_mapping=FORMULAS) as backward:
                output.logprob_N.sum().backward()
        operations = forward.get_flop_counts()["Global"]
        # heads of unequal widths have no fused kernel: their attention is two batched products
        fused, products = (operations.get(one, 0) for one in (FUSED, torch.ops.aten.bmm))
        found.append(
            {
                "forward": forward.get_total_flops(),
                "backward": backward.get_total_flops(),
                "attention": fused + products,
                "products": products,
                "rows": len(batch.tokens_T),
                "scored": len(batch.rows_N),
                "rectangle": sum(
                    (s.end - s.start) * (s.end - s.start + s.prefix_end - s.prefix_start) for s in batch.segments
                ),
            }
        )
    return found


def test_operations_are_those_that_torch_counts(tmp_path: Path) -> None:
    """Exactly, layer by layer of every kind. Attention is counted here as it runs, rectangles that a mask cuts in two;
    MFU counts the attended half. A backward pass has every product twice."""
    store = random_groups(6, vocab=int(COMMON["vocab_size"]), longest_prompt=13, longest_response=13)
    folders = [write_llama(tmp_path / "llama", vocab=101), *(write(name, tmp_path / name) for name in FAMILIES)]
    [every] = run_ranks(1, counted, folders, store)
    for folder, found in zip(folders, every, strict=True):
        flops = forward_flops(read_shape(folder))
        assert found["attention"] == flops.forward(0, found["rectangle"], 0), folder.name
        assert found["forward"] == flops.forward(found["rows"], found["rectangle"], found["scored"]), folder.name
        # the backward pass of the fused kernel is not in torch's table
        expected = 2 * (flops.forward(found["rows"], 0, found["scored"]) + found["products"])
        assert found["backward"] == expected, folder.name


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("window", [None, 1, 4, 100])
def test_attended_pairs_are_the_ones_of_the_mask(share: bool, window: int | None) -> None:
    store = random_groups(5, responses=3)
    for number in range(5):
        batch = pack(store, [number], int(stream_tokens(store, share)[number]), None, share)
        pairs = 0
        for segment in batch.segments:
            rows = range(segment.prefix_end - segment.prefix_start, segment.end - segment.prefix_end)
            rows = range(rows.start, rows.start + segment.end - segment.start)
            pairs += sum(min(row + 1, window or row + 1) for row in rows)
        assert attention_area(store, share, window=window)[number] == pairs


def shape_of(folder: Path, **changes: object) -> ModelShape:
    return replace(read_shape(write_llama(folder)), **changes)


def test_only_layers_with_a_window_count_less(tmp_path: Path) -> None:
    store = random_groups(4)
    shape = shape_of(tmp_path, window=Window(3, (True, False, False)))
    whole, inside = attention_area(store), attention_area(store, window=3)
    assert (inside < whole).any()
    assert attended_pairs(shape, store) == pytest.approx((2 * whole + inside) / 3)


def test_rates_give_back_what_they_were_made_of(tmp_path: Path) -> None:
    store, shape = random_groups(8), shape_of(tmp_path)
    stream = Stream(store, Budget(64), ranks=2, multiple=1)
    meter = Meter(shape, stream, ranks=4, peak=1e9)
    groups = np.arange(6)
    scored = int(store.response_lengths[:12].sum())
    bins = stream.bins(groups)
    record = meter.step(bins, scored, seconds=0.5, memory=3 * gpus.GIB)
    rows = int(stream_tokens(store)[:6].sum())
    assert record["tokens_per_second"] * record["seconds"] == record["num_tokens"] == rows
    assert record["scored_tokens_per_second"] * 0.5 == scored
    assert record["pairs_per_second"] * 0.5 == 6
    assert record["perf/tokens_per_second_per_gpu"] * 4 == record["tokens_per_second"]
    flops = forward_flops(shape)
    useful = TRAINING * flops.forward(rows, attention_area(store)[:6].sum(), scored)
    assert record["perf/tflops_per_gpu"] * 1e12 * 4 * 0.5 == pytest.approx(useful, rel=1e-12)
    assert record["perf/mfu"] == pytest.approx(useful / 0.5 / 4 / 1e9, rel=1e-12)
    assert record["perf/peak_memory_gib"] == 3
    assert record["padding_fraction"] > 0


def test_what_is_padded_or_repeated_is_no_useful_work(tmp_path: Path) -> None:
    """The same pairs are the same work, however they are laid out."""
    store, shape = random_groups(8), shape_of(tmp_path)
    done = []
    for stream in (
        Stream(store, Budget(64), ranks=1, multiple=1),
        Stream(store, Budget(999), ranks=1, multiple=1),
        Stream(store, Budget(64), ranks=1, multiple=1, share=False),
    ):
        record = Meter(shape, stream, 1, None).step(stream.bins(np.arange(8)), 50, 1.0, 0.0)
        assert "perf/mfu" not in record  # no peak is known: none is made up
        done.append(record["perf/tflops_per_gpu"])
    assert done[0] == done[1] == done[2]


def test_the_peak_is_of_a_known_device_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    assert peak_flops(torch.device("cpu"), "bfloat16") is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert peak_flops(torch.device("cuda", 0), "bfloat16") == 989.4e12
    assert peak_flops(torch.device("cuda", 0), "float32") is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA GeForce RTX 4090")
    assert peak_flops(torch.device("cuda", 0), "bfloat16") is None
