"""The files of a conversion written by several processes: each has files of its own, and none waits for another."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from megadpo.errors import MachineError

T = TypeVar("T")
Report = Callable[[int], None]
"""Told how many bytes have been written since it was last called."""


class StoppedError(Exception):
    """Another process failed, or the user asked for the end."""


def run_all(tasks: Sequence[Callable[[Report], T]], processes: int, report: Report) -> list[T]:
    """Every task's result, in order. One process: here. More: in processes of their own; tasks are then pickled.

    The first error of a task is raised here, and the others stop at their next report. MachineError: one was killed.
    """
    if processes <= 1 or len(tasks) <= 1:
        return [task(report) for task in tasks]
    # Spawned, not forked: this process may have threads, and a fork keeps their locks but not the threads.
    context = multiprocessing.get_context("spawn")
    counter, stop = context.Value("q", 0), context.Event()
    with ProcessPoolExecutor(min(processes, len(tasks)), context, _start, (counter, stop)) as pool:
        futures: list[Future[T]] = [pool.submit(_run, task) for task in tasks]
        told, waiting = 0, set(futures)
        try:
            while waiting:
                done, waiting = wait(waiting, timeout=0.2, return_when=FIRST_EXCEPTION)
                for future in done:
                    future.result()
                report(counter.value - told)
                told = counter.value
            return [future.result() for future in futures]
        except BrokenProcessPool as error:
            raise MachineError(
                "a converting process was killed, most likely for want of memory; give a smaller --processes"
            ) from error
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


_shared: list[Any] = []
"""In a converting process: the counter of bytes and the sign to stop, which only a process's start can hand over."""


def _start(counter: Any, stop: Any) -> None:
    import torch

    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    faulthandler.register(signal.SIGUSR2, all_threads=True)  # as in the ranks (parallel/watchdog.py)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _shared[:] = [counter, stop]


def _end_with_parent() -> None:
    """A parent that is killed cannot end its children."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _run(task: Callable[[Report], T]) -> T:
    counter, stop = _shared

    def report(count: int) -> None:
        if stop.is_set():
            raise StoppedError
        with counter.get_lock():
            counter.value += count

    return task(report)
