"""What only a real device shows, of everything but Transformer Engine and the kernels: `make test-gpu`.

Ranks are spawned, as CUDA wants it, and those of the CPU's side of a comparison are shown no device.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from device import needs_gpus, on
from tiny import random_groups, write_llama
from train.engine import Case, Piece, assemble, run, worst

from megadpo.cli import main
from megadpo.data.batch import pack, stream_tokens
from megadpo.data.packing import Budget
from megadpo.model.attention import SegmentAttention, stream_params, varlen_lacks

pytestmark = pytest.mark.gpu

VOCAB = 67
WORDS = dict[str, Any]


# Attention ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("share", [True, False])
def test_one_call_attention_is_as_near_to_float32_as_segment_by_segment(share: bool, window: int | None) -> None:
    """Output and gradients, in bfloat16, with padding behind: no further from sdpa in float32 than twice what sdpa in
    bfloat16 is, and one unit of bfloat16."""
    needs_gpus(1)
    if missing := varlen_lacks():
        pytest.skip(f"varlen_attn of torch {torch.__version__} has no {', '.join(missing)}")
    device = torch.device("cuda", 0)
    store = random_groups(9, responses=3, longest_prompt=90, longest_response=150)
    rows = int(stream_tokens(store, share).sum())
    batch = pack(store, range(len(store)), rows + 100, None, share).to(device)
    generator = torch.Generator(device).manual_seed(0)

    def normal(heads: int) -> torch.Tensor:
        return torch.randn(rows + 100, 1, heads, 64, generator=generator, device=device).bfloat16()

    query, key, value, upstream = normal(8), normal(2), normal(2), normal(8)[:rows].flatten(1)

    def attended(backend: str, dtype: torch.dtype) -> list[torch.Tensor]:
        inputs = [x.to(dtype).requires_grad_() for x in (query, key, value)]
        attention = bare_attention(backend, window)
        output = attention(*inputs, None, packed_seq_params=stream_params(batch, backend, window))[:rows, 0]
        output.backward(upstream.to(dtype))
        return [output.detach().float(), *(x.grad[:rows].float() for x in inputs if x.grad is not None)]

    exact = attended("sdpa", torch.float32)
    plain, one_call = attended("sdpa", torch.bfloat16), attended("varlen", torch.bfloat16)
    for name, want, usual, got in zip(("output", "dq", "dk", "dv"), exact, plain, one_call, strict=True):
        assert torch.isfinite(got).all(), name
        unit = float(want.abs().max()) * 2**-8
        assert float((got - want).abs().max()) <= 2 * float((usual - want).abs().max()) + unit, name


def bare_attention(backend: str, window: int | None) -> SegmentAttention:
    """The module without a model around it."""
    attention = SegmentAttention.__new__(SegmentAttention)
    torch.nn.Module.__init__(attention)
    attention.backend, attention.kernels, attention.window = backend, "auto", window
    attention.softmax_scale, attention.soft_cap, attention.softmax_offset = None, None, None
    return attention


# Training ----------------------------------------------------------------------------------------------------


def trained(device: torch.device, cases: list[Case]) -> list[WORDS]:
    """`engine.run`, its tensors brought to the host."""
    results = run(device, cases)
    for result in results:
        for what in ("gradients", "weights"):
            result[what] = {k: Piece(p.shape, p.offset, p.data.cpu()) for k, p in result[what].items()}
    return results


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = write_llama(tmp_path_factory.mktemp("llama"), layers=5, vocab=VOCAB, bias=True)
    return Case(folder, random_groups(19, vocab=VOCAB), steps=6, distributed=True)


@pytest.fixture(scope="module")
def exact(case: Case) -> WORDS:
    """The same training on a CPU in float32."""
    [[result]] = on("cpu", 1, trained, [case])
    return result


def losses(result: WORDS) -> np.ndarray:
    return np.array([sums.loss for sums in result["sums"]])


def test_float32_training_is_that_of_the_cpu(case: Case, exact: WORDS) -> None:
    """Losses, the first gradients, the final weights; products are in float32 on both."""
    needs_gpus(1)
    [[result]] = on("cuda", 1, trained, [case])
    np.testing.assert_allclose(losses(result), losses(exact), rtol=1e-4)
    np.testing.assert_allclose(result["column"], exact["column"], atol=1e-3)
    for what in ("gradients", "weights"):
        difference, name = worst(assemble([result], what, VOCAB), assemble([exact], what, VOCAB))
        assert difference < 1e-3, f"{what}: {name} differs by {difference:.1e}"


def test_bfloat16_training_stays_as_near_as_a_cpus(case: Case, exact: WORDS) -> None:
    """The whole trajectory of losses and gradient norms, and the first gradients, are no further from the CPU's
    float32 than twice what bfloat16 on the CPU is, and a hundredth of a nat."""
    needs_gpus(1)
    short = replace(case, dtype="bfloat16")
    [[usual]] = on("cpu", 1, trained, [short])
    [[result]] = on("cuda", 1, trained, [short])
    for name in (losses, lambda found: np.array(found["grad_norms"])):
        far = np.abs(name(result) - name(exact)).max()
        assert far <= 2 * np.abs(name(usual) - name(exact)).max() + 0.01 * np.abs(name(exact)).max()
    want = assemble([exact], "gradients", VOCAB)
    (far, name), (normal, _) = (worst(assemble([one], "gradients", VOCAB), want) for one in (result, usual))
    assert far <= 2 * normal, f"{name} differs by {far:.1e}, on a CPU by {normal:.1e}"


GRIDS = {
    2: [WORDS(tensor=2, sequence=True), WORDS(pipeline=2), WORDS(pipeline=2, virtual=2), WORDS(overlap=True)],
    4: [WORDS(tensor=2, pipeline=2), WORDS(tensor=2, sequence=True, overlap=True), WORDS(pipeline=4)],
}


@pytest.mark.parametrize("gpus", GRIDS)
def test_grids_over_nccl_are_one_gpu(case: Case, exact: WORDS, gpus: int) -> None:
    """Every grid's losses, gradient norms and weights in float32 are those of one rank."""
    needs_gpus(gpus)
    cases = [replace(case, steps=2, **grid) for grid in GRIDS[gpus]]
    [[single]] = on("cuda", 1, trained, [replace(case, steps=2, budget=Budget(400))])
    results = on("cuda", gpus, trained, cases)
    for index, grid in enumerate(GRIDS[gpus]):
        ranks = [rank[index] for rank in results]
        np.testing.assert_allclose(losses(ranks[0]), losses(single), rtol=1e-5, err_msg=str(grid))
        assert ranks[0]["grad_norms"] == pytest.approx(single["grad_norms"], rel=1e-4), grid
        # of gradients a rank has only what it reduces, with the distributed optimizer
        difference, name = worst(assemble(ranks, "weights", VOCAB), assemble([single], "weights", VOCAB))
        assert difference < 1e-4, f"{grid}: {name} differs by {difference:.1e}"


