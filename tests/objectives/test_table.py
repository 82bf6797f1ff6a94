"""Every objective against an independent one: value and gradient, on usual numbers, extreme ones and ties."""

from __future__ import annotations

import math
from dataclasses import fields, is_dataclass, replace
from typing import Any

import pytest
import torch
from batches import extreme, one_group, tied, usual
from mpmath import mp, mpf
from oracles import ORACLES, value_and_gradient

from megadpo.objectives import DPO, OBJECTIVES, SFT, Mix, Sequences
from megadpo.objectives.across import CARRIERS
from megadpo.objectives.across_pairs import AOT, BCO, AOTUnpaired, BetaDPO
from megadpo.objectives.anchored import EXO, NCA, APODown, APOZero, DiscoPOP
from megadpo.objectives.divergences import FDPO
from megadpo.objectives.listwise import RRHF, PlackettLuceDPO
from megadpo.objectives.margins import IPO, ODPO, RewardRPO, RSOHinge, SPPOHard
from megadpo.objectives.pairwise import DPOP, RDPO, SPIN, DPOWithNLL, NormDPO, RobustDPO
from megadpo.objectives.reference_free import CLICK, CPO, ORPO, SimPO, SLiC
from megadpo.objectives.reward_model import BradleyTerry, PlackettLuceReward
from megadpo.objectives.token_level import LDDPO, TDPO1, TDPO2, WPO, Cringe, Llama3DPO
from megadpo.objectives.unpaired import KTO, APOZeroUnpaired, BCOUnpaired

CASES = [
    DPO(0.1),
    DPO(0.7, 0.2),
    RobustDPO(0.3, 0.2),
    RDPO(0.2, 0.3),
    NormDPO(5.0),
    DPOP(0.3, 5.0),
    SPIN(0.4),
    DPOWithNLL(0.2, 0.7, "response"),
    DPOWithNLL(0.2, 0.7, "tokens"),
    DPOWithNLL(0.2, 0.005, "sum"),
    IPO(0.1),
    IPO(0.3, "sum"),
    RSOHinge(0.05),
    ODPO(0.2, 0.8, "log"),
    ODPO(0.2, 0.3, "linear"),
    RewardRPO(0.2, 0.4, "backward_kl"),
    RewardRPO(0.2, 0.4, "forward_kl"),
    RewardRPO(0.2, 0.4, "squared"),
    SPPOHard(0.05),
    EXO(0.2),
    EXO(0.5, 0.2),
    NCA(0.2),
    APOZero(0.2),
    APODown(0.2),
    DiscoPOP(0.05, 0.05),
    DiscoPOP(0.4, 0.3),
    FDPO(0.3, "reverse_kl"),
    FDPO(0.3, "forward_kl"),
    FDPO(0.3, "js"),
    FDPO(0.3, "alpha", 0.3),
    LDDPO(0.3, 0.4),
    Llama3DPO(0.2, 0.3),
    TDPO1(0.2),
    TDPO2(0.2, 0.6),
    WPO(0.3),
    WPO(0.3, clamp=False),
    Cringe(0.3, 1.5, 8.0),
    AOT(0.3, 0.1),
    AOTUnpaired(0.3, 0.1),
    BCO(0.3),
    BetaDPO(0.2, 0.6, 0.1),
    SLiC(2.0, 0.3),
    SimPO(2.0, 0.7),
    SimPO(2.5, 1.2, 0.1),
    ORPO(0.4, "response"),
    ORPO(0.4, "tokens"),
    CPO(0.3, 0.5, 0.1),
    CPO(0.3, 0.5, 0.1, "sum"),
    CLICK(0.5, 6.0),
    KTO(0.3, 1.2, 0.8),
    BCOUnpaired(0.3),
    APOZeroUnpaired(0.3, 1.2, 0.8),
    PlackettLuceDPO(0.3),
    RRHF(0.7, 0.9),
    BradleyTerry(),
    BradleyTerry(margin=True, centering=0.01),
    PlackettLuceReward(0.01),
    SFT(),
    Mix((DPO(0.2), BCO(0.1), SFT()), (0.8, 0.2, 1.0)),
    Mix((SimPO(), SFT())),
    Mix((KTO(0.2), APOZeroUnpaired(0.4)), (0.5, 2.0)),
]
KINKS = (DPOP, RRHF, AOT, AOTUnpaired, RSOHinge, SLiC, CLICK)
"""No slope where a tie is a kink or an order that two pairs share."""
LARGEST = 1e300
TOLERANCE = 1e-6


