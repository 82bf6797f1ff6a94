"""For objectives that look across groups: micro-batches joined to the global batch, and its gradient taken apart again.

The loss of the whole batch is a function of every response's sums. Its slope with respect to each is exact once the
sums of all are known (one forward pass); afterwards sum x slope has the right gradient in each micro-batch alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from megadpo.objectives.base import Objective, Outcome, Sequences

CARRIERS = ("policy_S", "policy_N", "kl_N", "rival_N")
"""Fields of Sequences through which a gradient goes."""


def join(parts: Sequence[Sequences]) -> Sequences:
    """One after the other, as one. `mismatched_kl` and `whole` are the first one's: they are the same in all."""
    ends = torch.tensor([0, *(len(part.tokens_S) for part in parts)]).cumsum(0).tolist()
    offsets = [part.offsets_G1[:-1] + start for part, start in zip(parts, ends, strict=False)]
    joined: dict[str, Any] = {"offsets_G1": torch.cat([*offsets, parts[0].offsets_G1.new_tensor([ends[-1]])])}
    for field in fields(Sequences):
        values = [getattr(part, field.name) for part in parts]
        if field.name.endswith(("_S", "_N")) and values[0] is not None:
            joined[field.name] = torch.cat(values)
    return replace(parts[0], **joined)


@torch.enable_grad()
def slopes(parts: Sequence[Sequences], objective: Objective) -> tuple[Outcome, list[dict[str, Tensor]]]:
    """The outcome of all parts as one batch, and for each part the slope of its loss sum along every carrier.

    Also where the caller has switched gradients off, as evaluation does."""
    leaves = [
        {n: getattr(part, n).detach().requires_grad_() for n in CARRIERS if getattr(part, n) is not None}
        for part in parts
    ]
    outcome = objective(join([replace(part, **leaf) for part, leaf in zip(parts, leaves, strict=True)]))
    flat = [leaf for part in leaves for leaf in part.values()]
    found = iter(torch.autograd.grad(outcome.loss, flat, materialize_grads=True, allow_unused=True))
    return outcome, [{name: next(found) for name in part} for part in leaves]


def along(sequences: Sequences, slope: dict[str, Tensor]) -> Tensor:
    """Scalar whose gradient is the given slope."""
    return torch.stack([(getattr(sequences, name).double() * value).sum() for name, value in slope.items()]).sum()
