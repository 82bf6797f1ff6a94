"""The timed sides of tools/bench_step.py. Each is a process that does one thing whenever its turn comes.

A turn is one line on standard input (`reference` or `step`), answered with one JSON line on standard output when the
work is done: seconds by the clock and seconds of processor time. `end` is answered with the memory used. Sides stay
alive between their turns, so that several can take turns in one run and each has a peak of its own.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from megadpo.data.batch import PackedBatch
    from megadpo.data.store import GroupStore

LAYOUTS = ("padded", "packed", "shared")
TRL = ("trl", "trl-precomputed", "trl-liger")


@dataclass(frozen=True)
class Work:
    """What one process of a side does."""

    side: str
    """One of LAYOUTS, or of TRL."""
    model: str
    """Hugging Face folder."""
    store: str
    """Folder of a group store; the same pairs as JSON lines lie in it as pairs.jsonl."""
    batch: int
    """Pairs per update."""
    micro: int | None
    """Most pairs in a forward pass; for packed and shared None means as many as the token budget holds."""
    steps: int
    threads: int
    ranks: int = 1
    """Data-parallel processes of this side."""
    rank: int = 0
    rendezvous: str = ""
    learning_rate: float = 1e-6
    beta: float = 0.1
    dtype: str = "float32"
    """bfloat16: megadpo keeps float32 masters of bfloat16 weights, TRL float32 weights and autocasts."""
    on_gpu: bool = False
    budget: int | None = None
    """Rows of a stream, for packed and shared; None: chosen from the pairs."""
    recompute: bool = False
    """Every layer again in the backward pass."""


class Turns:
    """The other end of the pipe, and the clock."""

    def __init__(self, answers: IO[str], on_gpu: bool = False) -> None:
        self.answers = answers
        self.on_gpu = on_gpu
        self.start = memory()["VmRSS"]

    def wait(self) -> str:
        """Until it is this side's turn; the word that was said. The clock starts."""
        word = sys.stdin.readline().strip()
        if not word:
            sys.exit(1)  # the other end of the pipe is gone
        self._then, self._processor = time.perf_counter(), time.process_time()
        return word

    def done(self, **more: Any) -> None:
        if self.on_gpu:
            import torch

            torch.cuda.synchronize()
        record = {"seconds": time.perf_counter() - self._then, "processor": time.process_time() - self._processor}
        self.say(record | more)

    def ready(self) -> None:
        self.say({"ready": True})

    def end(self) -> None:
        """MiB at the highest: on a GPU what torch allocated there, on a CPU what the process took over what it had with
        its libraries loaded."""
        if self.on_gpu:
            import torch

            self.say({"peak": torch.cuda.max_memory_allocated() / 2**20})
            return
        self.say({"peak": memory()["VmHWM"] - self.start})

    def say(self, record: dict[str, Any]) -> None:
        print(json.dumps(record), file=self.answers, flush=True)


def memory() -> dict[str, float]:
    """This process's resident memory now (VmRSS) and at its highest (VmHWM), MiB."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(fields[name].split()[0]) / 1024 for name in ("VmRSS", "VmHWM")}


# megadpo ---------------------------------------------------------------------------------------------------


def megadpo_side(work: Work, answers: IO[str]) -> None:
    """Today's engine over one of three layouts; the steps are those of a run, without its log."""
    import numpy as np
    import torch

    from megadpo.config import BatchConfig, Config, DataConfig, ModelConfig, ParallelConfig, TrainConfig
    from megadpo.convert.families import read_shape
    from megadpo.convert.importer import load_hf
    from megadpo.data.store import GroupStore
    from megadpo.data.stream import open_streams
    from megadpo.model.build import build_chunks
    from megadpo.model.flops import group_cost
    from megadpo.objectives import DPO
    from megadpo.parallel.context import grid, join_world
    from megadpo.train.optimizer import build_optimizer, set_learning_rate, wrap
    from megadpo.train.passes import score
    from megadpo.train.state import TrainState
    from megadpo.train.step import train_step

    torch.set_num_threads(work.threads)
    turns = Turns(answers, work.on_gpu)
    folder, parallel = Path(work.model), ParallelConfig(data_parallel_size=work.ranks)
    config = Config(
        run_dir="",
        model=ModelConfig(work.model, work.dtype, "full" if work.recompute else "none"),
        data=DataConfig(()),
        parallel=parallel,
        batch=BatchConfig(work.batch, work.micro, work.budget, share_prompt=work.side == "shared"),
        train=TrainConfig(shuffle=False),
    )
    device = join_world(work.rank, work.ranks, 0, work.rendezvous)
    with grid(parallel, device, seed=0) as context:
        shape = read_shape(folder)
        modules = build_chunks(shape, parallel, context, config.model)
        load_hf(modules, shape, folder)
        chunks = wrap(modules, parallel)
        state = TrainState(chunks, build_optimizer(chunks, config.optimizer, parallel))
        set_learning_rate(state.optimizer, work.learning_rate)
        store, objective = GroupStore.open(Path(work.store)), DPO(beta=work.beta)
        [stream] = open_streams(config, [store], work.ranks, group_cost(shape), fixed_length=work.on_gpu)
        column = np.full(int(store.offsets[-1]), np.nan, dtype=np.float64)

        def batches(consumed: int) -> list[PackedBatch]:
            groups = stream.next_groups(consumed, work.batch)
            if work.side == "padded":
                return padded(store, groups[work.rank :: work.ranks], work.micro or work.batch, column)
            return stream.batches(groups, work.rank, column)

        scored = 0
        turns.ready()
        while (word := turns.wait()) != "end":
            if word == "reference":
                # each rank keeps what it computes: a step deals the same groups to the same ranks
                mine = batches(scored)
                for batch, scores in zip(mine, score(modules, mine, context), strict=True):
                    column[responses(store, batch.groups)] = scores.sums_S.cpu().numpy()
                scored += work.batch
                turns.done()
            else:
                mine = batches(state.consumed)
                sums, _ = train_step(state, mine, objective, None, context)
                turns.done(loss=sums.loss, rows=sum(len(batch.tokens_T) for batch in mine))
        turns.end()
    torch.distributed.destroy_process_group()


