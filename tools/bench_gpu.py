"""What one GPU does with a Llama of 8B's shape: `make bench-gpu`, or

    python tools/bench_gpu.py                       everything; goes on where an earlier start ended
    python tools/bench_gpu.py --only "bf16"         the rows whose name has this in it
    python tools/bench_gpu.py --tiny                a model of toy size, on a CPU too: that the script works

Tables, in --output: steps by precision, reference and budget, each beside what `megadpo plan` predicts for it; three
layouts of the same pairs, and TRL on the same pairs, model and GPU; the head's kernels. What cannot run here reads
"not measured" with the reason. Figures are kept beside the table (.json), so that a start does only what is missing.

**Layers.** AdamW over float32 masters takes 18 bytes per parameter (weights 2, gradients 4, masters 4, moments 8): 144
GB for all 32 layers of 8B, which leaves an H200 (151 GB) no room for activations. So the model has fewer (--layers, 12:
3.7 billion parameters, 66 GB), at full width. Its layers do what 8B's do; embedding and head weigh more among them. The
step is also measured at half the layers, and the line through the two depths gives 32 layers' time, which is an
extrapolation and is called one.

Pairs are random (log-normal lengths, seed 0), weights too; speed depends on neither.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from megadpo.observe.gpus import GIB, gpu_named
from megadpo.sweep import reason

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "tools" / "results" / "h200.md"
FULL = 32
"""Layers of 8B."""
NOT_MEASURED = "not measured"
Run = Callable[[Sequence[str]], "subprocess.CompletedProcess[str]"]


@dataclass(frozen=True)
class Size:
    """Model, pairs and steps."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    vocab: int
    prompt: int
    """Mean tokens, as the next."""
    response: int
    most: int
    """Of prompt + one response."""
    budgets: tuple[int, int]
    batch: int
    """Pairs per update."""
    steps: int
    warm_up: int
    spread: float = 0.5


LLAMA_8B = Size(12, 4096, 14336, 32, 8, 128256, 512, 512, 2048, (4096, 16384), 32, 5, 2)
"""Llama 3.1 8B but for the layers (meta-llama/Llama-3.1-8B, config.json)."""
TINY = Size(4, 64, 128, 4, 2, 512, 24, 16, 96, (256, 512), 4, 2, 1)


@dataclass(frozen=True)
class Row:
    """One measured setting."""

    name: str
    overrides: tuple[str, ...]
    layers: int
    needs_gpu: bool = False


def rows(size: Size) -> list[Row]:
    """The settings of the first table."""
    found = []
    for budget in size.budgets:
        tokens = f"batch.micro_batch_tokens={budget}"
        bf16 = (tokens, "model.dtype=bfloat16")
        found += [
            Row(f"bf16, precomputed, {budget}", bf16, size.layers),
            Row(f"bf16, resident, {budget}", (*bf16, "reference.mode=resident"), size.layers),
        ]
        graphed = (*bf16, "model.cuda_graphs=[mlp]")
        found.append(Row(f"bf16, precomputed, {budget}, CUDA graphs", graphed, size.layers, needs_gpu=True))
        for recipe in ("tensorwise", "delayed", "blockwise", "mxfp8"):
            fp8 = (*bf16, "model.fp8_format=hybrid", f"model.fp8_recipe={recipe}")
            found.append(Row(f"FP8 {recipe}, precomputed, {budget}", fp8, size.layers, needs_gpu=True))
        fp8 = (*bf16, "model.fp8_format=hybrid", "model.fp8_recipe=tensorwise", "reference.mode=resident")
        found.append(
            Row(f"FP8 tensorwise, resident in FP8, {budget}", (*fp8, "reference.fp8_weights=true"), size.layers, True)
        )
        found += [
            Row(f"bf16, precomputed, {budget}, layers recomputed", (*bf16, "model.recompute=full"), size.layers),
            Row(f"bf16, precomputed, {budget}, half the layers", bf16, size.layers // 2),
        ]
    return found


def write_run_file(folder: Path, size: Size, layers: int) -> Path:
    """A run file and a model folder with nothing but its config.json."""
    model = folder / f"model-{layers}"
    model.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": size.hidden,
        "intermediate_size": size.ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "head_dim": size.hidden // size.heads,
        "vocab_size": size.vocab,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"},
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    (model / "config.json").write_text(json.dumps(config))
    file = folder / f"run-{layers}.yaml"
    settings = {
        "run_dir": str(folder / "run"),
        "model": {"path": str(model)},
        "data": {"train": "random", "max_length": size.most, "cache_dir": str(folder / "cache")},
        "batch": {"global_batch_size": size.batch},
    }
    file.write_text(yaml.safe_dump(settings))
    return file


def run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False)


