"""TRL's own loss code on the same log-probabilities: equal, or different for the reason in the table.

TRL's trainers are not built: their loss methods run on a stand-in that has the settings, and a model that hands out the
given numbers.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from batches import usual
from torch import Tensor

from megadpo.objectives import DPO, OBJECTIVES, SFT, Mix, Sequences
from megadpo.objectives.across_pairs import AOT, BCO, AOTUnpaired
from megadpo.objectives.anchored import EXO, NCA, APODown, APOZero, DiscoPOP
from megadpo.objectives.divergences import FDPO
from megadpo.objectives.margins import IPO, RSOHinge, SPPOHard
from megadpo.objectives.names import ALIASES
from megadpo.objectives.pairwise import DPOWithNLL, NormDPO, RobustDPO
from megadpo.objectives.reference_free import CPO, ORPO, SimPO
from megadpo.objectives.reward_model import BradleyTerry
from megadpo.objectives.token_level import LDDPO, WPO
from megadpo.objectives.unpaired import KTO, APOZeroUnpaired

trl = pytest.importorskip("trl")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from trl.experimental.cpo.cpo_trainer import CPOTrainer
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer
    from trl.trainer.dpo_trainer import DPOTrainer
    from trl.trainer.kto_trainer import KTOTrainer
    from trl.trainer.reward_trainer import RewardTrainer

EQUAL = 1e-5


def one() -> Any:
    """An accelerator of one process."""
    same = SimpleNamespace(device=torch.device("cpu"))
    same.gather = same.gather_for_metrics = lambda value: value
    return same


class Numbers(torch.nn.Module):
    """A model that gives each row of log-probabilities [B, L], whatever it is asked. accelerate takes only modules."""

    config = SimpleNamespace(num_labels=1)

    def __init__(self, logprob: Tensor, collision: Tensor) -> None:
        super().__init__()
        self.logprob, self.collision = logprob, collision

    def __call__(self, **_: Any) -> Any:
        zeros = torch.zeros_like(self.logprob)
        return SimpleNamespace(
            log_probs=self.logprob,
            log_sum_sq_probs=self.collision,
            entropy=zeros,
            mean_logits=zeros,
            is_top1=zeros.bool(),
        )


def padded(values_N: Tensor, batch: Sequences) -> Tensor:
    """[2 B, L]: TRL's order, all chosen, then all rejected; 0 where there is no token."""
    rows = torch.nn.utils.rnn.pad_sequence(list(values_N.split(batch.tokens_S.tolist())), batch_first=True)
    return torch.cat([rows[0::2], rows[1::2]])


def batch_of_pairs() -> Sequences:
    """Response sums are those of the tokens."""
    batch = usual(DPO(), groups=6, seed=4)
    return replace(
        batch,
        policy_S=torch.segment_reduce(batch.policy_N, "sum", lengths=batch.tokens_S),
        reference_S=torch.segment_reduce(batch.reference_N, "sum", lengths=batch.tokens_S),
    )


def trl_dpo(loss_types: list[str], batch: Sequences, **settings: Any) -> float:
    ones = padded(torch.ones_like(batch.policy_N), batch)
    mask = torch.cat([torch.zeros(len(ones), 1), ones], dim=1).long()  # a prompt of one token
    # its alpha divergence knows no float64
    dtype = torch.float32 if settings.get("f_divergence_type") == "alpha_divergence" else torch.float64
    policy = Numbers(padded(batch.policy_N, batch).to(dtype), padded(batch.collision_N, batch))
    reference = Numbers(padded(batch.reference_N, batch).to(dtype), policy.collision)
    has = {
        "model": policy,
        "ref_model": reference,
        "accelerator": one(),
        "aux_loss_enabled": False,
        "ld_alpha": None,
        "precompute_ref_logps": False,
        "f_divergence_type": "reverse_kl",
        "f_alpha_divergence_coef": 0.5,
        "loss_types": loss_types,
        "loss_weights": [1.0] * len(loss_types),
        "beta": 0.1,
        "label_smoothing": 0.0,
        "use_weighting": False,
        "discopop_tau": 0.05,
    } | settings
    has["args"] = SimpleNamespace(discopop_tau=has["discopop_tau"], gradient_checkpointing_kwargs=None)
    trainer = SimpleNamespace(**has, _metrics=defaultdict(lambda: defaultdict(list)), _total_train_tokens=0, _tp_size=1)
    policy.gradient_checkpointing_disable = policy.gradient_checkpointing_enable = lambda *_: None
    inputs = {"input_ids": mask, "attention_mask": torch.ones_like(mask), "completion_mask": mask}
    policy.is_gradient_checkpointing = False
    return float(DPOTrainer._compute_loss(trainer, policy, inputs, False))


