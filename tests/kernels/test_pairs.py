"""The fused pair loss against float64, and the DPO objective with it and without."""

import pytest
import torch
from cases import GRADIENT, Place, relative
from megadpo_kernels.pairs import METRICS, pair_loss
from torch.nn.functional import logsigmoid

from megadpo.objectives import DPO, Sequences

BETA = 0.3
MEAN = 1e-5
"""Nats: how far a metric's mean over pairs may be off. Loss 1e-6 relative."""


def pairs(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities with margins near 0, of some nats, and far beyond what exp can hold. One tie."""
    generator = torch.Generator().manual_seed(0)
    policy = -100 * torch.rand(2 * count, generator=generator)
    reference = policy + torch.randn(2 * count, generator=generator) * 10.0 ** torch.linspace(-3, 3, 2 * count)
    if count:
        reference[:2] = policy[:2]
    return policy, reference


def exact(policy: torch.Tensor, reference: torch.Tensor, smoothing: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and metrics in float64."""
    policy_G2 = policy.double().view(-1, 2)
    reward = BETA * (policy_G2 - reference.double().view(-1, 2))
    margin = reward[:, 0] - reward[:, 1]
    right = torch.where(margin.abs() < 1e-4 * BETA, 0.5, (margin > 0).double())
    loss = -(1 - smoothing) * logsigmoid(margin).sum() - smoothing * logsigmoid(-margin).sum()
    columns = (*reward.unbind(1), margin, right, *policy_G2.unbind(1))
    return loss, torch.stack([column.sum() for column in columns]).detach()


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("count", [0, 1, 5, 130])
def test_the_objective_against_float64(place: Place, count: int, smoothing: float) -> None:
    """Whatever runs it: `triton` is one launch of the fused kernel, the others are plain torch."""
    policy, reference = pairs(count)
    ours = policy.to(place.device, copy=True).requires_grad_()
    lengths, offsets = torch.ones(2 * count, dtype=torch.int64), torch.arange(count + 1) * 2
    objective = DPO(beta=BETA, label_smoothing=smoothing)
    outcome = objective(Sequences(ours, reference.to(place.device), lengths, offsets, backend=place.backend))
    (2 * outcome.loss).backward()

    true = policy.double().requires_grad_()
    want, want_metrics = exact(true, reference, smoothing)
    (2 * want).backward()
    assert int(outcome.count) == count
    assert outcome.metrics.shape == (METRICS,) == (len(objective.metrics),)
    assert (outcome.metrics.cpu() - want_metrics).abs().max() <= MEAN * count
    assert float(outcome.loss.detach()) == pytest.approx(float(want.detach()), rel=1e-6)
    assert relative(ours.grad.cpu(), true.grad) <= GRADIENT[torch.float32]
    assert not outcome.metrics.requires_grad


def test_the_fused_kernel_runs_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from megadpo.objectives import pairwise

    called = []
    monkeypatch.setattr(pairwise, "pair_loss", lambda *_: called.append(1) or (torch.zeros(()), torch.zeros(METRICS)))
    for backend in ("auto", "chunked", "reference", "triton"):
        DPO()(Sequences(*pairs(2), torch.ones(4, dtype=torch.int64), torch.arange(3) * 2, backend=backend))
        assert len(called) == (backend == "triton")


def test_nan_is_reported(place: Place) -> None:
    policy, reference = (x.to(place.device) for x in pairs(4))
    policy[3] = torch.nan
    lengths, offsets = torch.ones(8, dtype=torch.int64), torch.arange(5) * 2
    outcome = DPO()(Sequences(policy.requires_grad_(), reference, lengths, offsets, place.backend))
    outcome.loss.backward()
    assert outcome.loss.isnan()
    assert policy.grad.isnan().tolist() == [False, False, True, True, False, False, False, False]


def test_thousands_of_nats_keep_the_margin(place: Place) -> None:
    """In float32 sums of 5000 nats are 5e-4 apart: a margin of 1e-3 would be lost."""
    policy = torch.tensor([-5000.0, -4000.0], dtype=torch.float64, device=place.device).requires_grad_()
    reference = policy.detach() - torch.tensor([1.23e-3, 0.0], dtype=torch.float64, device=place.device)
    lengths, offsets = torch.ones(2, dtype=torch.int64), torch.tensor([0, 2])
    outcome = DPO(beta=1.0)(Sequences(policy, reference, lengths, offsets, backend=place.backend))
    outcome.loss.backward()
    assert policy.grad.dtype == torch.float64
    assert float(outcome.metrics[2]) == pytest.approx(1.23e-3, rel=1e-5)


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_what_is_no_pair_is_refused_by_kernel_and_formula(backend: str) -> None:
    odd, offsets = torch.zeros(5), torch.tensor([0, 2, 5])
    with pytest.raises(ValueError, match="the objective needs reference_S"):
        DPO()(Sequences(odd[:4], None, torch.ones(4, dtype=torch.int64), offsets[:2], backend=backend))
    with pytest.raises(ValueError, match="5 values: need two for every pair"):
        DPO()(Sequences(odd, odd, torch.ones(5, dtype=torch.int64), offsets, backend=backend))


@pytest.mark.parametrize(
    ("policy", "reference", "words"),
    [
        (torch.zeros(5), torch.zeros(5), "5 and 5"),
        (torch.zeros(4), torch.zeros(6), "4 and 6"),
        (torch.zeros(2, 2), torch.zeros(4), r"policy is torch.float32 \[2, 2\]"),
        (torch.zeros(4), torch.zeros(4).half(), "reference is torch.float16"),
    ],
)
def test_wrong_pairs(policy: torch.Tensor, reference: torch.Tensor, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        pair_loss(policy, reference, 0.1, 0.0)


def test_without_triton_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="not installed"):
        pair_loss(*pairs(2), 0.1, 0.0)
