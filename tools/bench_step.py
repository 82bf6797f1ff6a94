"""Training steps side by side on this machine's processors: pairs per second and memory, in one run, taking turns.

    python tools/bench_step.py --compare padded,packed,shared
    python tools/bench_step.py --against trl --data dpo_en_demo.json

--compare: three layouts of the same pairs through megadpo's own engine. padded is how other trainers lay pairs out:
every response in its own row after its prompt, filled up to the longest row of the micro-batch. packed: responses one
after the other, each after its prompt. shared: the prompt once for both. Lengths are log-normal.

TRL's sides may be named here too: trl, trl-precomputed, trl-liger. On a GPU use --device cuda --dtype bfloat16 --alone.

--against trl: TRL's DPOTrainer on the same model and the same token ids, in file order. TRL computes its reference in
every step (`trl`) or ahead (`trl-precomputed`); megadpo ahead. So two comparisons are made: with the reference on both
sides (megadpo's pass is added to its steps) and without it on either.

The model is a Llama with random weights, made here, float32. Every side is a process that stays; they do one update
each, in turn, so what else the machine does meets all alike. The first turns (--warm-up) are not counted. Table:
medians over the repeats; ratios are taken turn by turn, and their median, lowest and highest are given. Processor
seconds (all threads) are given too: other load moves them less than it moves the clock.

Memory is resident memory over that of the process before its model was built, the sum over a side's processes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
from make_demo import SPECIAL_TOKENS, write_tokenizer
from step_sides import LAYOUTS, TRL, Work

from megadpo.config import DataConfig
from megadpo.data import synthetic
from megadpo.data.kinds import Wanted
from megadpo.data.prepare import prepare
from megadpo.data.records import Group, read_groups
from megadpo.data.store import GroupStore
from megadpo.data.synthetic import Lengths, random_groups
from megadpo.data.tokenize import TokenizedGroup
from megadpo.errors import MegadpoError

SIDES = (*LAYOUTS, *TRL)
AGAINST = ("trl", "trl-precomputed")
LOSSES_APART = {"float32": 1e-3, "bfloat16": 3e-2}
"""Nats between the losses of two sides at the same step, from which on they do not do the same work. In bfloat16 a
response's log-probability has an error of tenths of a nat, of which the loss has beta, averaged over a batch."""


@dataclass(frozen=True)
class ModelSize:
    vocab: int
    hidden: int
    layers: int
    ffn: int
    heads: int = 8
    kv_heads: int = 4
    positions: int = 2048


# What the sides work on ------------------------------------------------------------------------------------


def write_model(folder: Path, size: ModelSize, seed: int, dtype: str = "float32", device: str = "cpu") -> int:
    """A Llama with random weights; its number of parameters. device: where they are drawn."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=size.vocab,
        hidden_size=size.hidden,
        intermediate_size=size.ffn,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        max_position_embeddings=size.positions,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=None,
        dtype=dtype,
    )
    torch.manual_seed(seed)
    with torch.device(device):
        model = LlamaForCausalLM(config).to(getattr(torch, dtype))
    model.save_pretrained(folder)
    return int(sum(parameter.numel() for parameter in model.parameters()))


def write_store(folder: Path, pairs: Sequence[TokenizedGroup], vocab: int) -> GroupStore:
    """The pairs as a store, and as JSON lines for a side that does not know stores."""
    folder.mkdir(parents=True)
    store = synthetic.write_store(folder, pairs, vocab)
    with (folder / "pairs.jsonl").open("w") as file:
        for pair in pairs:
            chosen, rejected = (ids.tolist() for ids in pair.response_ids)
            row = {"prompt_ids": pair.prompt_ids.tolist(), "chosen_ids": chosen, "rejected_ids": rejected}
            file.write(json.dumps(row) + "\n")
    return store


def texts(data: Path) -> Iterator[str]:
    """Every text of a data set, for a tokenizer to be trained on."""
    for group in read_groups(str(data), None, "auto"):
        if isinstance(group, Group):
            for text in (group.prompt, *group.responses):
                if isinstance(text, str):
                    yield text
                else:
                    yield from (turn.content for turn in text)


def data_pairs(data: Path, model: Path, max_length: int, cache: Path) -> list[TokenizedGroup]:
    """The pairs of a file as megadpo tokenises them."""
    config = DataConfig(train=(str(data),), max_length=max_length, cache_dir=str(cache), num_proc=1)
    store = prepare(config.train, config, str(model), Wanted("pairs"))
    return [store.group(number) for number in range(len(store))]


# The sides -------------------------------------------------------------------------------------------------


class SideFailedError(Exception):
    """A side ended before its last turn."""


@dataclass
class Side:
    """Its processes, and what they answered: one record per turn."""

    name: str
    processes: list[subprocess.Popen[str]]
    steps: list[dict[str, float]] = field(default_factory=list)
    references: list[dict[str, float]] = field(default_factory=list)
    memory: dict[str, float] = field(default_factory=dict)

    def ask(self, word: str) -> dict[str, float]:
        """Give the turn to all its processes and wait: the longest time, the sum of everything else."""
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write(word + "\n")
            process.stdin.flush()
        return together([self._answer(process) for process in self.processes])

    def wait_ready(self) -> None:
        for process in self.processes:
            self._answer(process)

    def _answer(self, process: subprocess.Popen[str]) -> dict[str, float]:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise SideFailedError(f"{self.name}: ended with exit code {process.wait()}; what it said stands above")
        answer: dict[str, float] = json.loads(line)
        return answer


def together(answers: list[dict[str, float]]) -> dict[str, float]:
    """One record of a side's processes."""
    summed = {name: sum(answer[name] for answer in answers) for name in answers[0]}
    for name, combine in (("seconds", max), ("loss", statistics.mean)):
        if name in summed:
            summed[name] = combine([answer[name] for answer in answers])
    return summed