def loss(objective: Any, batch: Sequences) -> float:
    outcome = objective(batch)
    return outcome.loss.item() / outcome.count.item()


B = 0.3
ROWS = [
    ("sigmoid", DPO(B), {}),
    ("hinge", RSOHinge(B), {}),
    ("ipo", IPO(B), {}),
    ("exo_pair", EXO(B, 1e-3), {"label_smoothing": 1e-3}),
    ("nca_pair", NCA(B), {}),
    ("robust", RobustDPO(B, 0.2), {"label_smoothing": 0.2}),
    ("sppo_hard", SPPOHard(B), {}),
    ("aot", AOT(B, 0.1), {"label_smoothing": 0.1}),
    ("aot_unpaired", AOTUnpaired(B, 0.1), {"label_smoothing": 0.1}),
    ("apo_zero", APOZero(B), {}),
    ("apo_down", APODown(B), {}),
    ("discopop", DiscoPOP(B, 0.05), {}),
    ("sigmoid_norm", NormDPO(B), {}),
    ("sigmoid", FDPO(B, "forward_kl"), {"f_divergence_type": "forward_kl"}),
    ("sigmoid", FDPO(B, "js"), {"f_divergence_type": "js_divergence"}),
    ("sigmoid", LDDPO(B, 0.4), {"ld_alpha": 0.4}),
    ("sigmoid", WPO(B, clamp=False), {"use_weighting": True}),
    # TRL's coefficient is 1 - the paper's alpha: u^(a_TRL - 1) / (a_TRL - 1) = -u^-alpha / alpha
    ("sigmoid", FDPO(B, "alpha", 0.3), {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.7}),
]


@pytest.mark.parametrize(("loss_type", "objective", "settings"), ROWS, ids=[f"{r[0]} {r[1]}" for r in ROWS])
def test_equal(loss_type: str, objective: Any, settings: dict[str, Any]) -> None:
    batch = batch_of_pairs()
    theirs = trl_dpo([loss_type], batch, beta=B, **settings)
    assert loss(objective, batch) == pytest.approx(theirs, rel=EQUAL, abs=EQUAL)


MIXED = [
    (["sft"], [1.0], Mix((SFT(), DPO(B)), (1.0, 0.0))),
    (["sigmoid", "sft"], [1.0, 0.4], DPOWithNLL(B, 0.4, "tokens")),
    (["sigmoid", "sft"], [0.8, 0.2], Mix((DPO(B), SFT()), (0.8, 0.2))),
    (["sigmoid", "nca_pair", "sft"], [0.8, 0.2, 1.0], Mix((DPO(B), NCA(B), SFT()), (0.8, 0.2, 1.0))),
]


@pytest.mark.parametrize(("types", "weights", "objective"), MIXED, ids=["+".join(row[0]) for row in MIXED])
def test_mixes(types: list[str], weights: list[float], objective: Any) -> None:
    """Equal where the batch is one micro-batch."""
    batch = batch_of_pairs()
    assert loss(objective, batch) == pytest.approx(trl_dpo(types, batch, beta=B, loss_weights=weights), rel=EQUAL)


