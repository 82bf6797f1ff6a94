"""Where every loss starts, and what is another loss in disguise."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from batches import usual

from megadpo.objectives import DPO, SFT, Mix, Sequences
from megadpo.objectives.across import CARRIERS
from megadpo.objectives.across_pairs import AOT, BCO, AOTUnpaired, BetaDPO
from megadpo.objectives.anchored import EXO, NCA, APODown, APOZero, DiscoPOP
from megadpo.objectives.divergences import FDPO
from megadpo.objectives.listwise import RRHF, PlackettLuceDPO
from megadpo.objectives.margins import IPO, ODPO, RewardRPO, RSOHinge, SPPOHard
from megadpo.objectives.pairwise import DPOP, RDPO, SPIN, DPOWithNLL, NormDPO, RobustDPO
from megadpo.objectives.reference_free import CLICK, CPO, ORPO, SimPO, SLiC
from megadpo.objectives.reward_model import BradleyTerry, PlackettLuceReward
from megadpo.objectives.token_level import LDDPO, TDPO1, TDPO2, WPO, Llama3DPO
from megadpo.objectives.unpaired import KTO, APOZeroUnpaired, BCOUnpaired

LN2 = math.log(2)


def start(objective: Any) -> Sequences:
    """The policy is the reference; all responses have one length, and the data's scores are equal."""
    batch = usual(objective, groups=6)
    tokens = torch.full_like(batch.tokens_S, 4)
    policy = torch.linspace(-3, -0.1, 4 * len(tokens), dtype=torch.float64)
    sums = torch.segment_reduce(policy, "sum", lengths=tokens)
    return replace(
        batch,
        tokens_S=tokens,
        policy_S=sums,
        reference_S=sums.clone(),
        policy_N=policy,
        reference_N=policy.clone(),
        body_N=torch.ones(len(policy), dtype=torch.bool),
        collision_N=policy.clone(),
        kl_N=torch.zeros_like(policy),
        scores_S=torch.zeros(len(tokens), dtype=torch.float64),
        labels_S=torch.arange(len(tokens)) % 2 == 0,
        mismatched_kl=torch.zeros((), dtype=torch.float64),
    )


E = 0.2
STARTS = [
    (DPO(), LN2),
    (DPO(0.3, E), LN2),
    (RobustDPO(0.3, E), LN2),
    (RDPO(), LN2),
    (NormDPO(), LN2),
    (DPOP(), LN2),
    (SPIN(), LN2),
    (DPOWithNLL(alpha=0.0), LN2),
    (IPO(0.3), 1 / (4 * 0.3**2)),
    (IPO(0.3, "sum"), 1 / (4 * 0.3**2)),
    (RSOHinge(), 1.0),
    (ODPO(alpha=0.0), LN2),
    (ODPO(offset="linear"), LN2),
    (RewardRPO(distance="backward_kl"), 0.0),
    (RewardRPO(distance="forward_kl"), 0.0),
    (RewardRPO(distance="squared"), 0.0),
    (SPPOHard(0.05), 1 / (2 * 0.05**2)),
    (EXO(0.1, E), math.log(0.5) - (math.log(1 - E) + math.log(E)) / 2),
    (NCA(), 2 * LN2),
    (APOZero(), 1.0),
    (APODown(), 1.0),
    (DiscoPOP(), LN2 / 2 + 0.5),
    (FDPO(divergence="reverse_kl"), LN2),
    (FDPO(divergence="forward_kl"), LN2),
    (FDPO(divergence="js"), LN2),
    (FDPO(divergence="alpha"), LN2),
    (LDDPO(), LN2),
    (Llama3DPO(alpha=0.0), LN2),
    (TDPO1(), LN2),
    (TDPO2(), LN2),
    (WPO(), LN2),
    (AOTUnpaired(), LN2),
    (AOT(), LN2),
    (BCO(), 2 * LN2),
    (BetaDPO(), LN2),
    (KTO(0.3, 1.2, 0.8), (1.2 + 0.8) / 2 / 2),
    (BCOUnpaired(), LN2),
    (APOZeroUnpaired(), 0.5),
    (PlackettLuceDPO(), None),
    (Mix((DPO(), BCO()), (0.8, 0.2)), 0.8 * LN2 + 0.2 * 2 * LN2),
]


