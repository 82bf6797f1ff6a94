"""Objectives over pairs: the first response of a group is the chosen one, the second the rejected one.

Notation: w chosen, l rejected; r = beta (log policy - log reference), the implicit reward of a response (nats).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from megadpo_kernels.pairs import pair_loss
from torch import Tensor
from torch.nn.functional import logsigmoid

from megadpo.objectives.base import Outcome, Sequences

PAIR_METRICS = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
)


TIE = 1e-4
"""Nats. Log-ratios nearer than this are the rounding of two grids or two packings, not a preference."""


def pair_metrics(policy_G2: Tensor, reward_G2: Tensor, beta: float) -> Tensor:
    """Sums of PAIR_METRICS over the groups. A tie counts half an accuracy (TRL counts it as a miss)."""
    margin_G = reward_G2[:, 0] - reward_G2[:, 1]
    tie_G = margin_G.abs() < TIE * beta
    accuracy_G = torch.where(tie_G, torch.full_like(margin_G, 0.5), (margin_G > 0).to(margin_G.dtype))
    return torch.stack(
        [
            reward_G2[:, 0].sum(),
            reward_G2[:, 1].sum(),
            margin_G.sum(),
            accuracy_G.sum(),
            policy_G2[:, 0].sum(),
            policy_G2[:, 1].sum(),
        ]
    ).detach()


@dataclass(frozen=True)
class DPO:
    """L = -(1 - e) log sigmoid(r_w - r_l) - e log sigmoid(r_l - r_w), mean over pairs.

    e = label_smoothing = 0: Rafailov et al. 2023, equation 7 (arXiv 2305.18290). e > 0: conservative DPO, Mitchell
    2023, equation 3 (ericmitchell.ai/cdpo.pdf). TRL's `sigmoid` ignores label_smoothing since its #3906; here it
    means what the paper says.
    """

    beta: float = 0.1
    label_smoothing: float = 0.0

    needs_reference: ClassVar[bool] = True
    responses: ClassVar[int | None] = 2
    metrics: ClassVar[tuple[str, ...]] = PAIR_METRICS

    def problems(self) -> list[str]:
        found = []
        if not self.beta > 0:
            found.append(f"objective.beta = {self.beta}: must be over 0; 0.1 is usual")
        if not 0 <= self.label_smoothing < 0.5:
            found.append(
                f"objective.label_smoothing = {self.label_smoothing}: must be in [0, 0.5); at 0.5 the labels say "
                "nothing; 0 is plain DPO"
            )
        return found

    def __call__(self, sequences: Sequences) -> Outcome:
        assert sequences.reference_S is not None
        if sequences.backend == "triton":  # all of what follows in one launch
            pairs = torch.tensor(len(sequences.tokens_S) // 2, dtype=torch.int, device=sequences.policy_S.device)
            loss, metrics = pair_loss(sequences.policy_S, sequences.reference_S, self.beta, self.label_smoothing)
            return Outcome(loss, pairs, metrics)
        policy_G2 = sequences.policy_S.view(-1, 2)
        reward_G2 = self.beta * (policy_G2 - sequences.reference_S.view(-1, 2))
        margin_G = reward_G2[:, 0] - reward_G2[:, 1]
        loss_G = -(1 - self.label_smoothing) * logsigmoid(margin_G) - self.label_smoothing * logsigmoid(-margin_G)
        count = torch.tensor(len(loss_G), dtype=torch.int, device=loss_G.device)
        return Outcome(loss_G.sum(), count, pair_metrics(policy_G2, reward_G2, self.beta))
