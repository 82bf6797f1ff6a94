"""Transformer Engine's layers against Megatron-Core's own: numbers, gradients, checkpoints, optimizer."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import VOCAB, small
from processes import on_gpus
from train.engine import Case, assemble, build, run

from megadpo import checkpoint
from megadpo.parallel import mcore_fixes
from megadpo.parallel.context import grid
from megadpo.train.optimizer import settled
from megadpo.train.step import train_step

pytestmark = pytest.mark.usefixtures("te")


def test_log_probabilities_and_gradients(tmp_path: Path) -> None:
    """Both are bfloat16: from float32 they may be about as far away as each other, not further."""
    case = small(tmp_path, steps=1)
    [[exact]] = on_gpus(1, run, [replace(case, dtype="float32")], without_te=True)
    [[own]] = on_gpus(1, run, [case], without_te=True)
    [[te]] = on_gpus(1, run, [case])
    far = np.abs(own["column"] - exact["column"]).mean()
    assert 0 < np.abs(te["column"] - exact["column"]).mean() < 2 * far
    gradients = [assemble([x], "gradients", VOCAB) for x in (exact, own, te)]
    for key, right in gradients[0].items():
        noise, off = (float((x[key] - right).norm() / right.norm()) for x in gradients[1:])
        assert off < 2 * noise + 1e-3, f"{key}: {off:.2e}, with Megatron-Core's own layers {noise:.2e}"


def saved(device: torch.device, case: Case, run_dir: Path) -> dict[str, Any]:
    """A run of one step, saved; its keys and weights."""
    with grid(case.parallel, device, 1) as context:
        state, stream = build(case, context)
        column = np.zeros(int(case.store.offsets[-1]))
        train_step(state, stream.batches(np.arange(case.batch), 0, column), case.objective, None, context)
        checkpoint.save(state, run_dir, 1, 1, context)
        return _weights(state)


def loaded(device: torch.device, case: Case, run_dir: Path) -> dict[str, Any]:
    with grid(case.parallel, device, 1) as context:
        state, _ = build(case, context)
        for parameter in state.modules[0].parameters():
            parameter.data.zero_()
        newest = checkpoint.latest(run_dir)
        assert newest is not None
        checkpoint.load(state, newest)
        return _weights(state)


def _weights(state: Any) -> dict[str, Any]:
    with settled(state.chunks):
        entries = state.modules[0].sharded_state_dict(metadata=dict(checkpoint.METADATA))
    return {
        "keys": sorted(key for key in entries if "_extra_state" not in key),
        "sums": {key: float(p.double().sum()) for key, p in sorted(state.modules[0].named_parameters())},
        "total": sum(float(p.double().abs().sum()) for p in state.modules[0].parameters()),
    }


@pytest.mark.parametrize("saved_with_te", [True, False])
def test_checkpoints_have_the_same_keys_and_load_either_way(tmp_path: Path, saved_with_te: bool) -> None:
    case = small(tmp_path)
    [one] = on_gpus(1, saved, case, tmp_path / "run", without_te=not saved_with_te)
    [other] = on_gpus(1, loaded, case, tmp_path / "run", without_te=saved_with_te)
    assert other["total"] == pytest.approx(one["total"], rel=1e-12)
    [same] = on_gpus(1, loaded, case, tmp_path / "run", without_te=not saved_with_te)
    assert same["sums"] == one["sums"]


def adams(device: torch.device) -> dict[str, Any]:
    """Five updates by Transformer Engine's Adam and by ours of torch's functions, from the same gradients."""
    import megatron.core.optimizer as optimizers

    assert mcore_fixes.adam_from() == "Transformer Engine's, fused"
    generator = torch.Generator(device).manual_seed(0)
    start = [torch.randn(300, 40, device=device, generator=generator) for _ in range(3)]
    settings = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    found: dict[str, Any] = {}
    for name, kind in (("te", optimizers.Adam), ("torch", mcore_fixes.StatelessStepAdam)):
        weights = [torch.nn.Parameter(x.clone()) for x in start]
        optimizer = kind(weights, **settings, adam_w_mode=True)
        noise = torch.Generator(device).manual_seed(1)
        for _ in range(5):
            for weight in weights:
                weight.grad = torch.randn(weight.shape, device=device, generator=noise)
            optimizer.step()
        states = [optimizer.state[weight] for weight in weights]
        found[name] = {
            "weights": [w.detach().cpu() for w in weights],
            "exp_avg": [state["exp_avg"].cpu() for state in states],
            "exp_avg_sq": [state["exp_avg_sq"].cpu() for state in states],
            "step": int(optimizer.param_groups[0]["step"]),
        }
    return found


def test_fused_adam_is_torchs() -> None:
    [found] = on_gpus(1, adams)
    assert found["te"]["step"] == found["torch"]["step"] == 5
    for what in ("weights", "exp_avg", "exp_avg_sq"):
        for one, other in zip(found["te"][what], found["torch"][what], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def fusions(device: torch.device, case: Case) -> dict[str, bool]:
    with grid(case.parallel, device, 1) as context:
        config = build(case, context)[0].modules[0].config
        return {"rope": config.apply_rope_fusion, "gradients": config.gradient_accumulation_fusion}


def test_rope_and_gradients_are_fused(tmp_path: Path) -> None:
    """Their numbers are in `test_log_probabilities_and_gradients`."""
    assert on_gpus(1, fusions, small(tmp_path)) == [{"rope": True, "gradients": True}]
