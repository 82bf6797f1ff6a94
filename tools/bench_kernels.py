"""Time and memory of the head, forward and backward, beside the bare matrix products that it cannot do without.

    python tools/bench_kernels.py                    on this machine's GPU, or its CPU where it has none
    python tools/bench_kernels.py --device cpu --output tools/results/kernels-cpu.md

Every implementation gets the same inputs in one process. One that is not installed, or that runs out of memory, says so
in its row. Times are medians: of the clock on a GPU, of the processor (one thread) on a CPU, which other load moves
less. Memory is the most that was allocated over the inputs.
"""

from __future__ import annotations

import argparse
import importlib
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from megadpo_kernels import Backend, VocabShard, gemm, linear_logprob, response_sums, triton_problem
from torch.nn.functional import logsigmoid
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).resolve().parents[1]
Logprob = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
PAIRS = 4
"""Preference pairs that the rows make where a loss is computed."""
LIMIT = "1.12 / 1.08"
"""Goals, forward and both, of the bare products, from 4096 rows and a hidden size of 4096 on."""


@dataclass(frozen=True)
class Shape:
    name: str
    rows: int
    hidden: int
    vocab: int
    """Of one tensor-parallel rank."""


GPU_SHAPES = (
    Shape("8B, TP1", 4096, 4096, 128256),
    Shape("8B, TP1", 16384, 4096, 128256),
    Shape("70B, TP8", 8192, 8192, 16032),
)
CPU_SHAPES = (Shape("small", 1024, 256, 32000), Shape("many rows", 4096, 64, 32000))


@dataclass(frozen=True)
class Inputs:
    hidden: torch.Tensor
    weight: torch.Tensor
    targets: torch.Tensor
    upstream: torch.Tensor


@dataclass(frozen=True)
class Row:
    name: str
    forward_ms: float | None
    both_ms: float | None
    mebibytes: float | None
    note: str = ""


def inputs(shape: Shape, device: torch.device, dtype: torch.dtype) -> Inputs:
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, device=device)

    hidden = (normal(shape.rows, shape.hidden) * shape.hidden**-0.5).to(dtype).requires_grad_()
    weight = normal(shape.vocab, shape.hidden).to(dtype).requires_grad_()
    targets = torch.randint(0, shape.vocab, (shape.rows,), generator=generator, device=device)
    return Inputs(hidden, weight, targets, normal(shape.rows))


