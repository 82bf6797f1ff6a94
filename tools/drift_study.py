"""How far emulated FP8 moves log-probabilities and training, for every recipe, format and first/last layers in bf16.

python tools/drift_study.py --model ../shared/models/stories260k --train ../shared/data/stories_pairs_train.jsonl
    --eval ../shared/data/stories_pairs_eval.jsonl --write
python tools/drift_study.py ... --only tensorwise --seeds 0 --steps 4 --wide-steps 0     a quick look at some

Two models: the one that is given, and a random Llama with 8 layers of 512 (--wide-steps 0: without it), with the given
one's tokenizer. Each is trained with DPO by `megadpo train`, once in bfloat16 and once per way of FP8, from the same
weights on the same pairs in the same order (one order per seed), with a resident reference, and watched by the run's
own probe. --keep FILE writes what every run came to, and takes from it what is there already. --write puts
tools/results/fp8_drift.md and fp8_drift.svg there.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file

RESULTS = Path(__file__).resolve().parent / "results"
RECIPES = ("tensorwise", "delayed", "blockwise", "mxfp8")
FORMATS = ("hybrid", "e4m3")
WIDE = {"layers": 8, "hidden": 512, "ffn": 1408, "heads": 8, "groups": 4}


@dataclass(frozen=True)
class Way:
    """A way to compute. recipe None: bfloat16."""

    recipe: str | None
    format: str = ""
    ends: bool = False
    """First and last layer in bf16."""

    @property
    def settings(self) -> dict[str, Any]:
        if self.recipe is None:
            return {}
        fp8 = {"fp8_format": self.format, "fp8_recipe": self.recipe, "fp8_emulation": True}
        return {**fp8, "first_last_layers_bf16": self.ends}


WAYS = [Way(r, f, ends) for r in RECIPES for f in FORMATS for ends in (False, True) if not (ends and r == "delayed")]


@dataclass(frozen=True)
class Trained:
    """What the log of a run says."""

    losses: list[float]
    grad_norms: list[float]
    held_out_loss: float | None
    accuracy: float | None
    """None: nothing is held out."""
    start: dict[str, float]
    """The probe's figures before the first step, and after the last; empty where there is none."""
    end: dict[str, float]
    seconds: float


def write_wide(folder: Path, tokenizer_from: Path, seed: int = 0) -> Path:
    """A random Llama: matrices of standard deviation 1 / sqrt(inputs), norms lognormal, logits of deviation about 3."""
    generator = torch.Generator().manual_seed(seed)
    vocab = json.loads((tokenizer_from / "config.json").read_text())["vocab_size"]
    hidden, ffn = WIDE["hidden"], WIDE["ffn"]
    keys = hidden // WIDE["heads"] * WIDE["groups"]

    def matrix(rows: int, columns: int, size: float = 1.0) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=generator) * size * columns**-0.5).bfloat16()

    def norm() -> torch.Tensor:
        return (torch.randn(hidden, generator=generator) * 0.5).exp().bfloat16()

    tensors = {"model.embed_tokens.weight": matrix(vocab, hidden, hidden**0.5), "model.norm.weight": norm()}
    tensors["lm_head.weight"] = matrix(vocab, hidden, 2.0)
    for layer in range(WIDE["layers"]):
        name = f"model.layers.{layer}."
        for part, (rows, columns) in {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (keys, hidden),
            "self_attn.v_proj": (keys, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (ffn, hidden),
            "mlp.up_proj": (ffn, hidden),
            "mlp.down_proj": (hidden, ffn),
        }.items():
            tensors[f"{name}{part}.weight"] = matrix(rows, columns)
        tensors[name + "input_layernorm.weight"], tensors[name + "post_attention_layernorm.weight"] = norm(), norm()
    folder.mkdir(parents=True)
    for file in tokenizer_from.iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, folder)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": WIDE["layers"],
        "num_attention_heads": WIDE["heads"],
        "num_key_value_heads": WIDE["groups"],
        "vocab_size": vocab,
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@dataclass(frozen=True)
class Plan:
    """How one model is trained."""

    name: str
    model: Path
    steps: int
    batch: int
    rate: float
    seeds: list[int]
    held_out: bool


def kept(options: argparse.Namespace, plan: Plan, way: Way, seed: int) -> Trained:
    """From the file of what ran before, or from a run, which is put there."""
    key = repr((plan.name, plan.steps, plan.batch, plan.rate, options.probe, way, seed))
    known = Path(options.keep).read_text().splitlines() if options.keep and Path(options.keep).exists() else []
    for line in map(json.loads, known):
        if line["key"] == key:
            return Trained(**line["run"])
    run = train(options, plan, way, seed)
    if options.keep:
        with Path(options.keep).open("a") as file:
            file.write(json.dumps({"key": key, "run": asdict(run)}) + "\n")
    return run


