"""`megadpo score --reward`: a reward model's scores of every response of a data set."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch.distributed as dist

from megadpo.config import Config
from megadpo.convert.importer import check_hf, load_hf
from megadpo.data.kinds import Wanted
from megadpo.data.prepare import prepare
from megadpo.data.rescore import check_out, write_scores
from megadpo.data.store import GroupStore
from megadpo.data.stream import open_streams
from megadpo.data.tokenizer import check_vocabulary, load_tokenizer
from megadpo.errors import ModelError
from megadpo.model.build import build_chunks
from megadpo.model.flops import group_cost
from megadpo.observe.progress import Screen, Terminal
from megadpo.parallel.context import from_first_rank, grid, join_world
from megadpo.parallel.ranks import Rank
from megadpo.parallel.watchdog import Watchdog, and_then
from megadpo.train.inputs import read_shapes
from megadpo.train.loop import groups_per_pass
from megadpo.train.score import score_groups


def run_scoring(config: Config, out: str, rank: Rank) -> int:
    """Score data.train, one source, with the reward model at model.path, and write its rows with the scores to `out`.

    Any kind of data will do. Rows that cannot be read as groups of tokens have null; how many is said.
    """
    shape = read_shapes(config, rank.world_size).policy
    folder, target = Path(config.model.path).expanduser(), Path(out).expanduser()
    if shape.head != "scalar":
        raise ModelError(f"{folder}: is no reward model (docs/reward_model.md); train one with loss_type: reward")
    screen = Screen(Terminal(sys.__stdout__))
    with Watchdog(config.train.hang_timeout) as watch:
        device = join_world(rank.rank, rank.world_size, rank.local_rank, rank.init_method)

        def prepared(sign: Callable[[], None]) -> str:
            check_out(target)
            check_hf(shape, folder)
            check_vocabulary(
                load_tokenizer(config.data.tokenizer or str(folder), config.data.chat_template), shape.vocab_size
            )
            got_on = watch.phase("tokenising")
            with screen.task("rows", None) as task:
                wanted = Wanted(kind=None, scalar=True)
                rows = and_then(and_then(task.to, got_on), sign)
                end = partial(watch.slowly, "bringing the tokenised data to the disk")
                store = prepare(config.data.train, config.data, str(folder), wanted, config.batch, rows, end)
            return str(store.folder)

        waiting = partial(watch.slowly, "rank 0, which prepares the data,")
        waiting()
        store = GroupStore.open(from_first_rank(rank.rank, rank.world_size, prepared, waiting))
        with grid(config.parallel, device, config.seed) as context:
            [stream] = open_streams(
                config, [store], context.data_size, group_cost(shape), fixed_length=device.type == "cuda"
            )
            got_on = watch.phase(f"loading {folder}")
            chunks = build_chunks(shape, config.parallel, context, config.model)
            load_hf(chunks, shape, folder, got_on)
            groups = np.arange(len(store))
            with screen.task("rewards: groups", len(groups)) as task:
                progress = and_then(task.to if context.is_first else lambda done: None, watch.phase("scoring"))
                column = score_groups(chunks, stream, groups, groups_per_pass(config), context, progress)
        dist.destroy_process_group()
    if rank.rank == 0:
        spans = zip(store.offsets, store.offsets[1:], strict=False)
        scores = {store.group(g).origin: tuple(column[a:b].tolist()) for g, (a, b) in enumerate(spans)}
        [source] = config.data.train
        missing = write_scores(source, config.data.split, config.data.format, scores, target)
        for line in store.report.lines():
            screen.line(line)
        screen.line(f"{target}: {store.report.rows_read} rows" + (f", {missing} without a score" if missing else ""))
    return 0
