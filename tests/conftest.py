"""Fixtures of the whole test tree."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


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
