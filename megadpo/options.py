"""Options of the commands that have many, and the numbers that they take. cli.py has the commands."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any


def plan_options(parser: argparse.ArgumentParser) -> None:
    """docs/plan.md explains."""
    parser.add_argument("--gpus", type=int, required=True, metavar="N", help="how many")
    parser.add_argument(
        "--gpu", metavar="NAME", help="a100-80gb, h100-80gb, h200, b200, or memory=80GiB,bf16=989e12,..."
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="instead: walk one step of one rank of the run file's own grid"
    )
    parser.add_argument("--rank", type=int, metavar="R", help="with --dry-run: which, from 0; 0")
    parser.add_argument("--price", type=positive(float), metavar="P", help="of one GPU for one hour: adds the cost")
    parser.add_argument("--top", type=positive(int), metavar="N", help="rows of the table; 15")
    parser.add_argument("--all", action="store_true", help="every grid, and every way to run it")
    parser.add_argument("--groups", type=positive(int), metavar="N", help="groups (pairs) of the data")
    for what in ("prompt", "response"):
        parser.add_argument(
            f"--{what}-tokens", type=positive(float), metavar="N", help=f"mean tokens of a {what}; lengths are spread"
        )
    parser.add_argument(
        "--spread",
        type=at_least_zero,
        metavar="S",
        help="standard deviation of the logarithm of lengths (0.7; 0: all alike)",
    )
    parser.add_argument("--json", action="store_true", help="as one JSON object")
    parser.add_argument("--svg", metavar="FILE", help="also write a picture")


def launch_options(parser: argparse.ArgumentParser) -> None:
    """What is asked of SLURM; docs/slurm.md explains. Names are the fields of launch.slurm.Request."""

    def option(name: str, text: str, kind: type = str, **more: Any) -> None:
        parser.add_argument(name, help=text, type=kind, **more)

    option("--nodes", "machines (default 1)", int)
    option("--gpus-per-node", "GPUs on each, with one process for each GPU", int)
    option("--processes-per-node", "processes on each, where nodes have no GPUs", int)
    option("--cpus", "CPU cores per process", int)
    for name in ("partition", "account", "qos", "constraint", "job-name"):
        option(f"--{name}", f"sbatch's --{name}")
    option("--time", "time limit: minutes, h:mm:ss or days-hours")
    option("--container-image", "pyxis: run in this container", metavar="IMAGE")
    option("--container-mounts", "pyxis: SRC:DST,...; must include run folder, data and models", metavar="MOUNTS")
    option("--python", "interpreter on the nodes that has megadpo (default: this one)", metavar="PATH")
    option("--save-before", "save so many seconds before the time limit (default 300)", int, metavar="SECONDS")
    option("--max-restarts", "restarts in a row without a new checkpoint (default 3)", int, metavar="N")
    option("--sbatch", "any other option of sbatch; may be repeated", metavar="KEY=VALUE", action="append")
    parser.add_argument("--preflight", action="store_true", help="check the nodes before every start")
    parser.add_argument("--dry-run", action="store_true", help="print the command and the script; submit nothing")


def bench_options(parser: argparse.ArgumentParser) -> None:
    """What is measured, and where it is told; docs/bench.md explains."""

    def option(name: str, text: str, **more: Any) -> None:
        parser.add_argument(name, help=text, **more)

    option("--steps", "measured steps (default 10)", type=positive(int), default=10, metavar="N")
    option("--warm-up", "steps before them (default 3)", type=positive(int), default=3, metavar="N")
    option("--synthetic", "random pairs and weights; model.path needs only a config.json", action="store_true")
    option("--prompt", "mean tokens of random prompts (default 512)", type=positive(int), default=512, metavar="N")
    option("--response", "mean tokens of random responses (default 256)", type=positive(int), default=256, metavar="N")
    option(
        "--spread",
        "standard deviation of the logarithm of random lengths (default 0.6; 0: all alike)",
        type=at_least_zero,
        default=0.6,
        metavar="S",
    )
    option("--trace", "write a trace of one more step for Perfetto, a file for each rank", metavar="FILE")
    option(
        "--sweep",
        "measure every combination, as parallel.tensor_model_parallel_size=1,2 model.recompute=none,full",
        nargs="+",
        metavar="KEY=A,B",
    )
    option("--json", "print one JSON object (with --sweep one a line)", action="store_true")
    option("--append", "add a row to this Markdown table", metavar="FILE")


def at_least_zero(text: str) -> float:
    value = float(text)
    if not 0 <= value < 10:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 10")
    return value


at_least_zero.__name__ = "number"


def positive(kind: type[int] | type[float]) -> Callable[[str], float]:
    def number(text: str) -> float:
        value = kind(text)
        if not 0 < value < 1e9:
            raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1e9")
        return value

    number.__name__ = kind.__name__
    return number


def conversion_options(parser: argparse.ArgumentParser) -> None:
    """What `import` and `export` share."""
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        help="of the written weights; as they are (import), as config.json says (export) where not given",
    )
    parser.add_argument(
        "--processes", type=positive(int), default=1, metavar="N", help="writers, each with files of its own"
    )
    parser.add_argument(
        "--verify", action="store_true", help="compare the logits with those that transformers computes"
    )
    parser.add_argument("--verify-text", metavar="FILE", help="text to compare on; a built-in one where not given")
    parser.add_argument(
        "--tolerance",
        type=positive(float),
        default=1e-4,
        help="largest difference of a logit; 1e-4 where not given",
    )
