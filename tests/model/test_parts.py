"""What the log says of the parts in use is what they are."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import write_llama

from megadpo.config import ModelConfig, ParallelConfig
from megadpo.convert.families import read_shape
from megadpo.convert.shape import ModelShape
from megadpo.model.parts import parts
from megadpo.parallel import mcore_fixes

CPU = torch.device("cpu")
PLAIN = ModelConfig("m")


@pytest.fixture
def shape(tmp_path: Path) -> ModelShape:
    return read_shape(write_llama(tmp_path / "llama", layers=4))


def test_without_a_gpu(shape: ModelShape) -> None:
    lines = parts(shape, ParallelConfig(), PLAIN, CPU)
    assert lines == [
        "layers     Megatron-Core's own (no Transformer Engine); bfloat16 on cpu",
        "attention  sdpa (on a CPU)",
        "kernels    log-probabilities chunked; RoPE in torch; weight gradients added by themselves; no CUDA graphs",
    ]
    assert mcore_fixes.adam_from() == "torch's"
    *_, kernels = parts(shape, ParallelConfig(), replace(PLAIN, cuda_graphs=("mlp", "moe_router")), CPU)
    assert kernels.endswith("; CUDA graphs of mlp and moe_router")


def test_with_transformer_engine(shape: ModelShape, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mcore_fixes, "have_te", lambda: True)
    model = replace(PLAIN, fp8_format="hybrid", first_last_layers_bf16=True, fp8_param_gather=True)
    layers, fp8, *_ = parts(shape, ParallelConfig(), model, CPU)
    assert layers.startswith("layers     Transformer Engine's; ")
    assert fp8 == "fp8        hybrid, tensorwise: products of 2 of 4 layers; weights gathered in FP8"
    emulated = replace(PLAIN, fp8_format="e4m3", fp8_emulation=True)
    layers, fp8, *_ = parts(shape, ParallelConfig(), emulated, CPU)
    assert "FP8 is emulated in them" in layers
    assert fp8.startswith("fp8        emulated: tensorwise")


def test_whose_adam(monkeypatch: pytest.MonkeyPatch) -> None:
    import megatron.core.optimizer as optimizers

    for module, said in (
        ("transformer_engine.pytorch.optimizers.fused_adam", "Transformer Engine's, fused"),
        ("apex.optimizers.fused_adam", "Apex's, fused"),
        ("torch.optim.adamw", "torch's"),
    ):
        monkeypatch.setattr(optimizers, "Adam", type("FusedAdam", (), {"__module__": module}))
        assert mcore_fixes.adam_from() == said
