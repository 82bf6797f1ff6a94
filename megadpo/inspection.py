"""What `megadpo inspect --batch` shows: one packed stream of a run, and how well its first epoch packs.

Needs the run file, the prepared data and the model's config.json; starts no ranks and reads no weights.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch
from rich.text import Text

from megadpo.config import Config
from megadpo.convert.families import read_shape, with_head
from megadpo.data.batch import PackedBatch
from megadpo.data.kinds import wanted
from megadpo.data.packing import Bin
from megadpo.data.prepare import prepare
from megadpo.data.stream import Filling, Stream, open_streams
from megadpo.data.tokenizer import load_tokenizer
from megadpo.errors import DataError
from megadpo.model.flops import group_cost
from megadpo.observe.packed import Part, stream_text
from megadpo.observe.tokens import branch_names

MOST_STEPS = 200
"""Steps that the summary looks at."""


def batch_text(config: Config, which: str, ids: bool, width: int) -> Text:
    """The stream and its summary.

    which: NUMBER, a micro-batch of the first step, or STEP:NUMBER; steps count from 1, as in the log, micro-batches
    from 0. width: columns. Raises DataError where there is no such micro-batch.
    """
    step, number = _which(which)
    stream = _stream(config)
    size = config.batch.global_batch_size
    steps = -(-len(stream.store) // size)
    if not 1 <= step <= steps:
        raise DataError(f"--batch {which}: the first epoch has the steps 1 to {steps}")
    bins = stream.bins(_groups(stream, step, size))
    if number >= len(bins[0]):
        raise DataError(f"--batch {which}: data rank 0 has the micro-batches 0 to {len(bins[0]) - 1} in step {step}")
    [batch] = stream.pack([bins[0][number]], None)
    tokenizer = load_tokenizer(config.data.tokenizer or config.model.path, config.data.chat_template)
    drawn = stream_text(
        _parts(batch),
        batch.tokens_T.tolist(),
        batch.positions_T.tolist(),
        dict(zip(batch.rows_N.tolist(), batch.targets_N.tolist(), strict=True)),
        tokenizer.backend.piece,
        width,
        ids,
    )
    padding = len(batch.tokens_T) - batch.used
    lines = [f"micro-batch {number} of step {step}, data rank 0", ""]
    after = [f"rows {batch.used}-{len(batch.tokens_T) - 1}  padding"] if padding else []
    after += ["", *_batch_lines(stream, batch, bins[0][number]), *_step_lines(stream, bins, step)]
    after += _epoch_lines(stream, size, min(steps, MOST_STEPS), steps)
    if config.parallel.data_parallel_size is None:
        after.append("         parallel.data_parallel_size is not given: 1 is taken here")
    return Text("\n".join(lines) + "\n").append_text(drawn).append("\n" + "\n".join(after))


def _which(text: str) -> tuple[int, int]:
    if not re.fullmatch(r"(\d+:)?\d+", text):
        raise DataError(f"--batch {text}: must be NUMBER or STEP:NUMBER, such as 0 or 3:1")
    step, _, number = text.rpartition(":")
    return int(step or 1), int(number)


def _stream(config: Config) -> Stream:
    """The training stream as a run on this machine would have it, except for what only a launcher knows."""
    stores = [
        prepare(sources, config.data, config.model.path, wanted(config), config.batch)
        for sources in (config.data.train, config.data.eval)
        if sources
    ]
    folder = Path(config.model.path).expanduser()
    cost = group_cost(with_head(read_shape(folder), config.objective.head, folder))
    ranks = config.parallel.data_parallel_size or 1
    return open_streams(config, stores, ranks, cost, fixed_length=torch.cuda.is_available())[0]


def _groups(stream: Stream, step: int, size: int) -> np.ndarray:
    """Store numbers of the groups of a step of the first epoch."""
    consumed = (step - 1) * size
    return stream.next_groups(consumed, min(size, len(stream.store) - consumed))


def _parts(batch: PackedBatch) -> list[Part]:
    """Segments with the names of their groups and branches. A segment without a scored row is a group's prompt."""
    scored = np.zeros(len(batch.tokens_T), dtype=bool)
    scored[batch.rows_N.numpy()] = True
    counts = np.diff(batch.offsets_G1.numpy())
    owners = iter([(g, name) for g, k in zip(batch.groups, counts, strict=True) for name in branch_names(int(k))])
    waiting, parts = [], []
    for s in batch.segments:
        prefix = (s.prefix_start, s.prefix_end)
        if not scored[s.start : s.end].any():
            waiting.append((s.start, s.end, prefix))
            continue
        group, name = next(owners)
        parts += [Part(group, "prompt", *prompt) for prompt in waiting]
        parts.append(Part(group, name, s.start, s.end, prefix))
        waiting = []
    return parts


def _batch_lines(stream: Stream, batch: PackedBatch, bin_: Bin) -> list[str]:
    rows = len(batch.tokens_T)
    saved = int((stream.repeated_G - stream.tokens_G)[list(bin_)].sum())
    prompts = f"stand once: {saved} rows saved" if stream.share else "stand once per response (share_prompt: false)"
    return [
        f"stream   {rows} rows, {batch.used} used, {1 - batch.used / rows:.1%} padding, {len(batch.rows_N)} scored",
        f"groups   {len(batch.groups)}, with {_many(len(batch.tokens_S), 'response')}",
        f"prompts  {prompts}",
    ]


def _step_lines(stream: Stream, bins: list[list[Bin]], step: int) -> list[str]:
    filling = stream.filling(bins)
    return [
        f"step {step}   {_many(len(bins), 'data-parallel rank')} with {_many(len(bins[0]), 'micro-batch', 'es')} of at "
        f"most {stream.budget.tokens} rows each; {filling.padding_fraction:.1%} padding, load imbalance "
        f"{filling.load_imbalance:.1%}"
    ]


def _many(count: int, word: str, ending: str = "s") -> str:
    return f"{count} {word}{'' if count == 1 else ending}"


def _epoch_lines(stream: Stream, size: int, looked_at: int, steps: int) -> list[str]:
    """Over the first epoch, or as much of it as is looked at."""
    dealt = [stream.bins(_groups(stream, step, size)) for step in range(1, looked_at + 1)]
    fillings: list[Filling] = [stream.filling(bins) for bins in dealt]
    counts = [len(bins[0]) for bins in dealt]
    rows = sum(filling.rows for filling in fillings)
    every = sum(filling.rows / (1 - filling.padding_fraction) for filling in fillings)
    saved = sum(filling.prompt_tokens_saved for filling in fillings)
    imbalances = [filling.load_imbalance for filling in fillings]
    what = f"epoch    {steps} steps" if looked_at == steps else f"epoch    the first {looked_at} of {steps} steps"
    many = _many(counts[0], "micro-batch", "es")
    if min(counts) != max(counts):
        many = f"{min(counts)} to {max(counts)} micro-batches"
    return [
        f"{what} of {size} groups, {many} per rank and step",
        f"         {1 - rows / every:.1%} padding; {saved} prompt tokens saved by sharing, "
        f"{saved / (rows + saved):.1%} of the {rows + saved} without",
        f"         load imbalance of {_many(stream.ranks, 'data-parallel rank')}: "
        f"{np.mean(imbalances):.1%} on average, {max(imbalances):.1%} at most",
    ]