def label(case: Any) -> str:
    return " ".join([type(case).__name__, *(str(v) for v in vars(case).values() if not is_dataclass(v))])[:60]


def ours(objective: Any, batch: Sequences) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradient, divided by the count."""
    leaves = {name: getattr(batch, name).clone().requires_grad_() for name in CARRIERS}
    outcome = objective(replace(batch, **leaves))
    grads = torch.autograd.grad(outcome.loss, list(leaves.values()), materialize_grads=True, allow_unused=True)
    assert outcome.metrics.shape == (len(objective.metrics),)
    assert torch.isfinite(outcome.metrics).all()
    count = outcome.count.item()
    return outcome.loss.item() / count, {n: g / count for n, g in zip(leaves, grads, strict=True)}


def compare(objective: Any, batch: Sequences, slopes: bool = True) -> None:
    value, gradient = ours(objective, batch)
    # exp(1e4) has 4343 digits before the point: with fewer, the oracle would lose what stands beside it
    steep = isinstance(objective, FDPO) and objective.divergence in ("forward_kl", "alpha")
    largest = (batch.policy_S - batch.reference_S).abs().max().item()
    with mp.workdps(350 + int(largest / 2.3) if steep else mp.dps):
        want, want_gradient = value_and_gradient(objective, batch)
    assert not math.isnan(value)
    if abs(want) < LARGEST:
        assert abs(value - float(want)) <= TOLERANCE * max(1.0, abs(float(want))), "value"
    else:
        assert abs(value) > 1e280, "a value beyond float64 must be large, of the right sign"
        assert (value > 0) == (want > 0)
    for name, exact in want_gradient.items() if slopes else ():
        for got, expected in zip(gradient[name].tolist(), exact, strict=True):
            assert not math.isnan(got), name
            if abs(expected) < LARGEST:
                allowed = TOLERANCE * max(mpf(1), abs(expected))
                assert abs(mpf(got) - expected) <= allowed, f"gradient along {name}: {got}, wanted {float(expected)}"
            else:
                assert abs(got) > 1e280 or math.isinf(got)
                assert (got > 0) == (expected > 0)


def test_every_objective_is_here() -> None:
    assert {type(case) for case in CASES} == set(OBJECTIVES.values())
    assert ORACLES.keys() == {kind.__name__ for kind in OBJECTIVES.values()}


@pytest.mark.parametrize("objective", CASES, ids=label)
def test_usual(objective: Any) -> None:
    compare(objective, usual(objective, groups=5))


@pytest.mark.parametrize("objective", CASES, ids=label)
def test_extreme(objective: Any) -> None:
    """Log-ratios up to 1e4 nats. Group by group where the loss can overflow, so that one does not hide the others."""
    batch = extreme(objective)
    if objective.whole_batch:
        few = [one_group(batch, g) for g in ((5, 10, 23, 24, 52, 57) if objective.responses == 2 else range(8))]
        compare(objective, joined(few))
    else:
        groups = len(batch.offsets_G1) - 1
        for g in range(0, groups, 1 if groups < 10 else 9 if isinstance(objective, FDPO) else 5):
            compare(objective, one_group(batch, g))


@pytest.mark.parametrize("objective", CASES, ids=label)
def test_ties(objective: Any) -> None:
    """Policy and reference equal, one token each, probabilities up to 1 - 1e-30."""
    compare(objective, tied(objective), slopes=not isinstance(objective, KINKS))


@pytest.mark.parametrize("drift", [3.0, 40.0, 1e4])
def test_a_drift_has_no_upper_bound(drift: float) -> None:
    """KTO's z is 0 at least; a policy that is far away has a large one."""
    objective = KTO(0.3, 1.2, 0.8)
    for batch in (usual(objective, groups=5), one_group(extreme(objective), 0)):
        compare(objective, replace(batch, mismatched_kl=torch.tensor(drift, dtype=torch.float64)))


