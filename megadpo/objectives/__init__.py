"""Objectives: frozen dataclasses whose fields are hyper-parameters and whose call is the formula."""

from megadpo.objectives import across
from megadpo.objectives.base import Counts, Objective, Outcome, Sequences
from megadpo.objectives.mixes import Mix
from megadpo.objectives.names import OBJECTIVES
from megadpo.objectives.pairwise import DPO
from megadpo.objectives.supervised import SFT

__all__ = ["DPO", "OBJECTIVES", "SFT", "Counts", "Mix", "Objective", "Outcome", "Sequences", "across"]