def start(name: str, work: Work, python: str, folder: Path) -> Side:
    """Start a side's processes and wait until they are ready."""
    environment = os.environ | {"OMP_NUM_THREADS": str(work.threads), "GLOO_SOCKET_IFNAME": "lo"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HOME": str(folder / "hf")}
    script = Path(__file__).with_name("step_sides.py")
    meeting = f"file://{folder}/meeting-{name}"
    processes = [
        subprocess.Popen(
            [python, str(script), json.dumps(asdict(replace(work, rank=rank, rendezvous=meeting)))],
            env=environment | {"PYTHONPATH": str(script.parents[1])},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(folder / f"{name}-{rank}.log").open("w"),
            text=True,
        )
        for rank in range(work.ranks)
    ]
    side = Side(name, processes)
    side.wait_ready()
    return side


def take_turns(sides: list[Side], steps: int) -> None:
    """First every side that can its reference passes, then all the steps; turn about, nobody while another works."""
    for _ in range(steps):
        for side in sides:
            if side.name not in TRL:
                side.references.append(side.ask("reference"))
    for _ in range(steps):
        for side in sides:
            side.steps.append(side.ask("step"))
    for side in sides:
        side.memory = side.ask("end")


def alone(side: Side, steps: int) -> Side:
    """All its turns, then its end: for sides that do not fit on a GPU together."""
    take_turns([side], steps)
    for process in side.processes:
        process.wait()
    return side


# Figures ---------------------------------------------------------------------------------------------------


def pairs_per_second(seconds: Iterable[float], batch: int) -> float:
    return batch / statistics.median(seconds)


def ratio(faster: Sequence[float], slower: Sequence[float]) -> str:
    """How many times as fast, turn by turn: median (lowest - highest)."""
    ratios = [b / a for a, b in zip(faster, slower, strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} - {max(ratios):.2f})"


def values(records: Iterable[dict[str, float]], what: str = "seconds") -> list[float]:
    return [record[what] for record in records]


def table(rows: list[list[str]]) -> str:
    """Markdown; the first row is the head."""
    head, *body = rows
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def side_table(sides: list[Side], batch: int, warm_up: int) -> str:
    rows = [["side", "pairs/s", "s per step", "processor s", "rows per step", "peak memory, MiB"]]
    for side in sides:
        counted = side.steps[warm_up:]
        taken = values(counted)
        rows.append(
            [
                side.name,
                f"{pairs_per_second(taken, batch):.3f}",
                f"{statistics.median(taken):.2f} ({min(taken):.2f} - {max(taken):.2f})",
                f"{statistics.median(values(counted, 'processor')):.2f}",
                f"{statistics.mean(values(counted, 'rows')):.0f}" if "rows" in counted[0] else "",
                f"{side.memory['peak']:.0f}",
            ]
        )
    return table(rows)


def compare_table(sides: list[Side], warm_up: int) -> str:
    """Each layout against the one before it."""
    rows = [["", "by the clock", "by processor time"]]
    for slower, faster in itertools.pairwise(sides):
        measured = [
            ratio(values(faster.steps[warm_up:], what), values(slower.steps[warm_up:], what))
            for what in ("seconds", "processor")
        ]
        rows.append([f"{faster.name} over {slower.name}", *measured])
    return table(rows)


def against_table(ours: Side, trl: Side, trl_ahead: Side, batch: int, warm_up: int) -> str:
    """With the reference on both sides, and without it on either."""
    rows = [["", "megadpo pairs/s", "TRL pairs/s", "ratio by the clock", "ratio by processor time"]]
    for words, theirs, counts in (("reference counted", trl, True), ("reference not counted", trl_ahead, False)):
        measured = {}
        for what in ("seconds", "processor"):
            mine = values(ours.steps, what)
            if counts:
                mine = [step + scored for step, scored in zip(mine, values(ours.references, what), strict=True)]
            measured[what] = mine[warm_up:], values(theirs.steps[warm_up:], what)
        speeds = [f"{pairs_per_second(taken, batch):.3f}" for taken in measured["seconds"]]
        rows.append([words, *speeds, ratio(*measured["seconds"]), ratio(*measured["processor"])])
    return table(rows)


def same_losses(sides: list[Side], most: float = LOSSES_APART["float32"]) -> str:
    """Says how far the losses of the same step are apart; raises SideFailedError where they are not the same."""
    losses = [values(side.steps, "loss") for side in sides]
    apart = max(max(step) - min(step) for step in zip(*losses, strict=True))
    if apart > most:
        raise SideFailedError(f"the sides do not train the same thing: losses of one step are {apart:.1e} apart")
    return f"Losses of the same step are at most {apart:.1e} apart."


def machine() -> str:
    """The processor, what is installed, the commit."""
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "megatron-core", "transformers"))
    here = Path(__file__).parent
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"],
        cwd=here,
        capture_output=True,
        text=True,
        check=False,
    )
    load = ", ".join(f"{average:.1f}" for average in os.getloadavg())
    return (
        f"{names[0].partition(': ')[2]}, {len(os.sched_getaffinity(0))} cores; Python {platform.python_version()}, "
        f"{packages}; commit {described.stdout.strip()}; load averages at the end {load}"
    )


