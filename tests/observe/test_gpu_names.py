"""A device is a row of the table only where it is that very device."""

import pytest

from megadpo.observe.gpus import GPUS, gpu_named


@pytest.mark.parametrize(
    ("said", "row"),
    [
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA H100 80GB HBM3", "h100-80gb"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA A100-SXM4-40GB", None),
        ("NVIDIA A100 80GB PCIe", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA GB200", None),
        ("NVIDIA L4", None),
    ],
)
def test_gpu_named(said: str, row: str | None) -> None:
    assert gpu_named(said) is (None if row is None else GPUS[row])
