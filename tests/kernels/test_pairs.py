"""The fused pair loss against megadpo's DPO objective, and float64."""

import pytest
import torch
from cases import Place, relative
from megadpo_kernels.pairs import METRICS, pair_loss
from torch.nn.functional import logsigmoid

from megadpo.objectives import DPO, Sequences


def pairs(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities with margins near 0, of some nats, and far beyond what exp can hold. One tie."""
    generator = torch.Generator().manual_seed(0)
    policy = -100 * torch.rand(2 * count, generator=generator)
    reference = policy + torch.randn(2 * count, generator=generator) * 10.0 ** torch.linspace(-3, 3, 2 * count)
    if count:
        reference[:2] = policy[:2]
    return policy, reference


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("count", [0, 1, 5, 130])
def test_against_the_objective_and_float64(place: Place, count: int, smoothing: float) -> None:
    policy, reference = pairs(count)
    ours = policy.to(place.device, copy=True).requires_grad_()
    loss, metrics = pair_loss(ours, reference.to(place.device), 0.3, smoothing, place.backend)
    (2 * loss).backward()

    objective = DPO(beta=0.3, label_smoothing=smoothing)
    lengths, offsets = torch.ones(2 * count, dtype=torch.int64), torch.arange(count + 1) * 2
    outcome = objective(Sequences(policy, reference, lengths, offsets))
    assert metrics.shape == outcome.metrics.shape == (METRICS,)
    torch.testing.assert_close(metrics.cpu(), outcome.metrics, rtol=1e-5, atol=1e-4 * max(count, 1))

    exact = policy.double().requires_grad_()
    reward = 0.3 * (exact - reference.double()).view(-1, 2)
    margin = reward[:, 0] - reward[:, 1]
    want = -(1 - smoothing) * logsigmoid(margin).sum() - smoothing * logsigmoid(-margin).sum()
    (2 * want).backward()
    assert float(loss.detach()) == pytest.approx(float(want.detach()), rel=1e-5, abs=1e-5)
    assert relative(ours.grad.cpu(), exact.grad) < 1e-5


def test_nan_is_reported(place: Place) -> None:
    policy, reference = (x.to(place.device) for x in pairs(4))
    policy[3] = torch.nan
    loss, _ = pair_loss(policy.requires_grad_(), reference, 0.1, 0.0, place.backend)
    loss.backward()
    assert loss.isnan()
    assert policy.grad.isnan().tolist() == [False, False, True, True, False, False, False, False]
