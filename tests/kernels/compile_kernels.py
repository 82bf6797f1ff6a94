"""Compile every shipped kernel configuration for the GPUs in the list, without one, and print what came out as JSON.

    python tests/kernels/compile_kernels.py [--all]

With --all every combination of flags for every GPU; without, what is rare for one GPU only.
Run as a program of its own: TRITON_INTERPRET must not be set when Triton is imported.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import triton
from megadpo_kernels import pairs_triton, prefix_triton, triton_kernels
from megadpo_kernels.configs import KernelConfig, shipped
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ARCHITECTURES = (80, 90, 100, 120)
RARE = (90,)
"""Where a rare combination is compiled unless all are asked for."""
TOOLS = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")
ALIGNED = [["tt.divisibility", 16]]
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


@dataclass(frozen=True)
class Variant:
    """One kernel with its types and compile-time numbers."""

    name: str
    types: dict[str, str]
    constants: dict[str, Any]
    warps: int
    aligned: tuple[str, ...]
    rare: bool = False


def pointers(names: str, kind: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), f"*{kind}")


NUMBERS = {"multiplier": "fp32", "soft_cap": "fp32", "coolness": "fp32"}


def variants(row: KernelConfig) -> Iterator[Variant]:
    """All that can be launched of a row. Types as torch gives them; `aligned` are the arguments that Triton finds
    divisible by 16 at run time."""
    kinds = [kind for kind, dtype in DTYPES.items() if row.dtype in (dtype, "any")]
    if row.kernel == "row_stats":
        for capped, extra in product((False, True), (0, 1, 2)):
            types = pointers("logits stats", "fp32") | pointers("targets", "i64") | NUMBERS
            types |= {"stride": "i32", "stats_stride": "i32", "columns": "i32"}
            constants = {"BLOCK": row.block, "CAPPED": capped, "EXTRA": extra}
            rare = (capped, extra) not in ((False, 0), (True, 1), (False, 2))
            yield Variant("row_stats_kernel", types, constants, row.warps, ("logits", "stride"), rare)
    elif row.kernel == "slope":
        for kind, capped, entropy in product(kinds, (False, True), (False, True)):
            types = pointers("logits normaliser upstreams entropies", "fp32") | pointers("slopes", kind) | NUMBERS
            types |= pointers("targets", "i64") | dict.fromkeys(
                ["stride", "slope_stride", "normaliser_stride", "upstream_stride", "columns"], "i32"
            )
            constants = {"BLOCK": row.block, "CAPPED": capped, "ENTROPY": entropy}
            aligned = ("logits", "stride", "slopes", "slope_stride")
            rare = capped != entropy or (capped and kind != "bf16")
            yield Variant("slope_kernel", types, constants, row.warps, aligned, rare)
    elif row.kernel == "combine":
        for extra in (0, 1, 2):
            types = pointers("stats logprobs normaliser extras", "fp32") | {"ranks": "i32", "rows": "i32"}
            yield Variant("combine_kernel", types, {"BLOCK": row.block, "EXTRA": extra}, row.warps, ())
    elif row.kernel == "add_copies":
        for kind in kinds:
            types = pointers("gradients sums", kind) | pointers("places starts", "i64") | {"size": "i32"}
            aligned = ("gradients", "sums", "size")
            yield Variant("add_copies_kernel", types, {"BLOCK": row.block}, row.warps, aligned, kind == "fp32")
    elif row.kernel == "pair_loss":
        types = pointers("policy slopes reference", "fp64") | pointers("sums", "fp32")
        types |= {"pairs": "i32", "beta": "fp32", "smoothing": "fp32"}
        yield Variant("pair_loss_kernel", types, {"BLOCK": row.block}, row.warps, ())
    elif row.kernel == "segment_sums":
        types = pointers("values", "fp32") | pointers("sums", "fp64") | pointers("ends", "i64")
        yield Variant("segment_sums_kernel", types, {"BLOCK": row.block}, row.warps, ())
    else:
        raise AssertionError(f"the table names a kernel that is not compiled here: {row.kernel}")


def jobs(table: Iterable[KernelConfig], everything: bool) -> list[tuple[Variant, int]]:
    """What is to be compiled for which architecture, each once. A row for one architecture is for that alone."""
    found = {}
    for row in table:
        for variant in variants(row):
            usual = ARCHITECTURES if everything or not variant.rare else RARE
            for architecture in usual if row.arch == "any" else (int(row.arch.removeprefix("sm_")),):
                found[repr((variant, architecture))] = variant, architecture
    return list(found.values())


def kernel_named(name: str) -> Callable:
    modules = (triton_kernels, prefix_triton, pairs_triton)
    return next(getattr(module, name) for module in modules if hasattr(module, name))


def build(job: tuple[Variant, int]) -> dict[str, Any]:
    """Registers, stack, shared memory and the instructions that matter of one cubin."""
    variant, architecture = job
    kernel = kernel_named(variant.name)
    order = {name: index for index, name in enumerate(kernel.arg_names)}
    types = variant.types | dict.fromkeys(variant.constants, "constexpr")
    source = ASTSource(
        fn=kernel,
        signature={name: types[name] for name in kernel.arg_names},
        constexprs=variant.constants,
        attrs={(order[name],): ALIGNED for name in variant.aligned},
    )
    # num_stages as at launch (not given there: the default)
    built = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": variant.warps})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        usage = output("cuobjdump", "--dump-resource-usage", file.name)
        assembly = output("nvdisasm", "-c", file.name)
    resources = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    opcodes = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", assembly)
    return asdict(variant) | {
        "architecture": architecture,
        "registers": resources["REG"],
        "stack": resources["STACK"] + resources.get("LOCAL", 0),
        "shared": built.metadata.shared,
        "opcodes": {opcode: opcodes.count(opcode) for opcode in sorted(set(opcodes))},
        "ptx_rounding": sorted(set(re.findall(r"cvt\.r\w\.[\w.]*f16[\w.]*", built.asm["ptx"]))),
    }


def output(tool: str, *arguments: str) -> str:
    return subprocess.run([os.path.join(TOOLS, tool), *arguments], capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    with ProcessPoolExecutor(2) as pool:
        json.dump(list(pool.map(build, jobs(shipped(), "--all" in sys.argv))), sys.stdout)
