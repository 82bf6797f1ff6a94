"""Several objectives at once, each with a weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from megadpo.objectives.base import FROM_REFERENCE, Objective, Outcome, Sequences, Unit
from megadpo.objectives.supervised import SFT


@dataclass(frozen=True)
class Mix:
    """A weighted sum of objectives, each with its own denominator.

    Formula: sum_i weight_i x L_i; every L_i is the exact mean over the global batch that its own text says

    Paper: Wang et al. 2024, mixed preference optimisation (arXiv 2411.10442): dpo, bco and sft with weights 0.8, 0.2
    and 1.

    TRL: a list for loss_type, with loss_weights; its settings are shared by all, here each part has its own. An `sft`
    beside pairs trains on the chosen response, as there; beside unpaired data it is refused.
    """

    parts: tuple[Objective, ...]
    """The objectives: a list of sections, each with its loss_type and settings."""
    weights: tuple[float, ...] = ()
    """One number per part, at least 0; all 1 where not given."""

    unit: ClassVar[Unit] = "groups"

    @property
    def needs(self) -> frozenset[str]:
        return frozenset().union(*(part.needs for part in self.parts))

    @property
    def needs_reference(self) -> bool:
        return bool(self.needs & FROM_REFERENCE)

    @property
    def top_k(self) -> int | None:
        return next((part.top_k for part in self.parts if part.top_k is not None), None)

    @property
    def head(self) -> Literal["logprob", "scalar"]:
        return self.parts[0].head

    @property
    def shares(self) -> Mapping[str, str]:
        return {name: count for part in self.parts for name, count in part.shares.items()}

    @property
    def responses(self) -> int | None:
        """Supervised training goes with any: it takes the first response."""
        sizes = [part.responses for part in self.parts if not isinstance(part, SFT)]
        return sizes[0] if sizes else SFT.responses

    @property
    def whole_batch(self) -> bool:
        return any(part.whole_batch for part in self.parts)

    @property
    def needs_gap(self) -> bool:
        return any(part.needs_gap for part in self.parts)

    @property
    def metrics(self) -> tuple[str, ...]:
        """A loss for each part, then the parts' metrics; of two with one name the first."""
        return tuple(dict.fromkeys([*self._losses(), *(name for part in self.parts for name in part.metrics)]))

    def _losses(self) -> list[str]:
        return [f"loss/{number}/{type(part).__name__}" for number, part in enumerate(self.parts)]

    def problems(self) -> list[str]:
        found = []
        if not self.parts:
            return ["objective.parts = []: must name at least one objective"]
        if self.weights and len(self.weights) != len(self.parts):
            found.append(
                f"objective.weights has {len(self.weights)} numbers for {len(self.parts)} parts: must be one for each, "
                "or left out (all 1)"
            )
        if self.weights and (min(self.weights) < 0 or max(self.weights) <= 0):
            found.append(f"objective.weights = {list(self.weights)}: must be at least 0, and one of them over 0")
        if any(isinstance(part, Mix) for part in self.parts):
            found.append("objective.parts has a mix in a mix: list its parts with products of the weights instead")
            return found
        sizes = {part.responses for part in self.parts if not isinstance(part, SFT)}
        if len(sizes) > 1:
            found.append(
                "objective.parts: need groups of different sizes ("
                + ", ".join(f"{type(part).__name__}: {part.responses or 'any number'}" for part in self.parts)
                + "); mix objectives over the same kind of data"
            )
        labelled = next((part for part in self.parts if "labels_S" in part.needs), None)
        if labelled is not None and any(isinstance(part, SFT) for part in self.parts):
            found.append(
                f"objective.parts: sft beside {type(labelled).__name__} would raise the likelihood of undesirable "
                "responses too; leave sft out, or train it alone on the desirable ones (data.convert: "
                "unpaired_to_demonstrations) or mix it with an objective over pairs"
            )
        if len({part.head for part in self.parts}) > 1:
            found.append("objective.parts: a reward model's loss does not mix with a policy's")
        if len({part.top_k for part in self.parts} - {None}) > 1:
            found.append("objective.parts: one token is drawn for all parts; give them the same top_k")
        for number, part in enumerate(self.parts):
            found += [
                text.replace("objective.", f"objective.parts {number + 1} (loss_type {type(part).__name__}): ", 1)
                for text in part.problems()
            ]
        return found

    def __call__(self, sequences: Sequences) -> Outcome:
        loss = torch.zeros((), dtype=torch.float64, device=sequences.policy_S.device)
        named: dict[str, torch.Tensor] = {}
        for part, weight, name in zip(self.parts, self.weights or [1.0] * len(self.parts), self._losses(), strict=True):
            outcome = part(sequences)
            share = sequences.rescale(part.unit, to="groups") * outcome.loss
            loss = loss + weight * share
            named[name] = share.detach().float()
            for metric, value in zip(part.metrics, outcome.metrics, strict=True):
                named.setdefault(metric, value)
        return Outcome(loss, sequences.count(self.unit), torch.stack([named[name] for name in self.metrics]))