# The two commands ------------------------------------------------------------------------------------------


def compare(args: argparse.Namespace, folder: Path) -> Iterator[str]:
    names = args.compare.split(",")
    if unknown := set(names) - {*LAYOUTS, *TRL}:
        raise SideFailedError(f"--compare {args.compare}: {', '.join(unknown)} is not one of {', '.join(SIDES)}")
    steps = args.warm_up + args.repeats
    size = _size(args)
    lengths = Lengths(args.prompt, args.response, args.spread, args.max_length)
    parameters = write_model(folder / "model", size, args.seed, args.dtype, args.device)
    if set(names) & {*TRL}:  # which wants a tokenizer, for the id that it pads with
        write_tokenizer(folder / "model", iter(()), 256 + len(SPECIAL_TOKENS), size.positions)
    store = write_store(
        folder / "store", random_groups(steps * args.batch, lengths, size.vocab, args.seed, Wanted("pairs")), size.vocab
    )
    yield _about(parameters, store, args)
    work = Work("", str(folder / "model"), str(folder / "store"), args.batch, args.micro, steps, args.threads)
    work = replace(work, ranks=args.ranks, dtype=args.dtype, on_gpu=args.device == "cuda")
    work = replace(work, budget=args.budget, recompute=args.recompute)

    def begun(name: str) -> Side:
        theirs = name in TRL
        own = replace(
            work,
            side=name,
            micro=(args.trl_micro or args.micro) if theirs else args.micro,
            ranks=1 if theirs else args.ranks,
        )
        return start(name, own, args.trl_python if theirs else sys.executable, folder)

    if args.alone:
        sides = [alone(begun(name), steps) for name in names]
    else:
        sides = [begun(name) for name in names]
        take_turns(sides, steps)
    yield side_table(sides, args.batch, args.warm_up)
    if len(sides) > 1:
        yield compare_table(sides, args.warm_up)
        yield same_losses(sides, LOSSES_APART[args.dtype])