def test_every_loss_type_of_trl_is_a_name_here() -> None:
    known = {
        "sigmoid",
        "hinge",
        "ipo",
        "exo_pair",
        "nca_pair",
        "robust",
        "bco_pair",
        "sppo_hard",
        "aot",
        "aot_unpaired",
    }
    known |= {"apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"}
    for name in known:
        assert name in OBJECTIVES or name in ALIASES
    assert {row[0] for row in ROWS} | {"bco_pair", "sft"} == known
    with pytest.raises(ValueError, match="discopop") as raised:  # TRL's own list
        trl_dpo(["no such"], batch_of_pairs())
    for name in known:
        assert f"'{name}'" in str(raised.value)


def test_label_smoothing_is_ignored_there() -> None:
    """Mitchell's equation 3: -(1 - e) h(m) - e h(-m). TRL's `sigmoid` gives plain DPO whatever e is."""
    batch = batch_of_pairs()
    theirs = trl_dpo(["sigmoid"], batch, beta=B, label_smoothing=0.2)
    assert theirs == pytest.approx(loss(DPO(B, 0.0), batch), rel=EQUAL)
    assert abs(theirs - loss(DPO(B, 0.2), batch)) > 1e-3


def test_bco_has_no_shift_there() -> None:
    """Jung et al.: -h(r_w - d) - h(-(r_l - d)), d the mean reward. TRL's `bco_pair` is that with d = 0."""
    batch = batch_of_pairs()
    batch = tokens_shifted(replace(batch, reference_S=batch.reference_S - 2), batch)  # all rewards well over 0
    theirs = trl_dpo(["bco_pair"], batch, beta=B)
    reward = B * (batch.policy_S - batch.reference_S).view(-1, 2)
    h = torch.nn.functional.logsigmoid
    assert theirs == pytest.approx(float((-h(reward[:, 0]) - h(-reward[:, 1])).mean()), rel=EQUAL)
    shifted = replace(batch, reference_S=batch.reference_S + reward.mean() / B)  # the shift put into the reference
    same = trl_dpo(["bco_pair"], tokens_shifted(shifted, batch), beta=B)
    assert loss(BCO(B), batch) == pytest.approx(same, rel=EQUAL)
    assert abs(theirs - loss(BCO(B), batch)) > 1e-3


def tokens_shifted(shifted: Sequences, batch: Sequences) -> Sequences:
    """The change of the reference's sums put into each response's first token, since TRL adds the tokens up itself."""
    values = batch.reference_N.clone()
    values[batch.starts_S()] += shifted.reference_S - batch.reference_S
    return replace(shifted, reference_N=values)


def test_the_weights_of_wpo_are_not_clamped_there() -> None:
    """The authors' code (run_wpo.py) keeps the product of the weights at most 1. TRL lets it grow."""
    batch = batch_of_pairs()
    likely = replace(batch, collision_N=batch.policy_N - 0.5)
    theirs = trl_dpo(["sigmoid"], likely, beta=B, use_weighting=True)
    assert theirs == pytest.approx(loss(WPO(B, clamp=False), likely), rel=EQUAL)
    assert loss(WPO(B), likely) == pytest.approx(loss(DPO(B), likely), rel=1e-12)
    assert theirs > 2 * loss(WPO(B), likely)


def test_cpo_and_simpo() -> None:
    batch = batch_of_pairs()
    sums, average = batch.policy_S.view(-1, 2), (batch.policy_S / batch.tokens_S).view(-1, 2)
    has = {"accelerator": one(), "alpha": 0.0, "label_smoothing": 0.1}
    simpo = SimpleNamespace(**has, loss_type="simpo", beta=2.0, simpo_gamma=0.7)
    theirs, *_ = CPOTrainer.cpo_loss(simpo, average[:, 0], average[:, 1])
    assert loss(SimPO(2.0, 0.7, 0.1), batch) == pytest.approx(float(theirs.mean()), rel=EQUAL)
    cpo = SimpleNamespace(**has, loss_type="sigmoid", beta=B)
    theirs, *_ = CPOTrainer.cpo_loss(cpo, sums[:, 0], sums[:, 1])
    # its likelihood is over prompt and response of one micro-batch; the paper has that of the response
    nll = -sums[:, 0].sum() / batch.counts.first_tokens
    assert loss(CPO(B, 0.5, 0.1), batch) == pytest.approx(float(theirs.mean() + 0.5 * nll), rel=EQUAL)