# Whole runs --------------------------------------------------------------------------------------------------


@pytest.fixture
def run_file(tmp_path: Path, shared: Path) -> Path:
    """Six steps in bfloat16 on one GPU, a checkpoint every three."""
    file = tmp_path / "run.yaml"
    file.write_text(
        f"run_dir: {tmp_path}/run\nmodel: {{path: {shared}/models/stories260k}}\n"
        f"data: {{train: {shared}/data/stories_pairs_train.jsonl, cache_dir: {tmp_path}/cache, num_proc: 1}}\n"
        "parallel: {data_parallel_size: 1}\nbatch: {global_batch_size: 8}\nexport: {enabled: false}\n"
        "optimizer: {learning_rate: 3.0e-4}\ntrain: {max_steps: 6, save_steps: 3, save_total_limit: 9}\n"
    )
    return file


def metrics(run_dir: Path) -> list[WORDS]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_a_run_goes_on_from_its_checkpoint(run_file: Path) -> None:
    """The steps behind a checkpoint are the same after a restart; MFU, memory and the rest of the log are there."""
    needs_gpus(1)
    run_dir = run_file.parent / "run"
    assert main(["train", str(run_file)]) == 0
    before = metrics(run_dir)
    newest = max(path for path in run_dir.rglob("step-*") if path.is_dir())
    shutil.rmtree(newest)
    assert main(["train", str(run_file)]) == 0
    after = metrics(run_dir)
    assert [record["step"] for record in after] == [1, 2, 3, 4, 5, 6]
    for name in ("loss", "grad_norm", "rewards/margins"):
        # atomics on the device may add in another order
        assert [r[name] for r in after] == pytest.approx([r[name] for r in before], rel=1e-2, abs=1e-4), name
    assert [record["num_tokens"] for record in after] == [record["num_tokens"] for record in before]
    for record in after:
        assert 0 < record["perf/peak_memory_gib"] < 100
        assert record["perf/tflops_per_gpu"] > 0
        if "perf/mfu" in record:
            assert 0 < record["perf/mfu"] < 1


def test_an_export_has_the_logits_that_were_trained(run_file: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """transformers loads what a GPU run exports, and its logits are those of the run's checkpoint."""
    needs_gpus(1)
    run_dir, out = run_file.parent / "run", run_file.parent / "out"
    assert main(["train", str(run_file)]) == 0
    capfd.readouterr()
    assert main(["export", str(run_dir), str(out), "--dtype", "float32", "--verify", "--tolerance", "1e-3"]) == 0
    assert "verify     equal: largest difference" in capfd.readouterr().out


def test_bench_measures_on_the_device(run_file: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Parts by the device's own clock sum to the step, and steps to the time by the host's."""
    needs_gpus(1)
    words = ["bench", str(run_file), "--steps", "4", "--warm-up", "2", "--json", "--synthetic", "--prompt", "60"]
    assert main([*words, "--response", "40", "data.max_length=200"]) == 0
    found = json.loads(capfd.readouterr().out.splitlines()[-1])
    [rank] = found["ranks"]
    assert sum(rank["parts"].values()) == pytest.approx(rank["step_seconds"], rel=1e-6)
    for part in ("forward", "head", "backward", "optimizer"):
        assert rank["parts"][part] > 0, part
    assert rank["peak_memory"] > 0