@pytest.mark.parametrize(("objective", "constant"), STARTS, ids=lambda x: type(x).__name__ if x else "")
def test_before_the_first_update(objective: Any, constant: float | None) -> None:
    batch = start(objective)
    outcome = objective(batch)
    if constant is None:  # a list of K responses in any order: log K!
        constant = sum(math.lgamma(size + 1) for size in batch.offsets_G1.diff().tolist()) / outcome.count.item()
    assert outcome.loss.item() / outcome.count.item() == pytest.approx(constant, abs=1e-12)


def run(objective: Any, batch: Sequences) -> tuple[float, torch.Tensor]:
    """Loss sum, and its gradient along the policy's log-probability of each token."""
    leaves = {name: getattr(batch, name).clone().requires_grad_() for name in CARRIERS}
    loss = objective(replace(batch, **leaves)).loss
    grads = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True, allow_unused=True)
    # a response's sum is that of its tokens: a slope along one is a slope along the other
    grads = dict(zip(leaves, grads, strict=True))
    return loss.item(), torch.repeat_interleave(grads["policy_S"], batch.tokens_S) + grads["policy_N"]


def pairs(**changed: Any) -> Sequences:
    """Sums are exactly those of the tokens, in float64."""
    batch = usual(DPO(), groups=8, seed=5)
    batch = replace(
        batch,
        policy_S=torch.segment_reduce(batch.policy_N, "sum", lengths=batch.tokens_S),
        reference_S=torch.segment_reduce(batch.reference_N, "sum", lengths=batch.tokens_S),
    )
    return replace(batch, **changed)


def zeros() -> torch.Tensor:
    return torch.zeros_like(pairs().policy_S)


BODY = {"body_N": pairs().body_N | True}
UNIFORM = {"reference_S": zeros()}


def of_length(tokens: int) -> dict[str, Any]:
    """All responses of one length."""
    batch = pairs()
    count = len(batch.tokens_S)
    spread = {name: torch.linspace(-2, -0.1, count * tokens, dtype=torch.float64) for name in ("policy_N",)}
    policy, reference = spread["policy_N"], spread["policy_N"].flip(0)
    lengths = torch.full((count,), tokens)
    return {
        "tokens_S": lengths,
        "policy_N": policy,
        "reference_N": reference,
        "policy_S": torch.segment_reduce(policy, "sum", lengths=lengths),
        "reference_S": torch.segment_reduce(reference, "sum", lengths=lengths),
        "kl_N": torch.zeros_like(policy),
        "rival_N": torch.zeros_like(policy),
        "collision_N": torch.zeros_like(policy),
        "body_N": torch.ones(len(policy), dtype=torch.bool),
    }


