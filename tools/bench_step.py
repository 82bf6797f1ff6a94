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
import json
import shlex
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from make_demo import SPECIAL_TOKENS, write_tokenizer
from step_figures import LOSSES_APART, against_table, compare_table, machine, same_losses, side_table
from step_sides import LAYOUTS, TRL, Work
from step_turns import Side, SideFailedError, alone, start, take_turns

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