def against(args: argparse.Namespace, folder: Path) -> Iterator[str]:
    if args.data is None:
        raise SideFailedError("--against trl needs --data FILE")
    steps, model = args.warm_up + args.repeats, folder / "model"
    size = _size(args)
    parameters = write_model(model, size, args.seed)
    write_tokenizer(model, texts(args.data), size.vocab, size.positions)
    pairs = data_pairs(args.data, model, args.max_length, folder / "cache")
    if steps * args.batch > len(pairs):
        raise SideFailedError(f"{steps} steps of {args.batch} need more than the {len(pairs)} pairs of {args.data}")
    store = write_store(folder / "store", pairs[: steps * args.batch], size.vocab)
    yield _about(parameters, store, args)
    work = Work("", str(model), str(folder / "store"), args.batch, args.micro, steps, args.threads)
    own = replace(work, side="shared", micro=None, threads=args.threads // args.ranks, ranks=args.ranks)
    ours = start("shared", own, sys.executable, folder)
    theirs = [start(name, replace(work, side=name), args.trl_python, folder) for name in AGAINST]
    take_turns([theirs[0], ours, theirs[1]], steps)
    yield side_table([ours, *theirs], args.batch, args.warm_up)
    yield against_table(ours, theirs[0], theirs[1], args.batch, args.warm_up)
    yield (
        f"megadpo: {args.ranks} data-parallel process(es) of {args.threads // args.ranks} thread(s). TRL: one process "
        f"of {args.threads} threads, {args.micro or args.batch} pairs per forward pass. {same_losses([ours, *theirs])}"
    )


def _size(args: argparse.Namespace) -> ModelSize:
    return ModelSize(args.vocab, args.hidden, args.layers, args.ffn, args.heads, args.kv_heads, args.max_length + 16)


def _about(parameters: int, store: GroupStore, args: argparse.Namespace) -> str:
    prompt = store.prompt_lengths.astype(float)
    both = np.add.reduceat(store.response_lengths, store.offsets[:-1])
    return (
        f"Llama of {parameters / 1e6:.1f} M parameters ({args.layers} layers, hidden {args.hidden}, vocabulary "
        f"{args.vocab}), {args.dtype}. {len(store)} pairs: prompts of {prompt.mean():.0f} tokens on average, responses "
        f"of {both.mean() / 2:.0f}; prompt tokens are {prompt.sum() / (prompt.sum() + both.sum()):.0%} of prompt + "
        f"chosen + rejected. {args.batch} pairs per update, {args.warm_up} + {args.repeats} updates, {args.threads} "
        "threads."
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--compare", metavar="LAYOUT,LAYOUT", help=f"of {', '.join(LAYOUTS)}")
    which.add_argument("--against", choices=("trl",))
    parser.add_argument("--data", type=Path, help="preference pairs, for --against")
    parser.add_argument("--trl-python", default=sys.executable, help="a Python that has TRL")
    parser.add_argument("--batch", type=int, default=8, help="pairs per update (%(default)s)")
    parser.add_argument(
        "--micro", type=int, help="most pairs in a forward pass (the whole batch); of TRL with --against"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--warm-up", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2, help="of each side, over all its processes (%(default)s)")
    parser.add_argument("--ranks", type=int, default=1, help="megadpo's data-parallel processes (%(default)s)")
    parser.add_argument("--prompt", type=int, default=256, help="mean tokens, for --compare (%(default)s)")
    parser.add_argument("--response", type=int, default=128, help="mean tokens, for --compare (%(default)s)")
    parser.add_argument("--spread", type=float, default=0.6, help="deviation of log-lengths (%(default)s)")
    parser.add_argument("--max-length", type=int, default=1024, help="prompt + one response (%(default)s)")
    parser.add_argument("--vocab", type=int, default=16384)
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--ffn", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of all sides (%(default)s)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="for --compare")
    parser.add_argument("--alone", action="store_true", help="one side after the other: where two do not fit on a GPU")
    parser.add_argument("--budget", type=int, help="rows of a stream, of packed and shared (chosen from the pairs)")
    parser.add_argument("--trl-micro", type=int, help="most pairs in TRL's forward pass, for --compare (--micro)")
    parser.add_argument("--recompute", action="store_true", help="layers again in the backward pass, on all sides")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        try:
            for text in (compare if args.compare else against)(args, Path(folder)):
                print(text + "\n", flush=True)
        except (SideFailedError, MegadpoError) as error:
            for log in sorted(Path(folder).glob("*.log")):
                print(log.read_text()[-2000:], file=sys.stderr)
            print(f"bench_step: {error}", file=sys.stderr)
            return 2
    print(f"{machine()}.\n\n    python tools/bench_step.py {shlex.join(argv or sys.argv[1:])}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