B = 0.3
SAME = [
    ("cDPO with 0 is DPO", DPO(B, 0.0), SPIN(B), {}),
    ("robust with 0 is DPO", RobustDPO(B, 0.0), DPO(B), {}),
    ("R-DPO with 0 is DPO", RDPO(B, 0.0), DPO(B), {}),
    ("R-DPO over equal lengths is DPO", RDPO(B, 0.7), DPO(B), of_length(3)),
    ("DPOP with 0 is DPO", DPOP(B, 0.0), DPO(B), {}),
    ("DPO + 0 NLL is DPO", DPOWithNLL(B, 0.0), DPO(B), {}),
    ("Llama 3 with 0 and no formatting is DPO", Llama3DPO(B, 0.0), DPO(B), BODY),
    ("Llama 3 without formatting is iterative RPO", Llama3DPO(B, 0.2), DPOWithNLL(B, 0.2), BODY),
    ("LD-DPO with 1 is DPO", LDDPO(B, 1.0), DPO(B), {}),
    ("LD-DPO over equal lengths is DPO", LDDPO(B, 0.2), DPO(B), of_length(3)),
    ("TDPO2 with 0 is DPO", TDPO2(B, 0.0), DPO(B), {}),
    ("TDPO1 without KL is DPO", TDPO1(B), DPO(B), {"kl_N": torch.zeros_like(pairs().kl_N)}),
    ("f-DPO with the reverse KL is DPO", FDPO(B, "reverse_kl"), DPO(B), {}),
    ("length-normalised DPO of one token is DPO", NormDPO(B), DPO(B), of_length(1)),
    ("SimPO with 0 is length-normalised DPO under a uniform reference", SimPO(B, 0.0), NormDPO(B), UNIFORM),
    ("CPO with 0 is DPO under a uniform reference", CPO(B, 0.0), DPO(B), UNIFORM),
    (
        "CPO with sums is DPO with sums under a uniform reference",
        CPO(B, 0.3, normalise="sum"),
        DPOWithNLL(B, 0.3, "sum"),
        UNIFORM,
    ),
    ("ODPO with 0 is DPO", ODPO(B, 0.0), DPO(B), {}),
    ("ODPO over equal scores is DPO", ODPO(B, 1.0, "linear"), DPO(B), {"scores_S": zeros()}),
    ("beta-DPO with 0 is DPO", BetaDPO(B, 0.0), DPO(B), {}),
    ("WPO where every weight is 1 is DPO", WPO(B), DPO(B), {"collision_N": pairs().policy_N}),
    ("Plackett-Luce of two is DPO", PlackettLuceDPO(B), DPO(B), {}),
    ("IPO of one token: average is sum", IPO(B), IPO(B, "sum"), of_length(1)),
    ("a mix of one is that one", Mix((IPO(B),)), IPO(B), {}),
    ("a mix with NLL over tokens is DPO + NLL", Mix((DPO(B), SFT()), (1.0, 0.4)), DPOWithNLL(B, 0.4, "tokens"), {}),
    ("a Plackett-Luce reward model of pairs is Bradley-Terry", PlackettLuceReward(0.01), BradleyTerry(False, 0.01), {}),
]  # fmt: skip


@pytest.mark.parametrize(("one", "other", "changed"), [row[1:] for row in SAME], ids=[row[0] for row in SAME])
def test_identity(one: Any, other: Any, changed: dict[str, Any]) -> None:
    batch = pairs(**changed)
    (value, grad), (want, want_grad) = run(one, batch), run(other, batch)
    assert value == pytest.approx(want, rel=1e-12)
    torch.testing.assert_close(grad, want_grad, rtol=1e-10, atol=1e-12)


