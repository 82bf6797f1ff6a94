"""How fast a large folder is converted, and how much memory that takes: synthetic weights, both ways, back to the bit.

    python tools/bench_convert.py --work FOLDER [--layers 32] [--processes 1] [--keep]

Writes a random bfloat16 Llama of 8B's shape (fewer layers with --layers) shard by shard, runs `megadpo import`, forgets
the original, runs `megadpo export`, and compares the digest of every tensor. Prints a table of wall-clock seconds, CPU
seconds, GB/s and the largest anonymous memory of any process (pages of mapped files are the page cache's and do not
count). Needs twice the size of the model on the disk, and removes all of it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path

import numpy as np
import psutil

from megadpo.convert.families import megatron_tensors, read_shape
from megadpo.convert.hf_files import INDEX, HFFiles
from megadpo.convert.tables import hf_shapes

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
SHARD = 5_000_000_000
PIECE = 2**25
"""Values made and written at a time."""


def finite_bits(rng: np.random.Generator, count: int) -> bytes:
    """Random bfloat16 values between -2 and 2: the highest bit of the exponent is cleared."""
    bits = np.frombuffer(rng.bytes(2 * count), dtype=np.uint16) & 0xBFFF
    return bits.tobytes()


def write_model(folder: Path, layers: int) -> dict[str, str]:
    """The folder, shard by shard; sha256 of every tensor's bytes."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": layers}))
    tensors = megatron_tensors(read_shape(folder)).values()
    shapes = hf_shapes(*tensors)
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for name, dims in shapes.items():
        if size + 2 * prod(dims) > SHARD:
            shards.append({})
            size = 0
        shards[-1][name] = dims
        size += 2 * prod(dims)
    rng, digests, where = np.random.default_rng(0), {}, {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        digests |= write_shard(folder / file, shard, rng)
        where |= dict.fromkeys(shard, file)
    (folder / INDEX).write_text(json.dumps({"weight_map": where}))
    return digests


def write_shard(path: Path, shapes: dict[str, tuple[int, ...]], rng: np.random.Generator) -> dict[str, str]:
    header, end, digests = {}, 0, {}
    for name, dims in shapes.items():
        header[name] = {"dtype": "BF16", "shape": dims, "data_offsets": [end, end + 2 * prod(dims)]}
        end += 2 * prod(dims)
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, dims in shapes.items():
            digest = hashlib.sha256()
            for start in range(0, prod(dims), PIECE):
                data = finite_bits(rng, min(PIECE, prod(dims) - start))
                file.write(data)
                digest.update(data)
            digests[name] = digest.hexdigest()
    return digests


def digests_of(folder: Path) -> Iterator[tuple[str, str]]:
    """sha256 of every tensor's bytes, as they lie in the files."""
    files = HFFiles(folder)
    for name, title in files.where.items():
        header, stored = files.header(title), files.stored(name)
        digest = hashlib.sha256()
        with (folder / title).open("rb") as file:
            file.seek(header.data + stored.start)
            left = stored.end - stored.start
            while left:
                data = file.read(min(left, 2 * PIECE))
                digest.update(data)
                left -= len(data)
        yield name, digest.hexdigest()


def anonymous(process: psutil.Process) -> int:
    """Bytes of a process's anonymous memory."""
    try:
        status = Path(f"/proc/{process.pid}/status").read_text()
        return int(status.split("RssAnon:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        return 0


def cpu_seconds() -> float:
    """Of all child processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def run(*arguments: str) -> tuple[float, float, int]:
    """(seconds, CPU seconds, peak anonymous bytes of any of its processes) of a megadpo command, start and imports
    included."""
    started, used, peak = time.monotonic(), cpu_seconds(), 0
    with subprocess.Popen([sys.executable, "-m", "megadpo.cli", *arguments], stdout=subprocess.DEVNULL) as command:
        while command.poll() is None:
            try:
                main = psutil.Process(command.pid)
                peak = max(peak, *(anonymous(x) for x in (main, *main.children(recursive=True))))
            except psutil.NoSuchProcess:
                pass
            time.sleep(0.02)
    if command.returncode:
        sys.exit(f"megadpo {' '.join(arguments)} ended with {command.returncode}")
    return time.monotonic() - started, cpu_seconds() - used, peak


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--work", required=True, type=Path, help="a folder on the disk to measure; must not exist")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--processes", default="1")
    parser.add_argument("--keep", action="store_true", help="keep the exported folder")
    args = parser.parse_args(argv)
    args.work.mkdir(parents=True)
    hf, imported, out = (args.work / name for name in ("hf", "imported", "out"))
    try:
        started = time.monotonic()
        before = write_model(hf, args.layers)
        written = time.monotonic() - started
        size = sum(file.stat().st_size for file in hf.iterdir()) / 1e9
        print(f"{args.layers} layers, {size:.2f} GB; {os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f}")
        print("| step | seconds | CPU seconds | GB/s | peak anonymous memory per process |\n|---|---|---|---|---|")
        own = time.process_time()
        print(f"| write the synthetic folder | {written:.0f} | {own:.0f} | {size / written:.2f} | |", flush=True)
        for title, command in (
            ("import", ("import", str(hf), str(imported))),
            ("export", ("export", str(imported), str(out))),
        ):
            seconds, cpu, peak = run(*command, "--processes", args.processes)
            print(
                f"| {title} | {seconds:.0f} | {cpu:.0f} | {size / seconds:.2f} | {peak / 2**20:.0f} MiB |", flush=True
            )
            shutil.rmtree(hf, ignore_errors=True)
        same = dict(digests_of(out)) == before
        print(f"{len(before)} tensors: {'every byte is the same' if same else 'DIFFERENT'}; "
              f"load average {os.getloadavg()[0]:.1f}")  # fmt: skip
        return 0 if same else 1
    finally:
        for folder in (hf, imported, *([] if args.keep else [out, args.work])):
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
