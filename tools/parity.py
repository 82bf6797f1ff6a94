"""megadpo against TRL's DPOTrainer, step by step: the same pairs, in the same order, in float32, on the CPU.

    python tools/parity.py --model HF_DIR --data pairs.jsonl --steps 20 --tp 2 --pp 2
    python tools/parity.py --model HF_DIR --data pairs.jsonl --grids
    TRITON_INTERPRET=1 python tools/parity.py --model HF_DIR --data pairs.jsonl --tp 2 --logprob-backend triton

Both sides start from the same weights and train on the same token ids, which megadpo's tokeniser makes:
AdamW, constant learning rate, no warm-up, no weight decay, clipping at 1, file order. Printed are, per step,
the absolute differences of the loss (nats), rewards/* (nats times beta) and logps/* (nats), and the relative
difference of grad_norm. Then the logits of a text, here and in transformers (tools/logits.py).

Exit code 1 where a difference is over its limit, is not a number, or is missing, or where the first loss is
not ln 2; 2 where a side did not run. `rewards/accuracies` is shown without a limit: a tie is half a hit for
megadpo and a miss for TRL, and the first step has only ties.

Needs the extra `trl` (pip install -e .[trl]). TRL runs once for all grids; --trl-cache FILE keeps it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from compare_steps import Comparison, Limits, Record, compare, step_table, summary_table
from megadpo_kernels import BACKENDS
from rich.console import Console

from megadpo.config import DataConfig
from megadpo.data.kinds import Wanted
from megadpo.data.prepare import prepare
from megadpo.errors import MegadpoError


class SideFailedError(Exception):
    """One of the two trainers did not run to its end."""


@dataclass(frozen=True)
class Task:
    """What both sides train. Batches count pairs."""

    model: Path
    data: Path
    steps: int
    batch: int
    micro_batch: int | None
    """megadpo's micro_batch_size; TRL takes the whole batch at once."""
    learning_rate: float
    beta: float
    reference: str
    """megadpo's reference.mode; TRL's is resident."""
    logprob_backend: str = "auto"
    """megadpo's model.logprob_backend."""


@dataclass(frozen=True)
class Grid:
    """Sizes of megadpo's grid."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    sp: bool = False
    vpp: int | None = None

    def __str__(self) -> str:
        sizes = [f"{name}{size}" for name, size in (("TP", self.tp), ("PP", self.pp), ("DP", self.dp)) if size > 1]
        chunks = [f"VPP{self.vpp}"] if self.vpp else []
        return " x ".join([*sizes, *chunks] or ["TP1"]) + (" + SP" if self.sp else "")


GRIDS = (Grid(), Grid(tp=2), Grid(tp=2, sp=True), Grid(pp=2), Grid(tp=2, pp=2), Grid(dp=2))


# The two sides ---------------------------------------------------------------------------------------------


def token_ids(task: Task, cache: Path) -> list[dict[str, list[int]]]:
    """The pairs of the first `steps` batches as megadpo tokenises them. Raises megadpo's errors."""
    data = DataConfig(train=(str(task.data),), cache_dir=str(cache))
    store = prepare(data.train, data, str(task.model), Wanted("pairs"))
    needed = task.steps * task.batch
    if needed > len(store):
        raise SideFailedError(
            f"{task.data}: {task.steps} steps of {task.batch} need {needed} pairs and it gives {len(store)}; "
            "ask for fewer steps or a smaller batch"
        )
    pairs = []
    for number in range(needed):
        group = store.group(number)
        chosen, rejected = (ids.tolist() for ids in group.response_ids)
        pairs.append({"prompt_ids": group.prompt_ids.tolist(), "chosen_ids": chosen, "rejected_ids": rejected})
    return pairs


def trl_records(task: Task, pairs: list[dict[str, list[int]]], folder: Path, cache: Path | None) -> list[Record]:
    """TRL's step records, from the cache file where it holds this very task."""
    key = {
        "trl": version("trl"),
        "model": model_digest(task.model),
        "pairs": hashlib.sha256(json.dumps(pairs).encode()).hexdigest(),
        **{name: getattr(task, name) for name in ("steps", "batch", "learning_rate", "beta")},
    }
    if cache is not None and cache.is_file():
        kept = json.loads(cache.read_text())
        if kept.get("key") == key:
            records: list[Record] = kept["records"]
            return records
    groups, out = folder / "pairs.jsonl", folder / "trl.jsonl"
    groups.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    command = [sys.executable, str(Path(__file__).with_name("trl_side.py"))]
    command += ["--model", str(task.model), "--groups", str(groups), "--out", str(out)]
    command += ["--steps", str(task.steps), "--batch", str(task.batch)]
    command += ["--lr", str(task.learning_rate), "--beta", str(task.beta)]
    _run("TRL", command)
    records = read_jsonl(out)
    if cache is not None:
        partial = cache.with_name(cache.name + ".partial")
        partial.write_text(json.dumps({"key": key, "records": records}))
        os.replace(partial, cache)
    return records