def measure(row: Row, size: Size, folder: Path, on_gpu: bool, run: Run) -> dict[str, Any]:
    """What `megadpo bench --json` gives of it, or {"reason": why it does not}."""
    if row.needs_gpu and not on_gpu:
        return {"reason": "needs a GPU"}
    file = write_run_file(folder, size, row.layers)
    lengths = ["--prompt", str(size.prompt), "--response", str(size.response), "--spread", str(size.spread)]
    counts = ["--steps", str(size.steps), "--warm-up", str(size.warm_up)]
    arguments = ["bench", str(file), *row.overrides, "--synthetic", *lengths, *counts, "--json"]
    done = run([sys.executable, "-m", "megadpo.cli", *arguments])
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        return {"reason": reason(done.stderr, done.returncode)}
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def predicted(row: Row, size: Size, folder: Path, gpu: str | None, run: Run) -> dict[str, float] | None:
    """Seconds per update, MFU and bytes by `megadpo plan --json`; None where it does not know this GPU, or there is no
    such command."""
    if gpu is None:
        return None
    file = write_run_file(folder, size, row.layers)
    lengths = ["--prompt-tokens", str(size.prompt), "--response-tokens", str(size.response)]
    lengths += ["--spread", str(size.spread)]
    arguments = ["plan", str(file), *row.overrides, "--gpus", "1", "--gpu", gpu, "--all", "--json", *lengths]
    done = run([sys.executable, "-m", "megadpo.cli", *arguments])
    if not done.stdout.lstrip().startswith("{"):
        return None
    given = dict(setting.partition("=")[::2] for setting in row.overrides)
    for plan in json.loads(done.stdout)["grids"]:
        grid = plan["grid"]
        same = (
            grid["tokens"] == int(given["batch.micro_batch_tokens"])
            and grid["recompute"] == given.get("model.recompute", "none")
            and grid["reference"] == given.get("reference.mode", "precomputed")
        )
        if same:
            return {"seconds": plan["update_seconds"], "mfu": plan["mfu"], "bytes": plan["memory"]["total"]}
    return None


def sides(size: Size, on_gpu: bool, names: str, alone: bool) -> list[str]:
    """Arguments of tools/bench_step.py."""
    model = {"vocab": size.vocab, "hidden": size.hidden, "ffn": size.ffn, "layers": size.layers, "heads": size.heads}
    pairs = {"prompt": size.prompt, "response": size.response, "spread": size.spread, "max-length": size.most}
    steps = {"batch": size.batch, "repeats": size.steps, "warm-up": size.warm_up, "trl-micro": 1}
    options = {**model, "kv-heads": size.kv_heads, **pairs, **steps, "budget": size.budgets[1], "micro": 4}
    found = ["--compare", names, *(word for name, value in options.items() for word in (f"--{name}", str(value)))]
    found += ["--device", "cuda", "--dtype", "bfloat16"] if on_gpu else []
    return found + (["--alone"] if alone else [])


LAYOUTS = "padded,packed,shared"
RIVALS = ("trl", "trl-precomputed", "trl-liger")
PACKAGES = {"trl": "trl", "trl-precomputed": "trl", "trl-liger": "liger_kernel"}


def tables(names: str, size: Size, on_gpu: bool, run: Run) -> dict[str, Any]:
    """What tools/bench_step.py prints, or why not."""
    wanted = [package for side, package in PACKAGES.items() if side in names.split(",")]
    if missing := [package for package in wanted if importlib.util.find_spec(package) is None]:
        return {"reason": f"{missing[0]} is not installed"}
    command = [sys.executable, str(ROOT / "tools" / "bench_step.py"), *sides(size, on_gpu, names, alone=True)]
    done = run(command)
    if done.returncode:
        return {"reason": reason(done.stderr, done.returncode)}
    return {"text": done.stdout}


