"""Which kind of data an objective is made for."""

from __future__ import annotations

from typing import Literal

from megadpo.objectives.base import Objective

Kind = Literal["demonstrations", "unpaired", "pairs", "lists"]
"""What a group of data is: one response to imitate; one response with a label; chosen and rejected; a ranking, best
first."""


def kind_of(objective: Objective) -> Kind:
    """The kind of data that an objective is made for."""
    if "labels_S" in objective.needs:
        return "unpaired"
    kinds: dict[int | None, Kind] = {1: "demonstrations", 2: "pairs", None: "lists"}
    return kinds[objective.responses]
