"""The generated pages are those of today's settings."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

from make_docs import documents


@pytest.mark.parametrize("path", documents(), ids=lambda path: path.name)
def test_current(path: Path) -> None:
    assert path.read_text() == documents()[path], "settings have changed: run python tools/make_docs.py"
