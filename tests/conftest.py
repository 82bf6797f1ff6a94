"""Fixtures of the whole test tree."""

import os
import signal
from pathlib import Path

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


@pytest.hookimpl(tryfirst=True)  # pytest-xdist reads the marks in its own
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What `make test` deals to its two workers (pytest-xdist, --dist loadgroup): whole files, as they share what they
    build; all of tests/slurm, which has one cluster."""
    for item in items:
        folder = item.path.parent
        item.add_marker(pytest.mark.xdist_group(str(folder if folder.name == "slurm" else item.path)))


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
