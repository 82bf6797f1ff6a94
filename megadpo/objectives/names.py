"""What objectives are called: here, and in the programs that users come from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from megadpo.objectives.across_pairs import AOT, BCO, AOTUnpaired, BetaDPO
from megadpo.objectives.anchored import EXO, NCA, APODown, APOZero, DiscoPOP
from megadpo.objectives.base import Objective
from megadpo.objectives.divergences import FDPO
from megadpo.objectives.listwise import RRHF, PlackettLuceDPO
from megadpo.objectives.margins import IPO, ODPO, RewardRPO, RSOHinge, SPPOHard
from megadpo.objectives.mixes import Mix
from megadpo.objectives.pairwise import DPO, DPOP, RDPO, SPIN, DPOWithNLL, NormDPO, RobustDPO
from megadpo.objectives.reference_free import CLICK, CPO, ORPO, SimPO, SLiC
from megadpo.objectives.reward_model import BradleyTerry, PlackettLuceReward
from megadpo.objectives.supervised import SFT
from megadpo.objectives.token_level import LDDPO, TDPO1, TDPO2, WPO, Cringe, Llama3DPO
from megadpo.objectives.unpaired import KTO, APOZeroUnpaired, BCOUnpaired

OBJECTIVES: dict[str, type[Any]] = {
    "dpo": DPO,
    "robust": RobustDPO,
    "dpo_nll": DPOWithNLL,
    "dpo_norm": NormDPO,
    "r_dpo": RDPO,
    "dpop": DPOP,
    "spin": SPIN,
    "ipo": IPO,
    "hinge": RSOHinge,
    "odpo": ODPO,
    "rpo_reward": RewardRPO,
    "sppo_hard": SPPOHard,
    "exo": EXO,
    "nca": NCA,
    "apo_zero": APOZero,
    "apo_down": APODown,
    "discopop": DiscoPOP,
    "f_dpo": FDPO,
    "ld_dpo": LDDPO,
    "llama3": Llama3DPO,
    "tdpo1": TDPO1,
    "tdpo2": TDPO2,
    "wpo": WPO,
    "cringe": Cringe,
    "aot": AOT,
    "aot_unpaired": AOTUnpaired,
    "bco": BCO,
    "beta_dpo": BetaDPO,
    "slic": SLiC,
    "simpo": SimPO,
    "orpo": ORPO,
    "cpo": CPO,
    "click": CLICK,
    "kto": KTO,
    "bco_unpaired": BCOUnpaired,
    "apo_zero_unpaired": APOZeroUnpaired,
    "plackett_luce": PlackettLuceDPO,
    "rrhf": RRHF,
    "reward": BradleyTerry,
    "reward_list": PlackettLuceReward,
    "sft": SFT,
    "mix": Mix,
}
"""By the name that the run file gives them (`objective.loss_type`)."""


@dataclass(frozen=True)
class Alias:
    """Another program's name for an objective. settings: what the name itself sets. above_0: a setting that the name
    says is there, and that is 0 where it is not given."""

    loss_type: str
    where: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    above_0: str | None = None


ALIASES: dict[str, Alias] = {
    "sigmoid": Alias("dpo", "TRL, LLaMA-Factory"),
    "cdpo": Alias("dpo", "papers", above_0="label_smoothing"),
    "conservative_dpo": Alias("dpo", "papers", above_0="label_smoothing"),
    "robust_dpo": Alias("robust", "papers"),
    "irpo": Alias("dpo_nll", "papers", {"normalise": "response"}),
    "rpo_nll": Alias("dpo_nll", "papers", {"normalise": "response"}),
    "sigmoid_norm": Alias("dpo_norm", "TRL"),
    "rdpo": Alias("r_dpo", "papers"),
    "smaug": Alias("dpop", "papers"),
    "rso": Alias("hinge", "papers"),
    "rso_hinge": Alias("hinge", "papers"),
    "rpo_bwd_kl": Alias("rpo_reward", "NeMo-Aligner, NeMo-RL", {"distance": "backward_kl"}),
    "rpo_fwd_kl": Alias("rpo_reward", "NeMo-Aligner, NeMo-RL", {"distance": "forward_kl"}),
    "rpo_sq": Alias("rpo_reward", "NeMo-Aligner, NeMo-RL", {"distance": "squared"}),
    "sppo": Alias("sppo_hard", "papers"),
    "exo_pair": Alias("exo", "TRL"),
    "nca_pair": Alias("nca", "TRL"),
    "bco_pair": Alias("bco", "TRL"),
    "fdpo": Alias("f_dpo", "papers"),
    "ld": Alias("ld_dpo", "papers"),
    "tdpo": Alias("tdpo2", "papers"),
    "slic_hf": Alias("slic", "papers"),
    "apo": Alias("apo_zero", "papers"),
    "pl": Alias("plackett_luce", "papers"),
    "pl_dpo": Alias("plackett_luce", "papers"),
    "pairwise_cringe": Alias("cringe", "papers"),
    "rm": Alias("reward", "LLaMA-Factory, ms-swift"),
    "reward_model": Alias("reward", "papers"),
    "bradley_terry": Alias("reward", "papers"),
    "nll": Alias("sft", "TRL"),
    "chunked_nll": Alias("sft", "TRL"),
}

AMBIGUOUS = {
    "rpo": "rpo means two losses: write dpo_nll for DPO with the chosen response's likelihood (TRL's rpo_alpha, "
    "ms-swift), or rpo_reward for NVIDIA's reward-aware one (NeMo)",
    "aot_pair": "aot_pair was TRL's name for the formula of aot_unpaired, and its text said the paired one: write aot "
    "(margins of pairs, sorted) or aot_unpaired (chosen and rejected, each sorted)",
    "kto_pair": "kto_pair is gone from TRL and was never in the paper: write kto with unpaired data, or apo_zero, "
    "which anchors each response of a pair on its own",
    "alphapo": "alphapo (TRL's CPO trainer) shapes SimPO's reward by a power, which is not here, and is not apo: write "
    "simpo, which it is with an alpha of 0",
    "scale": "scale (NeMo-Aligner) is DPO weighted by the judge's margin, which is not here: write odpo or rpo_reward",
    **{
        name: f"{name} needs generation during training, which is not here: write dpo or another objective on pairs"
        for name in ("ppo", "grpo", "rloo", "online_dpo", "gkd")
    },
    "dft": "dft (dynamic fine-tuning) weighs each token's likelihood by its probability, which is not here: write sft "
    "for the plain one",
    **{
        name: f"{name} (triple preference optimisation) wants a third, better response beside each pair, which is not "
        "here: write simpo, or a mix of simpo and sft"
        for name in ("tpo", "tpo_l")
    },
}
"""Names that mean several things, or something that is not here: what to write instead."""

SETTINGS_ELSEWHERE = {
    "pref_beta": "beta",
    "rl_beta": "beta",
    "reference_policy_kl_penalty": "beta",
    "ref_policy_kl_penalty": "beta",
    "dpo_label_smoothing": "label_smoothing",
    "simpo_gamma": "gamma",
    "cpo_alpha": "alpha (beside simpo: loss_type: mix, with parts simpo and sft)",
    "ld_alpha": "alpha of loss_type: ld_dpo",
    "pref_ftx": "alpha of loss_type: dpo_nll",
    "rpo_alpha": "alpha of loss_type: dpo_nll (normalise: tokens for TRL's mean)",
    "sft_loss_weight": "alpha of loss_type: dpo_nll (normalise: sum, or response with NeMo's sft_average_log_probs)",
    "sft_average_log_probs": "normalise of loss_type: dpo_nll (response for true, sum for false)",
    "preference_loss_weight": "weights of loss_type: mix",
    "sync_ref_model": "nothing: the reference stays as it is; start again from an export to move it",
    "precompute_ref_log_probs": "reference.mode: precomputed, which is the default",
    "gamma_beta_ratio": "gamma, which is gamma_beta_ratio x beta",
    "gt_reward_scale": "eta",
    "discopop_tau": "tau",
    "f_divergence_type": "divergence of loss_type: f_dpo (js for js_divergence, alpha for alpha_divergence)",
    "f_alpha_divergence_coef": "alpha of loss_type: f_dpo, which is 1 - TRL's coefficient",
    "use_weighting": "loss_type: wpo (clamp: false for TRL's form)",
    "loss_weights": "weights of loss_type: mix",
    "center_rewards_coefficient": "centering",
    "preference_average_log_probs": "loss_type: dpo_norm",
    "pref_loss": "loss_type",
    "preference_loss": "loss_type",
    "reference_free": "loss_type: cpo (alpha: 0 for DPO without a reference)",
    "kto_chosen_weight": "desirable_weight",
    "kto_rejected_weight": "undesirable_weight",
    "pref_bco_weight": "weights of loss_type: mix, with parts dpo and bco",
}
"""Settings of other programs: what carries their meaning here."""


SETTINGS_IN_PAPERS = {
    "ipo": {"tau": "beta"},
    "orpo": {"lambda": "beta", "alpha": "beta"},
    "dpop": {"lambda": "alpha"},
    "slic": {"lambda": "alpha"},
    "spin": {"lambda": "beta"},
    "hinge": {"gamma": "beta"},
    "sppo_hard": {"eta": "beta, which is 1 / eta"},
}
"""What an objective's own paper calls its settings: what carries them here."""


