"""The scripts under tools/ import each other by name, as they do when they are run."""

import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"
sys.path.insert(0, str(TOOLS))


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `make demo` trains on, with a model of two narrow layers."""
    from make_demo import Sizes, make

    folder = tmp_path_factory.mktemp("demo") / "made"
    make(folder, Sizes(hidden_size=32, intermediate_size=48, layers=2, heads=4, kv_heads=2), seed=0)
    return folder
