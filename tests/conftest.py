"""Fixtures of the whole test tree."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

# Tests fork ranks from this process. A forked child that computes with several threads hangs in the thread pool that
# its parent had, so this process must never start one.
torch.set_num_threads(1)

# Started in the background by a shell, this process would have these ignored, and so would the runs that tests stop.
for signum, handler in (
    (signal.SIGINT, signal.default_int_handler),
    (signal.SIGTERM, signal.SIG_DFL),
    (signal.SIGHUP, signal.SIG_DFL),
    (signal.SIGUSR1, signal.SIG_DFL),
):
    signal.signal(signum, handler)

# Without a GPU, Triton's kernels are tested in its interpreter. Triton reads this when it is first imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

ROOT = Path(__file__).resolve().parents[1]


@pytest.hookimpl(tryfirst=True, optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """What `make test` deals to its workers: whole files, as their tests share what they build; all of tests/slurm,
    which has one cluster. pytest-xdist 3.8 loses its own groups with pytest 9.2, without a word."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "tests/slurm" if file.startswith("tests/slurm/") else file

    return ByFile(config, log)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real data and a real small Llama that live beside the checkout; never part of the product."""
    folder = ROOT.parent / "shared"
    if not (folder / "models" / "stories260k" / "config.json").is_file():
        reason = f"{folder} is missing: put the project's test data there to run this"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return folder
