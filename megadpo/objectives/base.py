"""What every objective gets and gives.

Axes: G groups, S sequences (responses), N scored tokens; response k of group g is row ``offsets_G1[g] + k``, and its
tokens follow those of the response before. Units: nats. Formulas are evaluated in float64: they are a few numbers per
response, and a sum of 400 nats has only 5 digits behind the point in float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, ClassVar, Literal, Protocol

import torch
from megadpo_kernels import Backend
from torch import Tensor

Unit = Literal["groups", "responses", "tokens", "first_tokens"]
"""What a term of a loss is a mean over: see Counts."""


@dataclass(frozen=True)
class Counts:
    """How much there is of each unit; int64 scalars."""

    groups: Tensor
    responses: Tensor
    tokens: Tensor
    """Scored tokens of all responses."""
    first_tokens: Tensor
    """Scored tokens of every group's first response: the chosen one, or the demonstration."""

    @staticmethod
    def of(tokens_S: Tensor, offsets_G1: Tensor) -> Counts:
        size = torch.tensor([len(offsets_G1) - 1, len(tokens_S)], device=tokens_S.device)
        return Counts(size[0], size[1], tokens_S.sum(), tokens_S[offsets_G1[:-1]].sum())


@dataclass(frozen=True)
class Sequences:
    """The responses of one micro-batch. Fields that an objective does not name in its `needs` may be None.

    policy_S:    float64 [S], log-probability of each response under the policy; carries the gradient. For objectives
                 with `head = "scalar"`: the reward that the model gives to the response, float32.
    reference_S: float64 [S], the log-probability under the reference.
    tokens_S:    int64 [S], scored tokens of each response, the end-of-sequence token included; at least 1.
    offsets_G1:  int64 [G + 1], where each group's responses start; best first (pairs: chosen, then rejected).

    labels_S:    bool [S], unpaired data: True desirable, False undesirable.
    scores_S:    float32 [S], what a judge gave to the response. A pair's margin is the difference of its two scores,
                 so data with one margin m per pair carries scores (m, 0).
    mismatched_kl: float64 scalar, mean of log policy - log reference over the global batch's responses to another
                 prompt than their own; neither clamped nor with gradient.

    policy_N:    float32 [N], log-probability of each scored token under the policy; carries the gradient.
    reference_N: float32 [N], the same under the reference.
    body_N:      bool [N], False for formatting tokens (header, end of turn).
    collision_N: float32 [N], log of the sum over the vocabulary of squared policy probabilities; no gradient.
    kl_N:        float32 [N], KL(reference || policy) of the next-token distributions; carries the gradient.
    rival_N:     float32 [N], policy's log-probability of a token drawn from its own top k, another than the scored one;
                 carries the gradient.

    whole:       counts of the global batch that these sequences are a part of; None: they are all of it.
    backend:     where it is triton, an objective that has a fused kernel uses it.
    """

    policy_S: Tensor
    reference_S: Tensor | None
    tokens_S: Tensor
    offsets_G1: Tensor
    labels_S: Tensor | None = None
    scores_S: Tensor | None = None
    mismatched_kl: Tensor | None = None
    policy_N: Tensor | None = None
    reference_N: Tensor | None = None
    body_N: Tensor | None = None
    collision_N: Tensor | None = None
    kl_N: Tensor | None = None
    rival_N: Tensor | None = None
    whole: Counts | None = None
    backend: Backend = "auto"

    def field(self, name: str) -> Tensor:
        """A field that the objective needs; in float64 where it is a real number."""
        value = getattr(self, name)
        if value is None:
            raise ValueError(f"the objective needs {name}, and these sequences have none")
        return value.double() if value.is_floating_point() else value

    @property
    def counts(self) -> Counts:
        """Of these sequences alone."""
        return Counts.of(self.tokens_S, self.offsets_G1)

    def count(self, unit: Unit) -> Tensor:
        """How many of these units they hold, as Megatron-Core's schedule wants it: int32, scalar."""
        return getattr(self.counts, unit).to(torch.int)

    def rescale(self, unit: Unit, to: Unit) -> Tensor:
        """float64 scalar: times a sum to be divided by the global batch's `unit`, it is one to be divided by `to`.

        So a loss may have terms with different denominators and is still divided once, by one count.
        """
        whole = self.counts if self.whole is None else self.whole
        return getattr(whole, to).double() / getattr(whole, unit).clamp(min=1)

    def starts_S(self) -> Tensor:
        """int64 [S]: where each response's tokens start among the N."""
        return self.tokens_S.cumsum(0) - self.tokens_S

    def per_token(self, values_S: Tensor) -> Tensor:
        """[N]: every token gets its response's value."""
        size = len(self.field("policy_N"))
        return torch.repeat_interleave(values_S, self.tokens_S, output_size=size)

    def places_N(self) -> Tensor:
        """int64 [N]: place of each token in its own response, from 0."""
        size = len(self.field("policy_N"))
        return torch.arange(size, device=self.tokens_S.device) - self.per_token(self.starts_S())

    def sums(self, values_N: Tensor) -> Tensor:
        """float64 [S]: sum over each response's tokens, with gradient."""
        return torch.segment_reduce(values_N.double(), "sum", lengths=self.tokens_S, unsafe=True)

    def to(self, device: torch.device) -> Sequences:
        """The same numbers on another device, without a gradient."""
        moved: dict[str, Any] = {
            name: value.detach().to(device) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        if self.whole is not None:
            moved["whole"] = Counts(*(value.to(device) for value in vars(self.whole).values()))
        return replace(self, **moved)


@dataclass(frozen=True)
class Outcome:
    """loss: scalar sum that carries the gradient. count: what it is divided by, once, globally (int, scalar).
    metrics: float32 [len(objective.metrics)], detached sums; each is divided by the global count of groups (see
    Objective.shares for others)."""

    loss: Tensor
    count: Tensor
    metrics: Tensor


class Objective(Protocol):
    """A frozen dataclass: its fields are its hyper-parameters, calling it is its formula."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def needs(self) -> frozenset[str]:
        """Names of the fields of Sequences that must be there, beside policy_S, tokens_S and offsets_G1."""

    @property
    def needs_reference(self) -> bool: ...

    @property
    def head(self) -> Literal["logprob", "scalar"]:
        """Whether policy_S are log-probabilities, or the rewards of a scalar head."""

    @property
    def top_k(self) -> int | None:
        """From how many of the policy's likeliest tokens `rival_N`'s are drawn; None where it is not needed."""

    @property
    def responses(self) -> int | None:
        """How many responses a group must have; None: any number."""

    @property
    def unit(self) -> Unit:
        """What the loss is a mean over."""

    @property
    def whole_batch(self) -> bool:
        """Whether the formula looks across groups. It is then given the whole global batch at once."""

    @property
    def needs_gap(self) -> bool:
        """Whether a pair is of use only where the chosen response has the higher score."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of what `Outcome.metrics` carries, in its order."""

    @property
    def shares(self) -> Mapping[str, str]:
        """Metrics that are a mean over something else than groups: {name: the metric that counts it}."""

    def problems(self) -> list[str]:
        """What is wrong with its settings, one line each; checked when the run file is read."""

    def __call__(self, sequences: Sequences) -> Outcome: ...


FROM_REFERENCE = frozenset({"reference_S", "reference_N", "kl_N", "mismatched_kl"})
"""Fields of Sequences that only a reference model can fill."""


class Formula:
    """What most objectives have in common; the dataclasses of this package say where they differ."""

    needs: ClassVar[frozenset[str]] = frozenset({"reference_S"})
    head: ClassVar[Literal["logprob", "scalar"]] = "logprob"
    responses: ClassVar[int | None] = 2
    unit: ClassVar[Unit] = "groups"
    whole_batch: ClassVar[bool] = False
    metrics: ClassVar[tuple[str, ...]] = ()
    shares: ClassVar[Mapping[str, str]] = MappingProxyType({})

    @property
    def needs_reference(self) -> bool:
        return bool(self.needs & FROM_REFERENCE)

    @property
    def needs_gap(self) -> bool:
        return False

    @property
    def top_k(self) -> int | None:
        return None

    def problems(self) -> list[str]:
        return []

    def must(self, **rules: tuple[bool, str]) -> list[str]:
        """One line per broken rule: setting=(whether it holds, what is allowed)."""
        return [
            f"objective.{name} = {getattr(self, name)}: must be {allowed}"
            for name, (holds, allowed) in rules.items()
            if not holds
        ]


def sums_of(*columns: Tensor) -> Tensor:
    """float32 [number of columns], detached: metrics from one value per group or response each."""
    return torch.stack([column.double().sum() for column in columns]).detach().float()
