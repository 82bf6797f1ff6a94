"""Find the block sizes of the head's row kernels on this machine's GPU and add them to the table of the package.

    python tools/tune_kernels.py --columns 16032 32000 128256 --rows 2048 [--write]

Every candidate is timed on float32 logits of rows x columns, once it was found to give the numbers of the torch code.
The best of each kernel, and for the slopes of each dtype, becomes a row for this architecture that holds up to so many
columns. Commit the table: kernels
never tune themselves while ranks train.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from pathlib import Path

import torch
from bench_kernels import median_ms
from megadpo_kernels import configs, rows
from megadpo_kernels.configs import KernelConfig
from megadpo_kernels.shard import PLAIN
from torch import Tensor

BLOCKS = (1024, 2048, 4096, 8192)
WARPS = (4, 8, 16)
SLOPES = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 1e-5}
"""How far, relatively, a slope may be from the torch code's: one step of the dtype where both round."""


def candidates(kernel: str, arch: str, columns: int, dtype: str = "any") -> Iterable[KernelConfig]:
    """At least 8 and at most 32 elements a thread: fewer waste 16-byte stores of 2-byte slopes, more spill."""
    for block in BLOCKS:
        for warps in WARPS:
            if 8 <= block // (32 * warps) <= 32:
                yield KernelConfig(kernel, arch, columns, block, warps, dtype)


def merged(table: Iterable[KernelConfig], found: Iterable[KernelConfig]) -> list[KernelConfig]:
    """The table with `found` in place of rows for the same kernel, architecture, dtype and size; "any" stays
    last."""
    new = {(row.kernel, row.arch, row.dtype, row.up_to): row for row in [*table, *found]}
    return sorted(new.values(), key=lambda row: (row.kernel, row.arch == "any", row.arch, row.dtype, row.up_to))


def write_table(path: Path, table: Iterable[KernelConfig]) -> None:
    """One row on a line; written beside the table and then renamed."""
    lines = ",\n ".join(json.dumps(asdict(row)) for row in table)
    beside = path.with_suffix(".new")
    beside.write_text(f"[\n {lines}\n]\n")
    os.replace(beside, path)


def best(
    options: Iterable[KernelConfig], run: Callable[[KernelConfig], object], device: torch.device
) -> tuple[KernelConfig, float]:
    """The fastest and its milliseconds."""
    times = [(median_ms(lambda row=row: run(row), device, repeats=20), row) for row in options]  # type: ignore[misc]
    for milliseconds, row in times:
        sizes = f"{row.up_to} columns, block {row.block}, {row.warps} warps"
        print(f"  {row.kernel} ({row.dtype}), {sizes}: {milliseconds:.3f} ms")
    milliseconds, row = min(times, key=lambda pair: pair[0])
    return row, milliseconds


def tune(columns: int, count: int, device: torch.device) -> list[KernelConfig]:
    """The best rows for row_stats, and for slope in every dtype, at this many columns. AssertionError where a candidate
    gives other numbers than the torch code."""
    from megadpo_kernels import rows_triton

    arch = configs.architecture(device)
    generator = torch.Generator(device).manual_seed(0)
    padded = -(-columns // 16) * 16
    logits = torch.randn(count, padded, generator=generator, device=device) * 3
    targets = torch.randint(0, columns, (count,), generator=generator, device=device)
    upstream = torch.randn(1, count, generator=generator, device=device)
    stats, want = (torch.empty(3, count, device=device) for _ in range(2))
    rows.row_stats(want, logits, columns, targets, PLAIN)
    _, normaliser, _ = rows.combine(want[None])

    def use(row: KernelConfig) -> None:
        configs.shipped = lambda: (row,)  # type: ignore[assignment]

    def run_stats(row: KernelConfig) -> None:
        use(row)
        rows_triton.row_stats(stats, logits, columns, targets, PLAIN)

    def run_slope(row: KernelConfig) -> Tensor:
        use(row)
        scratch.copy_(logits)
        dtype = getattr(torch, row.dtype)
        return rows_triton.slope(scratch, columns, targets, normaliser, upstream, None, PLAIN, dtype)

    scratch = torch.empty_like(logits)
    choices = list(candidates("row_stats", arch, columns))
    for row in choices:
        run_stats(row)
        torch.testing.assert_close(stats, want, atol=1e-4, rtol=1e-5)
    found = [report(*best(choices, run_stats, device), logits.nbytes)]
    for dtype, tolerance in SLOPES.items():
        true = rows.slope(logits.clone(), columns, targets, normaliser, upstream, None, PLAIN, dtype)
        choices = list(candidates("slope", arch, columns, str(dtype).removeprefix("torch.")))
        for row in choices:
            torch.testing.assert_close(run_slope(row), true, atol=1e-7, rtol=tolerance)
        # logits are read, the slopes written; and the time here holds a copy of the logits
        moved = logits.nbytes * (3 + dtype.itemsize / 4)
        found.append(report(*best(choices, run_slope, device), moved))
    return found


def report(row: KernelConfig, milliseconds: float, moved: float) -> KernelConfig:
    """The row, printed. moved: bytes."""
    rate = moved / milliseconds / 1e6
    print(f"{row.kernel} ({row.dtype}): block {row.block}, {row.warps} warps, {rate:.0f} GB/s")
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--columns", type=int, nargs="+", default=[16032, 32000, 128256])
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--write", action="store_true", help="change the package's table; otherwise only print")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no GPU here: block sizes can only be measured on the device they are for")
    shipped = configs.shipped()
    found = [row for columns in arguments.columns for row in tune(columns, arguments.rows, torch.device("cuda"))]
    largest = max(arguments.columns)
    # the largest size also serves everything over it
    found = [replace(row, up_to=2**31 - 1) if row.up_to == largest else row for row in found]
    if arguments.write:
        write_table(configs.TABLE, merged(shipped, found))
        print(f"{configs.TABLE}: run `pytest tests/kernels/test_compile.py` before committing it")


if __name__ == "__main__":
    main()
