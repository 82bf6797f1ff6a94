"""Run a function in N gloo ranks from inside a test.

The test process imports torch and Megatron-Core once and forks its ranks, so a grid costs tenths of a second. Ranks
use one thread each; the rendezvous is a file, so no ports can collide.
"""

import multiprocessing
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch

from megadpo.observe.quiet import quiet

with quiet():
    # imported here so that forked ranks find it done
    import megadpo.train.loop  # noqa: F401


def run_ranks(
    world: int,
    function: Callable[..., Any],
    *args: Any,
    timeout: float = 240,
    method: Literal["fork", "spawn"] = "fork",
) -> list[Any]:
    """Call `function(device, *args)` in `world` ranks; returns every rank's result (anything torch.save takes).

    A rank that raises fails the test with its traceback; the others are killed. So are all after `timeout` seconds.
    method: spawn where a rank or this process uses CUDA.
    """
    with tempfile.TemporaryDirectory() as folder:
        start: Any = multiprocessing.get_context(method)
        ranks = [start.Process(target=_rank, args=(rank, world, Path(folder), function, args)) for rank in range(world)]
        for process in ranks:
            process.start()
        try:
            _wait(ranks, Path(folder), timeout)
            return [torch.load(Path(folder, f"{rank}.pt"), weights_only=False) for rank in range(world)]
        finally:
            for process in ranks:
                if process.is_alive():
                    os.kill(process.pid or 0, signal.SIGKILL)
                process.join()


def _wait(ranks: list, folder: Path, timeout: float) -> None:
    end = time.monotonic() + timeout
    running = True
    while running:
        running = any(process.is_alive() for process in ranks)  # asked first, so that the last look sees every end
        for rank, process in enumerate(ranks):
            if process.exitcode not in (None, 0):
                error = folder / f"{rank}.error"
                text = error.read_text() if error.exists() else f"killed, exit code {process.exitcode}"
                raise AssertionError(f"rank {rank}: {text}")
        if running and time.monotonic() > end:
            raise AssertionError(f"ranks still running after {timeout} s")
        time.sleep(0.02)


def _rank(rank: int, world: int, folder: Path, function: Callable[..., Any], args: tuple) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    with quiet():
        try:
            from megadpo.parallel.context import join_world

            device = join_world(rank, world, rank, f"file://{folder}/rendezvous")
            result = function(device, *args)
            torch.save(result, folder / f"{rank}.tmp")
            os.replace(folder / f"{rank}.tmp", folder / f"{rank}.pt")
            torch.distributed.destroy_process_group()
        except BaseException:
            (folder / f"{rank}.error").write_text(traceback.format_exc())
            raise SystemExit(1) from None