def model_digest(folder: Path) -> str:
    """sha256 over config.json and the weight files."""
    digest = hashlib.sha256()
    for path in sorted([folder / "config.json", *folder.glob("*.safetensors")]):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def megadpo_records(task: Task, grid: Grid, folder: Path) -> list[Record]:
    """megadpo's metrics.jsonl after `megadpo train` on the grid."""
    folder.mkdir()
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(run_file(task, grid, folder), sort_keys=False))
    _run(f"megadpo on {grid}", [str(Path(sys.executable).with_name("megadpo")), "train", str(path)])
    return read_jsonl(folder / "run" / "metrics.jsonl")


def run_file(task: Task, grid: Grid, folder: Path) -> dict[str, Any]:
    """What megadpo is asked to do, as a run file. Every grid has its own cache, so that none uses the
    reference log-probabilities of another."""
    return {
        "run_dir": str(folder / "run"),
        "model": {"path": str(task.model), "dtype": "float32", "logprob_backend": task.logprob_backend},
        "data": {"train": [str(task.data)], "cache_dir": str(folder / "cache")},
        "objective": {"loss_type": "sigmoid", "beta": task.beta},
        "reference": {"mode": task.reference},
        "parallel": {
            "tensor_model_parallel_size": grid.tp,
            "pipeline_model_parallel_size": grid.pp,
            "virtual_pipeline_model_parallel_size": grid.vpp,
            "data_parallel_size": grid.dp,
            "sequence_parallel": grid.sp,
        },
        "batch": {"global_batch_size": task.batch, "micro_batch_size": task.micro_batch},
        "optimizer": {
            "learning_rate": task.learning_rate,
            "lr_scheduler_type": "constant",
            "warmup_steps": 0,
            "weight_decay": 0.0,
            "max_grad_norm": 1.0,
        },
        "train": {"max_steps": task.steps, "shuffle": False},
        "export": {"enabled": False},
    }


def read_jsonl(path: Path) -> list[Record]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _run(side: str, command: list[str]) -> None:
    """Raises SideFailedError with the end of what the command said."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    if done.returncode:
        said = "\n".join(done.stdout.splitlines()[-20:])
        raise SideFailedError(f"{side}: exit code {done.returncode}\n{said}")


# The command line -------------------------------------------------------------------------------------------


def logits_agree(task: Task) -> bool:
    """Whether tools/logits.py finds the logits of the model's own text within its limit; it prints the figure."""
    command = [sys.executable, str(Path(__file__).with_name("logits.py"))]
    return subprocess.run([*command, "--model", str(task.model), "--data", str(task.data)]).returncode == 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True, type=Path, help="Hugging Face folder")
    parser.add_argument("--data", required=True, type=Path, help="preference pairs")
    parser.add_argument("--steps", type=int, default=20, help="updates")
    parser.add_argument("--batch", type=int, default=8, help="pairs per update")
    parser.add_argument("--micro-batch-size", type=int, help="megadpo: most pairs in a micro-batch")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--reference", choices=("resident", "precomputed"), default="precomputed")
    parser.add_argument("--logprob-backend", choices=BACKENDS, default="auto", help="which code runs the head")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--pp", type=int, default=1)
    parser.add_argument("--dp", type=int, default=1)
    parser.add_argument("--sp", action="store_true")
    parser.add_argument("--vpp", type=int, help="model chunks per pipeline rank")
    parser.add_argument("--grids", action="store_true", help=f"instead of one grid: {', '.join(map(str, GRIDS))}")
    parser.add_argument("--trl-cache", type=Path, help="file that keeps TRL's numbers for the next call")
    parser.add_argument("--limit-loss", type=float, default=Limits.loss, help="nats")
    parser.add_argument("--limit-logps", type=float, default=Limits.logps, help="nats")
    parser.add_argument("--limit-rewards", type=float, help="beta x the limit on logps where not given")
    parser.add_argument("--limit-grad-norm", type=float, default=Limits.grad_norm, help="relative")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    task = Task(
        model=args.model.resolve(),
        data=args.data.resolve(),
        steps=args.steps,
        batch=args.batch,
        micro_batch=args.micro_batch_size,
        learning_rate=args.lr,
        beta=args.beta,
        reference=args.reference,
        logprob_backend=args.logprob_backend,
    )
    rewards = args.beta * args.limit_logps if args.limit_rewards is None else args.limit_rewards
    limits = Limits(args.limit_loss, args.limit_logps, rewards, args.limit_grad_norm)
    grids = GRIDS if args.grids else (Grid(args.tp, args.pp, args.dp, args.sp, args.vpp),)
    console = Console(width=max(140, Console().width))
    comparisons: dict[str, Comparison] = {}
    try:
        with tempfile.TemporaryDirectory() as scratch:
            pairs = token_ids(task, Path(scratch) / "cache")
            theirs = trl_records(task, pairs, Path(scratch), args.trl_cache)
            for number, grid in enumerate(grids):
                ours = megadpo_records(task, grid, Path(scratch) / f"grid{number}")
                comparison = compare(theirs, ours, task.steps, limits)
                comparisons[str(grid)] = comparison
                console.print(step_table(f"{grid}: |megadpo - TRL|, of grad_norm relative", comparison, ours, limits))
                for fault in comparison.faults:
                    console.print(f"  {fault}", highlight=False)
    except (SideFailedError, MegadpoError) as error:
        print(error, file=sys.stderr)
        return 2
    console.print(summary_table(comparisons))
    good = logits_agree(task) and not any(comparison.faults for comparison in comparisons.values())
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