def kernels(on_gpu: bool, run: Run) -> dict[str, Any]:
    """What tools/bench_kernels.py prints."""
    if not on_gpu:
        return {"reason": "needs a GPU (tools/results/kernels-cpu.md has a CPU's)"}
    done = run([sys.executable, str(ROOT / "tools" / "bench_kernels.py")])
    return {"reason": reason(done.stderr, done.returncode)} if done.returncode else {"text": done.stdout}


# What is written ---------------------------------------------------------------------------------------------


def page(kept: dict[str, Any], size: Size, command: str) -> str:
    """The whole file."""
    measured = [found for found in kept["rows"].values() if "reason" not in found]
    about = measured[0] if measured else {}
    versions = ", ".join(f"{name} {version}" for name, version in about.get("versions", {}).items())
    lines = [
        "# One GPU, a Llama of 8B's width",
        "",
        f"`{command}`; docs/bench.md says what the numbers mean, the script's help what is measured.",
        "",
        f"Device: {about.get('device', NOT_MEASURED)}; driver {about.get('driver', NOT_MEASURED)}; {versions or '-'}; "
        f"commit {about.get('commit', '-')}.",
        "",
        f"Layers {size.layers}, hidden {size.hidden}, vocabulary {size.vocab}; {size.batch} random pairs per update, "
        f"prompts of {size.prompt} and responses of {size.response} tokens on average, log-normal with {size.spread}; "
        f"{size.steps} steps after {size.warm_up} of warm-up, each row in a process of its own.",
        "",
        "## Precision, reference, budget",
        "",
        "| | s per step: median (lowest - highest) | tokens/s | pairs/s | MFU | of bf16 | peak GiB | predicted s | "
        "predicted MFU | predicted GiB | not measured, as |",
        f"|{' --- |' * 11}",
        *(_line(row, kept, size) for row in rows(size)),
        "",
        *_depth(kept, size),
        "",
    ]
    titles = {"layouts": "Layouts of the same pairs", **{name: f"{name}, the same model and pairs" for name in RIVALS}}
    for name, title in titles.items():
        lines += [f"## {title}", "", *_embedded(kept["tables"].get(name)), ""]
    lines += ["## The head's kernels", "", *_embedded(kept["tables"].get("kernels"))]
    return "\n".join(lines).rstrip() + "\n"


def _line(row: Row, kept: dict[str, Any], size: Size) -> str:
    found = kept["rows"].get(row.name, {"reason": "not begun"})
    guess = kept["predicted"].get(row.name)
    guessed = ["-"] * 3
    if guess:
        guessed = [f"{guess['seconds']:.3f}", f"{guess['mfu']:.1%}", f"{guess['bytes'] / GIB:.1f}"]
    if "reason" in found:
        cells = [NOT_MEASURED, *["-"] * 5, *guessed, found["reason"].replace("|", "/")]
    else:
        base = kept["rows"].get(f"bf16, precomputed, {row.name.split(', ')[2]}", {})
        gain = f"{base['seconds'] / found['seconds']:.2f}" if "seconds" in base and row.layers == size.layers else "-"
        cells = [
            f"{found['seconds']:.3f} ({found['seconds_lowest']:.3f} - {found['seconds_highest']:.3f})",
            f"{found['tokens_per_second']:.0f}",
            f"{found['pairs_per_second']:.2f}",
            f"{found['perf/mfu']:.1%}" if "perf/mfu" in found else "not known",
            gain,
            f"{found['perf/peak_memory_gib']:.1f}",
            *guessed,
            "",
        ]
    return f"| {row.name} | {' | '.join(cells)} |"