def median_ms(call: Callable[[], object], device: torch.device, repeats: int) -> float:
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    times = []
    for _ in range(repeats + 1):
        _wait(device)
        start = clock()
        call()
        _wait(device)
        times.append((clock() - start) * 1e3)
    return statistics.median(times[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """Most bytes alive at once during the call, over what was there before it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        call()
    alive = highest = 0
    for event in record.profiler.kineto_results.events():
        if event.name() == "[memory]":
            alive += event.nbytes()
            highest = max(highest, alive)
    return highest


def measure(name: str, given: Inputs, logprob_of: Logprob, repeats: int) -> Row:
    """One implementation: (hidden, weight) -> per-token log-probability, or a scalar made of it."""
    device = given.hidden.device

    def forward() -> torch.Tensor:
        return logprob_of(given.hidden, given.weight)

    def both() -> None:
        given.hidden.grad = given.weight.grad = None
        result = forward()
        result.backward(given.upstream.to(result.dtype) if result.dim() else None)

    def forward_only() -> None:
        with torch.no_grad():
            forward()

    try:
        times = median_ms(forward_only, device, repeats), median_ms(both, device, repeats)
        given.hidden.grad = given.weight.grad = None
        return Row(name, *times, peak_bytes(both, device) / 2**20)
    except torch.OutOfMemoryError:
        return Row(name, None, None, None, "out of memory")
    finally:
        given.hidden.grad = given.weight.grad = None
        if device.type == "cuda":
            torch.cuda.empty_cache()


def bare_products(given: Inputs, repeats: int) -> list[Row]:
    """The floor: the products alone, chunked as the head chunks them, with nothing between them."""
    from megadpo_kernels.logprob import limits

    device, x, w = given.hidden.device, given.hidden.detach(), given.weight.detach()
    chunk, _ = limits(len(w), device)
    logits = torch.empty(chunk, len(w), device=device)
    slope = torch.zeros(chunk, len(w), device=device, dtype=x.dtype)
    total = torch.zeros(w.shape, device=device)

    def products(first: int, others: int) -> None:
        for at in range(0, len(x), chunk):
            part = x[at : at + chunk]
            for _ in range(first):
                gemm.logits_into(logits[: len(part)], part, w)
            for _ in range(others):
                gemm.hidden_gradient(slope[: len(part)], w)
                gemm.add_weight_gradient(total, slope[: len(part)], part)

    forward = median_ms(lambda: products(1, 0), device, repeats)
    return [
        Row("bare products, logits kept (6NDV)", forward, median_ms(lambda: products(1, 1), device, repeats), None),
        Row("bare products, logits twice (8NDV)", forward, median_ms(lambda: products(2, 1), device, repeats), None),
    ]


def implementations(given: Inputs) -> list[tuple[str, Logprob | str]]:
    """Name, and the function or why it is not there."""
    shard, targets = VocabShard(0, len(given.weight), None), given.targets
    device = given.hidden.device
    found: list[tuple[str, Logprob | str]] = []
    backends: tuple[Backend, ...] = ("triton", "chunked", "reference")
    for backend in backends:
        problem = triton_problem(device) if backend == "triton" else None
        for kept, size in (("kept", 2**40), ("twice", 0), ("default", None)):
            if backend == "reference" and kept != "default":
                continue

            def ours(x: torch.Tensor, w: torch.Tensor, b=backend, s=size) -> torch.Tensor:  # type: ignore[no-untyped-def]
                return linear_logprob(x, w, targets, shard, backend=b, cache_bytes=s)

            found.append((f"megadpo {backend}, logits {kept}", problem or ours))
        found.append((f"megadpo {backend}, DPO loss", problem or _dpo(shard, targets, backend)))
    found.append(("unfused torch", lambda x, w: (x @ w.t()).float().log_softmax(-1).gather(1, targets[:, None])[:, 0]))
    found.append(("torch linear_cross_entropy (sum)", _torch_fused(targets)))
    found.append(("Apple CCE", _cce(targets)))
    found.append(("Liger fused linear cross-entropy (sum)", _liger(targets)))
    found.append(("Liger fused linear DPO loss", _liger_dpo(targets)))
    return found


def _dpo(shard: VocabShard, targets: torch.Tensor, backend: Backend) -> Logprob:
    """Log-probabilities, sums of 2 PAIRS responses of the same length, loss; reference log-probabilities are 0."""
    lengths = torch.full((2 * PAIRS,), len(targets) // (2 * PAIRS), device=targets.device)

    def loss(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        sums = response_sums(linear_logprob(x, w, targets, shard, backend=backend), lengths, backend)
        return -logsigmoid(0.1 * (sums[:PAIRS] - sums[PAIRS:])).mean()

    return loss


def _liger_dpo(targets: torch.Tensor) -> Logprob | str:
    """The same loss: its batch has all chosen responses first, then the rejected ones."""
    try:
        module = importlib.import_module("liger_kernel.chunked_loss")
    except ImportError:
        return "not installed"
    loss = module.LigerFusedLinearDPOLoss(beta=0.1, use_ref_model=False)
    return lambda x, w: loss(w, x.view(2 * PAIRS, -1, x.shape[1]), targets.view(2 * PAIRS, -1))[0]


def _torch_fused(targets: torch.Tensor) -> Logprob | str:
    function = getattr(torch.nn.functional, "linear_cross_entropy", None)
    if function is None:
        return "not in this torch"
    return lambda x, w: -function(x, w, targets, reduction="sum")


def _cce(targets: torch.Tensor) -> Logprob | str:
    try:
        function = importlib.import_module("cut_cross_entropy").linear_cross_entropy
    except ImportError:
        return "not installed"
    return lambda x, w: -function(x, w, targets, reduction="none", filter_eps=None)


def _liger(targets: torch.Tensor) -> Logprob | str:
    try:
        module = importlib.import_module("liger_kernel.transformers")
    except ImportError:
        return "not installed"
    loss = module.LigerFusedLinearCrossEntropyLoss(reduction="sum")
    return lambda x, w: -loss(w, x, targets)


def table(shape: Shape, dtype: torch.dtype, rows: list[Row]) -> str:
    flops = 2 * shape.rows * shape.hidden * shape.vocab
    logits = shape.rows * shape.vocab * 4 / 2**20
    kind = str(dtype).removeprefix("torch.")
    kept, twice = (row for row in rows if row.name.startswith("bare"))

    def cell(value: float | None, digits: int = 1) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    lines = [
        f"## {shape.name}: N = {shape.rows}, D = {shape.hidden}, V = {shape.vocab}, {kind}",
        "",
        f"One product is {flops / 1e12:.3g} TFLOP; float32 logits of all rows are {logits:.0f} MiB.",
        "",
        "| | forward ms | both ms | forward / bare | both / bare | limit | TFLOP/s (6NDV) | peak MiB | |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        floor = twice if "logits twice" in row.name else kept
        forward, both = (
            mine / least if mine and least else None
            for mine, least in ((row.forward_ms, floor.forward_ms), (row.both_ms, floor.both_ms))
        )
        goal = LIMIT if row.name.startswith("megadpo") and min(shape.rows, shape.hidden) >= 4096 else "-"
        speed = 3 * flops / row.both_ms / 1e9 if row.both_ms else None
        lines.append(
            f"| {row.name} | {cell(row.forward_ms)} | {cell(row.both_ms)} | {cell(forward, 2)} | {cell(both, 2)} "
            f"| {goal} | {cell(speed, 2)} | {cell(row.mebibytes, 0)} | {row.note} |"
        )
    return "\n".join(lines) + "\n"


def machine(device: torch.device) -> str:
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    what = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    try:
        triton = importlib.import_module("triton").__version__
    except ImportError:
        triton = "none"
    versions = f"torch {torch.__version__}, triton {triton}, Python {platform.python_version()}"
    return f"{what}; {versions}; commit {commit or 'unknown'}; {time.strftime('%Y-%m-%d')}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, help="also write the tables to this file")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if device.type == "cpu":
        torch.set_num_threads(1)
    parts = [f"# The head: {machine(device)}\n"]
    for shape in GPU_SHAPES if device.type == "cuda" else CPU_SHAPES:
        given = inputs(shape, device, dtype)
        rows = bare_products(given, arguments.repeats)
        for name, function in implementations(given):
            if isinstance(function, str):
                rows.append(Row(name, None, None, None, f"not measured: {function}"))
            else:
                rows.append(measure(name, given, function, arguments.repeats))
        parts.append(table(shape, dtype, rows))
        print(parts[-1], flush=True)
    if arguments.output:
        arguments.output.write_text("\n".join(parts))


if __name__ == "__main__":
    main()