def train(options: argparse.Namespace, plan: Plan, way: Way, seed: int) -> Trained:
    """One run of `megadpo train` and its log."""
    model, steps, batch, rate, held_out = plan.model, plan.steps, plan.batch, plan.rate, plan.held_out
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        probe = {"fp8_probe_steps": steps, "fp8_probe_groups": options.probe} if way.recipe else {}
        config = {
            "run_dir": f"{folder}/run",
            "seed": seed,
            "model": {"path": str(model), "dtype": "bfloat16", **way.settings},
            "data": {
                "train": options.train,
                "eval": options.eval if held_out else [],
                "max_length": 512,
                "num_proc": 1,
                "cache_dir": f"{options.folder}/cache",
            },
            "reference": {"mode": "resident"},
            "batch": {"global_batch_size": batch},
            "optimizer": {"learning_rate": rate, "lr_scheduler_type": "constant", "warmup_ratio": 0},
            "train": {"max_steps": steps, **probe},
            "export": {"enabled": False},
        }
        path = Path(folder, "run.yaml")
        path.write_text(yaml.safe_dump(config))
        started = time.monotonic()
        command = [
            sys.executable,
            "-c",
            "import sys; from megadpo.cli import main; sys.exit(main())",
            "train",
            str(path),
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        if done.returncode:
            raise RuntimeError(f"{way}: exit code {done.returncode}\n{done.stdout}{done.stderr}"[-3000:])
        seconds = time.monotonic() - started
        records = [json.loads(line) for line in Path(folder, "run", "metrics.jsonl").read_text().splitlines()]
    trained = [record for record in records if "loss" in record]
    after = next((record for record in records if "eval_loss" in record), {})

    def figures(record: dict[str, Any]) -> dict[str, float]:
        return {name[4:]: value for name, value in record.items() if name.startswith("fp8/")}

    return Trained(
        [record["loss"] for record in trained],
        [record["grad_norm"] for record in trained],
        after.get("eval_loss"),
        after.get("eval_rewards/accuracies"),
        figures(records[0]) if records[0]["step"] == 0 else {},
        figures(trained[-1]),
        seconds,
    )


def compared(mine: list[Trained], plain: list[Trained], name: str, digits: int) -> str:
    """Mean difference to bfloat16, with its standard error where there is more than one order."""
    if getattr(mine[0], name) is None:
        return "-"
    values = [getattr(one, name) - getattr(other, name) for one, other in zip(mine, plain, strict=True)]
    mean = f"{statistics.mean(values):+.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values) / len(values) ** 0.5:.{digits}f}"


def table(runs: dict[tuple[Way, int], Trained], seeds: list[int]) -> list[str]:
    """A row per way; what is compared with bfloat16 is compared seed by seed."""
    plain = [runs[Way(None), seed] for seed in seeds]
    lines = [
        "| recipe | format | ends in bf16 | token at start (mean, max) | response | margin | token at end | margin | "
        "loss, mean difference | held-out loss | held-out accuracy |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for way in [way for way in WAYS if (way, seeds[0]) in runs]:
        mine = [runs[way, seed] for seed in seeds]

        def probe(when: str, name: str, mine: list[Trained] = mine) -> str:
            values = [getattr(run, when).get(name) for run in mine]
            return "not measured" if values[0] is None else f"{statistics.mean(values):.3f}"

        loss = [
            statistics.mean(abs(a - b) for a, b in zip(one.losses, other.losses, strict=True))
            for one, other in zip(mine, plain, strict=True)
        ]
        start = f"{probe('start', 'token_drift')}, {probe('start', 'token_drift_max')}" if mine[0].start else "-"
        lines.append(
            f"| {way.recipe} | {way.format} | {'yes' if way.ends else 'no'} | {start} | "
            f"{probe('start', 'response_drift') if mine[0].start else '-'} | "
            f"{probe('start', 'margin_drift') if mine[0].start else '-'} | {probe('end', 'token_drift')} | "
            f"{probe('end', 'margin_drift')} | {statistics.mean(loss):.4f} | "
            f"{compared(mine, plain, 'held_out_loss', 4)} | {compared(mine, plain, 'accuracy', 3)} |"
        )
    if plain[0].accuracy is not None:
        loss, accuracy = ([getattr(run, name) for run in plain] for name in ("held_out_loss", "accuracy"))
        lines += ["", f"bfloat16: held-out loss {statistics.mean(loss):.4f}, accuracy {statistics.mean(accuracy):.3f}."]
    return lines


def picture(named: dict[str, dict[tuple[Way, int], Trained]], seeds: dict[str, list[int]]) -> str:
    """An SVG: mean drift per token after training, a bar for every way, one block per model."""
    bars: list[tuple[str, str, float]] = []
    for name, runs in named.items():
        for way in [way for way in WAYS if (way, seeds[name][0]) in runs]:
            value = statistics.mean(runs[way, seed].end["token_drift"] for seed in seeds[name])
            bars.append((name, f"{way.recipe} {way.format}{', ends in bf16' if way.ends else ''}", value))
    left, width, step, top = 230, 380, 16, 30
    most = max(value for *_, value in bars)
    parts, y, model = [], top, ""
    for name, label, value in bars:
        if name != model:
            y, model = y + 22, name
            parts.append(f'<text x="{left}" y="{y - 6}" font-weight="bold">{name}</text>')
        parts += [
            f'<text x="{left - 8}" y="{y + 11}" text-anchor="end">{label}</text>',
            f'<rect x="{left}" y="{y + 2}" width="{width * value / most:.1f}" height="{step - 5}" fill="#1f6feb"/>',
            f'<text x="{left + width * value / most + 6:.1f}" y="{y + 11}">{value:.3f}</text>',
        ]
        y += step
    head = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + width + 70}" height="{y + 20}" '
        'font-family="sans-serif" font-size="11">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="{left}" y="20">mean difference to bfloat16 after training, nats per token</text>',
    ]
    return "\n".join([*head, *parts, "</svg>"]) + "\n"