def _depth(kept: dict[str, Any], size: Size) -> list[str]:
    """32 layers by the line through two depths."""
    lines = []
    for budget in size.budgets:
        name = f"bf16, precomputed, {budget}"
        deep, flat = (kept["rows"].get(n, {}).get("seconds") for n in (name, f"{name}, half the layers"))
        if deep is None or flat is None:
            lines.append(f"{FULL} layers, bf16, precomputed, {budget}: {NOT_MEASURED}.")
            continue
        per_layer = (deep - flat) / (size.layers - size.layers // 2)
        if per_layer <= 0:
            lines.append(f"{FULL} layers, bf16, precomputed, {budget}: {NOT_MEASURED}, the two depths are alike.")
            continue
        whole = deep + per_layer * (FULL - size.layers)
        lines.append(
            f"Extrapolated to {FULL} layers (bf16, precomputed, {budget}; the memory would not fit): {whole:.3f} s per "
            f"step, {size.batch / whole:.2f} pairs/s; a layer takes {per_layer * 1e3:.1f} ms."
        )
    return lines


def _embedded(found: dict[str, Any] | None) -> list[str]:
    if found is None or "text" not in found:
        return [f"{NOT_MEASURED}: {(found or {}).get('reason', 'not begun')}"]
    return [re.sub(r"^(#+) ", r"##\1 ", found["text"].strip(), flags=re.MULTILINE)]


class Kept:
    """Figures of earlier starts, and of this one as they come."""

    def __init__(self, output: Path, size: Size, command: str, again: bool) -> None:
        self.output, self.size, self.command = output, size, command
        self.file = output.with_suffix(".json")
        self.found: dict[str, Any] = {"size": asdict(size), "rows": {}, "predicted": {}, "tables": {}}
        if self.file.exists() and not again:
            earlier = json.loads(self.file.read_text())
            if earlier["size"] == json.loads(json.dumps(asdict(size))):  # tuples become lists
                self.found = earlier

    def missing(self, kind: str, name: str) -> bool:
        """Whether it has not been measured; what failed is tried again."""
        return "reason" in self.found[kind].get(name, {"reason": ""})

    def keep(self, kind: str, name: str, value: Any) -> None:
        self.found[kind][name] = value
        self.output.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text(json.dumps(self.found, indent=1) + "\n")
        self.output.write_text(page(self.found, self.size, self.command))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--tiny", action="store_true", help="a toy, to see that the script works")
    parser.add_argument("--layers", type=int, default=LLAMA_8B.layers, help="of the model (%(default)s)")
    parser.add_argument("--steps", type=int, help="measured ones")
    parser.add_argument("--parts", default="rows,sides,kernels,plan", help="of %(default)s; plan needs no GPU")
    parser.add_argument("--gpu", help="whose predictions to take, as `megadpo plan --gpu` has it; this machine's")
    parser.add_argument("--only", default="", metavar="TEXT", help="rows and sides whose name has this in it")
    parser.add_argument("--again", action="store_true", help="measure what an earlier start has measured, too")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin nothing after so long")
    parser.add_argument("--output", type=Path, help=f"{RESULTS.relative_to(ROOT)}; with --tiny it must be given")
    args = parser.parse_args(argv)
    if args.tiny and args.output is None:
        parser.error("--tiny needs --output FILE: a toy's figures do not belong among the results")
    on_gpu = torch.cuda.is_available()
    size = TINY if args.tiny else replace(LLAMA_8B, layers=args.layers)
    size = size if args.steps is None else replace(size, steps=args.steps)
    if not args.tiny and not on_gpu and set(args.parts.split(",")) - {"plan"}:
        print("bench_gpu: this machine has no GPU: a model of this size needs one; --tiny shows that the script works")
        return 2
    known = gpu_named(torch.cuda.get_device_name()) if on_gpu else None
    gpu = args.gpu or (known.name if known else None)
    said = shlex.join(argv if argv is not None else sys.argv[1:])
    kept = Kept(args.output or RESULTS, size, f"python tools/bench_gpu.py {said}".strip(), args.again)
    parts, end = args.parts.split(","), time.monotonic() + 60 * args.minutes
    with tempfile.TemporaryDirectory(prefix="megadpo-bench-gpu-") as text:
        folder = Path(text)
        for row in rows(size) if "rows" in parts else []:
            if args.only not in row.name or time.monotonic() > end:
                continue
            if kept.missing("rows", row.name):
                kept.keep("rows", row.name, measure(row, size, folder, on_gpu, run))
                print(_line(row, kept.found, size), flush=True)
        for name in ("layouts", *RIVALS) if "sides" in parts else ():
            if args.only in name and kept.missing("tables", name) and time.monotonic() < end:
                compared = LAYOUTS if name == "layouts" else f"{name},shared"
                kept.keep("tables", name, tables(compared, size, on_gpu, run))
        for row in rows(size) if "plan" in parts else []:
            # always anew: it takes seconds, and the planner may have learnt since
            if args.only in row.name and (gpu or row.name not in kept.found["predicted"]) and time.monotonic() < end:
                kept.keep("predicted", row.name, predicted(row, size, folder, gpu, run))
        if "kernels" in parts and args.only in "kernels" and kept.missing("tables", "kernels"):
            kept.keep("tables", "kernels", kernels(on_gpu, run))
    print(f"{kept.output}: written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