def responses(store: GroupStore, groups: tuple[int, ...]) -> np.ndarray:
    """int64: the groups' responses, by their numbers in the store."""
    import numpy as np

    return np.concatenate([np.arange(store.offsets[g], store.offsets[g + 1]) for g in groups])


def padded(store: GroupStore, groups: np.ndarray, micro: int, reference: np.ndarray | None) -> list[PackedBatch]:
    """Micro-batches as other trainers make them: every response in a row of its own, after its prompt, filled up to the
    longest row. What is filled up is computed and not scored."""
    from megadpo.data.batch import pack, stream_tokens

    batches = []
    for start in range(0, len(groups), micro):
        part = groups[start : start + micro].tolist()
        length = int(stream_tokens(store, share=False)[part].sum())
        batches.append(fill_up(pack(store, part, length, reference, share=False)))
    return batches


def fill_up(batch: PackedBatch) -> PackedBatch:
    """Every segment as long as the longest; token 0 stands where nothing stood."""
    import torch

    from megadpo.data.batch import Segment

    lengths = [s.end - s.start for s in batch.segments]
    longest = max(lengths)
    to = torch.cat([torch.arange(i * longest, i * longest + length) for i, length in enumerate(lengths)])
    tokens_T = torch.zeros(longest * len(lengths), dtype=torch.int64)
    tokens_T[to] = batch.tokens_T[: batch.used]
    segments = [Segment(i * longest, (i + 1) * longest, i * longest, i * longest) for i in range(len(lengths))]
    return replace(
        batch,
        tokens_T=tokens_T,
        positions_T=torch.arange(longest).repeat(len(lengths)),
        rows_N=to[batch.rows_N],
        segments=tuple(segments),
    )


# TRL -------------------------------------------------------------------------------------------------------


def trl_side(work: Work, answers: IO[str]) -> None:
    """TRL's DPOTrainer through trl_side.py. A step lasts from the turn to the moment before the next one would begin,
    so it has all that the trainer does: collating, the reference (with side `trl`), the update, its own log."""
    import torch
    import trl_side as other
    from transformers import TrainerCallback
    from trl import DPOTrainer  # noqa: F401  its imports belong to the start, not to the memory of training

    torch.set_num_threads(work.threads)
    turns = Turns(answers, work.on_gpu)

    class TakeTurns(TrainerCallback):
        began = False

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if self.began:
                turns.done(loss=state.log_history[-1]["loss"])
            else:
                turns.ready()
            self.began = True
            turns.wait()

        def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            [*_, loss] = [log["loss"] for log in state.log_history if "loss" in log]
            turns.done(loss=loss)

    run = other.TrlRun(
        model=work.model,
        steps=work.steps,
        batch=work.batch,
        micro_batch=work.micro,
        learning_rate=work.learning_rate,
        beta=work.beta,
        precompute_reference=work.side == "trl-precomputed",
        on_gpu=work.on_gpu,
        autocast=work.dtype == "bfloat16",
        liger=work.side == "trl-liger",
        recompute=work.recompute,
    )
    pairs = other.read_pairs(Path(work.store, "pairs.jsonl"))[: work.steps * work.batch]
    if found := run.problems(len(pairs)):
        raise ValueError("; ".join(found))
    other.train(run, pairs, callbacks=[TakeTurns()])
    turns.wait()
    turns.end()


def main() -> None:
    """The only argument is a Work as JSON. What libraries print goes to standard error."""
    work = Work(**json.loads(sys.argv[1]))
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)
        (trl_side if work.side in TRL else megadpo_side)(work, answers)


if __name__ == "__main__":
    main()
