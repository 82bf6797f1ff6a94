"""Run a function in N ranks with a GPU each. Unlike tests/distributed.py they are fresh processes: after a fork CUDA
cannot be used."""

import multiprocessing
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def on_gpus(world: int, function: Callable[..., Any], *args: Any, without_te: bool = False) -> list[Any]:
    """Call `function(device, *args)` in `world` ranks over NCCL; every rank's result (anything torch.save takes).

    without_te: as if Transformer Engine were not installed.
    """
    with tempfile.TemporaryDirectory() as folder:
        spawn = multiprocessing.get_context("spawn")
        job = (world, folder, without_te, function, args)
        ranks = [spawn.Process(target=_rank, args=(rank, *job)) for rank in range(world)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        errors = [path.read_text() for path in sorted(Path(folder).glob("*.error"))]
        assert not errors, errors[0]
        assert all(process.exitcode == 0 for process in ranks), [process.exitcode for process in ranks]
        return [torch.load(Path(folder, f"{rank}.pt"), weights_only=False, map_location="cpu") for rank in range(world)]


def _rank(rank: int, world: int, folder: str, without_te: bool, function: Callable[..., Any], args: tuple) -> None:
    try:
        from megadpo.parallel import mcore_fixes
        from megadpo.parallel.context import join_world

        if without_te:
            mcore_fixes.have_te = lambda: False
        device = join_world(rank, world, rank, f"file://{folder}/rendezvous")
        torch.save(function(device, *args), Path(folder, f"{rank}.pt"))
        torch.distributed.destroy_process_group()
    except BaseException:
        Path(folder, f"{rank}.error").write_text(f"rank {rank}: {traceback.format_exc()}")
        raise SystemExit(1) from None