def test_a_beta_has_a_lower_bound() -> None:
    """Beta-DPO's where the batch has its pairs far the wrong way round: 1e-3, whose loss is not that of 0."""
    objective = BetaDPO(0.2, 0.6, 0.1)
    batch = usual(objective, groups=5)
    wrong = torch.tensor([-300.0, 0.0]).double().repeat(5)
    compare(objective, replace(batch, policy_S=batch.reference_S + wrong))


def joined(parts: list[Sequences]) -> Sequences:
    from megadpo.objectives.across import join

    return join(parts)


@pytest.mark.parametrize("objective", CASES, ids=label)
def test_an_empty_micro_batch_is_nothing(objective: Any) -> None:
    """A rank with less data gets one: no groups, but a graph to go backward through."""
    batch = usual(objective, groups=3)
    empty: dict[str, Any] = {"offsets_G1": batch.offsets_G1[:1]}
    for name, value in vars(batch).items():
        if isinstance(value, torch.Tensor) and name.endswith(("_S", "_N")):
            empty[name] = value[:0].clone().requires_grad_(name in CARRIERS)
    if objective.whole_batch:
        return  # is given the whole batch, which is not empty
    nothing = replace(batch, **empty, whole=batch.counts)
    outcome = objective(nothing)
    assert outcome.loss.item() == 0
    assert outcome.count.item() == 0
    assert (outcome.metrics == 0).all()
    outcome.loss.backward()


@pytest.mark.parametrize("objective", CASES, ids=label)
def test_halves_add_up(objective: Any) -> None:
    """Two micro-batches that know the counts of the whole: their sums over the count are the whole's."""
    if objective.whole_batch:
        return  # tests/objectives/test_across.py
    batch = usual(objective, groups=4)
    parts = [replace(one_group(batch, g), whole=batch.counts) for g in range(4)]
    outcomes = [objective(part) for part in parts]
    whole = objective(batch)
    assert sum(o.count.item() for o in outcomes) == whole.count.item()
    assert sum(o.loss.item() for o in outcomes) == pytest.approx(whole.loss.item(), rel=1e-12)
    torch.testing.assert_close(sum(o.metrics for o in outcomes), whole.metrics, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("objective", CASES, ids=label)
def test_what_it_does_not_need_it_does_not_read(objective: Any) -> None:
    """Fields outside `needs` may be missing; a needed one may not."""
    batch = usual(objective, groups=3)
    optional = {f.name for f in fields(Sequences)} - {"policy_S", "tokens_S", "offsets_G1", "whole"}
    lean = replace(batch, **dict.fromkeys(optional - objective.needs))
    assert objective(lean).loss.item() == objective(batch).loss.item()
    for need in objective.needs:
        with pytest.raises((ValueError, AssertionError)):
            objective(replace(lean, **{need: None}))


def test_a_certain_response_has_the_gradient_of_the_limit() -> None:
    """A probability of exactly 1 has no odds, but ORPO's loss and slope have a limit there."""
    batch = usual(ORPO(), groups=2)
    for chosen in (0.0, -1e-20):
        policy = batch.policy_S.clone()
        policy[0] = chosen
        _, gradient = ours(ORPO(0.4), replace(batch, policy_S=policy))
        assert torch.isfinite(gradient["policy_S"]).all()
        if chosen == 0:
            limit = gradient["policy_S"]
    torch.testing.assert_close(gradient["policy_S"], limit, rtol=1e-9, atol=1e-12)