def test_orpo() -> None:
    batch = batch_of_pairs()
    average = (batch.policy_S / batch.tokens_S).view(-1, 2)
    trainer = SimpleNamespace(beta=B, accelerator=one())
    ratio, *_ = ORPOTrainer.odds_ratio_loss(trainer, average[:, 0], average[:, 1])
    # equation 6 has the response's likelihood; TRL takes the prompt's too, averaged over a micro-batch
    theirs = -average[:, 0].mean() - ratio.mean()
    assert loss(ORPO(B), batch) == pytest.approx(float(theirs), rel=EQUAL)


@pytest.mark.parametrize("drift", [0.8, -0.5])
@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_kto(loss_type: str, drift: float) -> None:
    """On one rank with one micro-batch; over several TRL's z is the mean of the ranks' means."""
    batch = usual(KTO(), groups=6, seed=4)
    batch = replace(
        batch,
        policy_S=torch.segment_reduce(batch.policy_N, "sum", lengths=batch.tokens_S),
        mismatched_kl=torch.tensor(drift, dtype=torch.float64),
    )
    rows = torch.nn.utils.rnn.pad_sequence(list(batch.policy_N.split(batch.tokens_S.tolist())), batch_first=True)
    ones = torch.nn.utils.rnn.pad_sequence([torch.ones(int(n)) for n in batch.tokens_S], batch_first=True)
    mask = torch.cat([torch.zeros(len(ones), 1), ones], dim=1).long()
    policy = Numbers(rows, torch.zeros_like(rows))
    trainer = SimpleNamespace(
        model=policy,
        accelerator=one(),
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        calculate_KL=loss_type == "kto",
        loss_type=loss_type,
        beta=B,
        desirable_weight=1.2,
        undesirable_weight=0.8,
        _compute_kl_logps=lambda *_: torch.full((len(rows),), drift, dtype=torch.float64),
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = {
        "input_ids": mask,
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
        "label": batch.labels_S,
        "ref_logps": batch.reference_S,
        "ref_KL_logps": torch.zeros(len(rows), dtype=torch.float64),
    }
    theirs = float(KTOTrainer._compute_loss(trainer, policy, inputs, False))
    objective = (KTO if loss_type == "kto" else APOZeroUnpaired)(B, 1.2, 0.8)
    assert loss(objective, batch) == pytest.approx(theirs, rel=EQUAL)


@pytest.mark.parametrize("margin", [False, True])
def test_reward(margin: bool) -> None:
    batch = usual(BradleyTerry(), groups=6)
    rewards = batch.policy_S.view(-1, 2)
    inputs: dict[str, Any] = {"input_ids": torch.ones(12, 3).long(), "attention_mask": torch.ones(12, 3)}
    if margin:
        inputs["margin"] = batch.scores_S.view(-1, 2)[:, 0] - batch.scores_S.view(-1, 2)[:, 1]

    class Scalar:
        training = True

        def __call__(self, **_: Any) -> Any:
            return SimpleNamespace(logits=torch.cat([rewards[:, 0], rewards[:, 1]])[:, None])

    trainer = SimpleNamespace(
        model=Scalar(),
        accelerator=one(),
        aux_loss_enabled=False,
        args=SimpleNamespace(center_rewards_coefficient=0.01),
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    name = "_compute_loss" if hasattr(RewardTrainer, "_compute_loss") else "compute_loss"
    theirs = float(getattr(RewardTrainer, name)(trainer, trainer.model, inputs))
    assert loss(BradleyTerry(margin, 0.01), batch) == pytest.approx(theirs, rel=EQUAL)