def test_the_alpha_divergence_has_both_kl_as_limits() -> None:
    batch = pairs()
    for alpha, divergence in ((1e-7, "reverse_kl"), (1 - 1e-7, "forward_kl")):
        near, limit = run(FDPO(B, "alpha", alpha), batch), run(FDPO(B, divergence), batch)
        assert near[0] == pytest.approx(limit[0], rel=1e-4)
        torch.testing.assert_close(near[1], limit[1], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("objective", [DPO(B, 0.1), NormDPO(B), LDDPO(B), AOTUnpaired(B), SPPOHard(), SimPO()])
def test_swapping_chosen_and_rejected_negates_the_margin(objective: Any) -> None:
    batch = pairs()
    order = torch.arange(len(batch.tokens_S)).view(-1, 2).flip(1).flatten()
    starts = batch.tokens_S.cumsum(0) - batch.tokens_S
    tokens = torch.cat([torch.arange(int(batch.tokens_S[k])) + starts[k] for k in order])
    swapped = replace(
        batch,
        **{
            name: value[order if name.endswith("_S") else tokens]
            for name, value in vars(batch).items()
            if isinstance(value, torch.Tensor) and name[-2:] in ("_S", "_N")
        },
    )
    names = list(objective.metrics)
    there, back = objective(batch).metrics, objective(swapped).metrics
    margin, accuracy = names.index("rewards/margins"), names.index("rewards/accuracies")
    assert there[margin] == -back[margin]
    assert there[accuracy] + back[accuracy] == 8


def test_the_slope_of_label_smoothing() -> None:
    """At margin 0 the slope of conservative DPO is -(1/2 - e): a smoothing that is ignored shows here."""
    batch = start(DPO())
    _, grad = run(DPO(1.0, 0.1), batch)
    assert grad[0].item() == pytest.approx(-(0.5 - 0.1))


def test_a_tie_counts_half_and_rewards_have_their_beta() -> None:
    """Rewards are b D, in the metrics too; before the first update the accuracy is 1/2, not 0."""
    before = dict(zip(DPO.metrics, DPO(0.2)(start(DPO())).metrics.tolist(), strict=True))
    assert before["rewards/accuracies"] == 3.0  # of 6 pairs
    batch = pairs()
    ratio = (batch.policy_S - batch.reference_S).view(-1, 2)
    after = dict(zip(DPO.metrics, DPO(0.2)(batch).metrics.tolist(), strict=True))
    assert after["rewards/chosen"] == pytest.approx(0.2 * float(ratio[:, 0].sum()), rel=1e-5)
    assert after["rewards/margins"] == pytest.approx(0.2 * float((ratio[:, 0] - ratio[:, 1]).sum()), rel=1e-5)
    assert after["rewards/accuracies"] == float((ratio[:, 0] > ratio[:, 1]).sum())


@pytest.mark.parametrize("objective", [SLiC(), SimPO(), ORPO(), CPO(), CLICK(), RRHF(), SFT()])
def test_reference_free(objective: Any) -> None:
    """Says so, and gives the same without one; the others do not."""
    assert not objective.needs_reference
    assert DPO().needs_reference
    assert Mix((objective, SFT())).needs_reference is False
    batch = usual(objective, groups=4)
    alone = replace(batch, reference_S=None, reference_N=None)
    assert objective(alone).loss.item() == objective(batch).loss.item()


def test_the_loss_changes_with_the_reference() -> None:
    batch = pairs()
    moved = replace(batch, reference_S=batch.reference_S + torch.arange(16) * 0.1)
    assert DPO(B)(moved).loss.item() != DPO(B)(batch).loss.item()


def test_equal_scores_are_no_preference() -> None:
    """Of a ranked list: neither a hinge nor a right or wrong order; without scores the order is all there is."""
    batch = Sequences(
        policy_S=torch.tensor([-5.0, -3.0, -4.0, -1.0, -2.0]),
        reference_S=torch.zeros(5),
        tokens_S=torch.ones(5, dtype=torch.int64),
        offsets_G1=torch.tensor([0, 3, 5]),
        scores_S=torch.tensor([4.0, 4.0, 1.0, 7.0, 7.0]),
    )
    assert RRHF(alpha=0.0)(batch).loss.item() == 1.0  # -4 over -5; -3 over -5 is no mistake, they have the same score
    assert RRHF(alpha=0.0)(replace(batch, scores_S=None)).loss.item() == 2.0 + 1.0
    for objective in (RRHF(), PlackettLuceDPO(), PlackettLuceReward()):
        accuracy = list(objective.metrics).index("rewards/accuracies")
        # first list: -5 < -4 is wrong, -3 > -4 right; the second says nothing: half
        assert objective(batch).metrics[accuracy].item() == 0.5 + 0.5
        in_order = objective(replace(batch, scores_S=None)).metrics[accuracy].item()
        assert in_order == pytest.approx(1 / 3 + 1)


@pytest.mark.parametrize("objective", [DPO(2.0), NormDPO(2.0), SimPO(2.0), ORPO(2.0), RRHF()])
def test_a_tie_is_a_tie_of_sums(objective: Any) -> None:
    """0.02 nats over 500 tokens are a preference, also of a loss that looks at rewards per token; 0.00002 are not."""
    accuracy = list(objective.metrics).index("rewards/accuracies")
    for apart, expected in ((0.02, 1.0), (-0.02, 0.0), (2e-5, 0.5)):
        batch = Sequences(
            policy_S=torch.tensor([-100 + apart, -100], dtype=torch.float64),
            reference_S=torch.full((2,), -100, dtype=torch.float64),
            tokens_S=torch.tensor([500, 500]),
            offsets_G1=torch.tensor([0, 2]),
        )
        assert objective(batch).metrics[accuracy].item() == expected
