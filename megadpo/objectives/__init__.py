"""Objectives by the name that the run file gives them (`objective.loss_type`)."""

from megadpo.objectives.base import Objective, Outcome, Sequences
from megadpo.objectives.pairwise import DPO
from megadpo.objectives.supervised import SFT

OBJECTIVES: dict[str, type[DPO] | type[SFT]] = {"dpo": DPO, "sigmoid": DPO, "sft": SFT}

__all__ = ["DPO", "OBJECTIVES", "SFT", "Objective", "Outcome", "Sequences"]