def machine() -> str:
    """The processor, as the system names it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()}, torch {torch.__version__}"


def commit() -> str:
    git = ["git", "-C", str(RESULTS), "rev-parse", "--short", "HEAD"]
    return subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", required=True, help="Hugging Face folder to start from")
    parser.add_argument("--train", required=True, help="pairs to train on")
    parser.add_argument("--eval", required=True, help="held-out pairs")
    parser.add_argument("--only", nargs="+", choices=RECIPES, default=RECIPES, help="only these recipes")
    parser.add_argument("--steps", type=int, default=20, help="updates (default 20)")
    parser.add_argument("--batch", type=int, default=16, help="pairs per update (default 16)")
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="orders of the data (default 0 1)")
    parser.add_argument("--wide-steps", type=int, default=2, help="updates of the wide random model (default 2)")
    parser.add_argument("--wide-batch", type=int, default=2)
    parser.add_argument("--wide-learning-rate", type=float, default=1e-5)
    parser.add_argument("--probe", type=int, default=16, help="groups of the probe (default 16)")
    parser.add_argument("--threads", type=int, default=1, help="threads of a run (default 1)")
    parser.add_argument("--keep", help="a file for what every run came to")
    parser.add_argument("--write", action="store_true", help="write tools/results/fp8_drift.md and .svg")
    options = parser.parse_args()
    for name in ("model", "train", "eval"):
        setattr(options, name, str(Path(getattr(options, name)).resolve()))
    named: dict[str, dict[tuple[Way, int], Trained]] = {}
    seeds: dict[str, list[int]] = {}
    lines = [
        "# Emulated FP8 beside bfloat16",
        "",
        "![drift per token](fp8_drift.svg)",
        "",
        f"Written by `python tools/drift_study.py {' '.join(shown(options))}`, commit {commit()}, on",
        f"{machine()}.",
        "",
        "Differences are absolute and in nats: of a token's log-probability (mean and largest), of a response's, of",
        f"the margin (chosen minus rejected), on a probe of {options.probe} training pairs; the same weights in FP8",
        "and in bfloat16. Loss and what is held out are compared with the bfloat16 run from the same weights on the",
        "same pairs in the same order; of several orders it is the mean difference and its standard error, of one the",
        "difference alone, whose noise is not known. What is held out is computed as the run computes: in FP8, except",
        "for delayed scaling, whose passes without a gradient are in bfloat16. At the start formats do not differ:",
        "only gradients do. Delayed scaling is not measured before it has scales.",
    ]
    with tempfile.TemporaryDirectory() as folder:
        options.folder = folder
        given = Path(options.model)
        plans = [Plan(given.name, given, options.steps, options.batch, options.learning_rate, options.seeds, True)]
        if options.wide_steps:
            wide = write_wide(Path(folder, "wide"), given)
            name = f"random Llama, {WIDE['layers']} layers of {WIDE['hidden']}"
            how = (options.wide_steps, options.wide_batch, options.wide_learning_rate, options.seeds[:1])
            plans.append(Plan(name, wide, *how, False))
        for plan in plans:
            runs = named[plan.name] = {}
            seeds[plan.name] = plan.seeds
            for seed in plan.seeds:
                for way in [Way(None), *(way for way in WAYS if way.recipe in options.only)]:
                    runs[way, seed] = kept(options, plan, way, seed)
                    print(plan.name, way, seed, runs[way, seed], flush=True)
            said = f"{plan.steps} steps of {plan.batch} pairs, learning rate {plan.rate:g}"
            lines += ["", f"## {plan.name}", "", f"{said}; orders of the data: {len(plan.seeds)}."]
            lines += ["", *table(runs, plan.seeds)]
    text = "\n".join(lines) + "\n"
    print(text)
    if options.write:
        (RESULTS / "fp8_drift.md").write_text(text)
        (RESULTS / "fp8_drift.svg").write_text(picture(named, seeds))
    return 0


def shown(options: argparse.Namespace) -> list[str]:
    """The options that decide the figures, without paths."""
    words = [f"--steps {options.steps}", f"--batch {options.batch}", f"--learning-rate {options.learning_rate:g}"]
    words.append(f"--seeds {' '.join(map(str, options.seeds))}")
    wide = f"{options.wide_steps} --wide-batch {options.wide_batch} --wide-learning-rate {options.wide_learning_rate:g}"
    return [*words, f"--wide-steps {wide}", f"--probe {options.probe}"]


if __name__ == "__main__":
    raise SystemExit(main())
