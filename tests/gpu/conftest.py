"""What these tests need is skipped by name: a GPU, several, a wheel, a kind of GPU."""

import pytest
import torch
from needs import wheel


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "gpu" in item.path.parts:
            item.add_marker(pytest.mark.gpu)
            item.add_marker(pytest.mark.timeout(600))


@pytest.fixture(autouse=True)
def device() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("no GPU here: `make test-gpu` on a machine with one runs it")
    return torch.device("cuda", 0)


@pytest.fixture
def te() -> None:
    wheel("transformer_engine")