def name_of(objective: Objective) -> str:
    """The loss_type of an objective."""
    return next(name for name, kind in OBJECTIVES.items() if type(objective) is kind)


def as_settings(objective: Objective) -> dict[str, Any]:
    """The section of a run file that says this objective."""
    values = {f.name: getattr(objective, f.name) for f in fields(objective)}
    if isinstance(objective, Mix):
        values["parts"] = [as_settings(part) for part in objective.parts]
        values["weights"] = list(objective.weights)
    return {"loss_type": name_of(objective)} | values


def aliases_of(loss_type: str) -> list[str]:
    """The other names of an objective, those first that set nothing."""
    return sorted((n for n, a in ALIASES.items() if a.loss_type == loss_type), key=lambda n: bool(ALIASES[n].settings))


def title(objective: Objective) -> str:
    """One line for the log: the name, what it is, its settings, and what else it is called."""
    if isinstance(objective, Mix):
        weights = objective.weights or (1.0,) * len(objective.parts)
        return "mix of " + " + ".join(f"{w:g} x [{title(p)}]" for w, p in zip(weights, objective.parts, strict=True))
    name = name_of(objective)
    settings = ", ".join(f"{key} {value}" for key, value in asdict(objective).items())
    summary = (type(objective).__doc__ or "").strip().split("\n")[0].rstrip(".")
    others = f" (elsewhere: {', '.join(aliases_of(name))})" if aliases_of(name) else ""
    return f"{name}{others}: {summary}" + (f"; {settings}" if settings else "")
