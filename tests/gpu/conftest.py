"""What these tests need is skipped by name: a GPU, several, a wheel, a kind of GPU."""

import pytest
import torch
from needs import wheel


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "gpu" in item.path.parts:
            item.add_marker(pytest.mark.gpu)
            item.add_marker(pytest.mark.timeout(600))
            if not torch.cuda.is_available():  # a mark, not a fixture: what the test would be given is not made
                item.add_marker(pytest.mark.skip(reason="no GPU here: `make test-gpu` on a machine with one runs it"))


@pytest.fixture(autouse=True)
def device() -> torch.device:
    return torch.device("cuda", 0)


@pytest.fixture
def te() -> None:
    wheel("transformer_engine")
