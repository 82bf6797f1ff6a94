"""Batches of numbers for objectives, without a model: usual ones, extreme ones, and ties."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from megadpo.objectives import Sequences

CORNERS = [1e4, 1e3, 37.5, 1.25, -1.25, -37.5, -1e3, -1e4]
"""Log-ratios in nats."""


def exact(values: torch.Tensor) -> torch.Tensor:
    """Numbers that float32 can hold, in float64."""
    return values.float().double()


def usual(objective: Any, groups: int = 8, seed: int = 0) -> Sequences:
    """Responses of 1 to 9 tokens at some nats each, log-ratios of some nats; every field filled."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    if objective.responses is None:
        sizes = torch.randint(2, 6, (groups,), generator=generator)
    else:
        sizes = torch.full((groups,), objective.responses)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])
    count = int(offsets[-1])
    tokens = torch.randint(1, 10, (count,), generator=generator)
    total = int(tokens.sum())
    policy = exact(-0.01 - 4 * random(total) ** 2)
    reference = exact(policy + 3 * (random(total) - 0.5))
    labels = random(count) < 0.5
    labels[0], labels[-1] = True, False
    scores = exact(10 * random(count))
    if objective.responses == 2:  # the better one has the better score
        scores = scores.view(-1, 2).sort(dim=1, descending=True).values.flatten()
    return Sequences(
        policy_S=exact(torch.segment_reduce(policy, "sum", lengths=tokens)),
        reference_S=exact(torch.segment_reduce(reference, "sum", lengths=tokens)),
        tokens_S=tokens,
        offsets_G1=offsets,
        labels_S=labels,
        scores_S=scores,
        mismatched_kl=torch.tensor(0.75, dtype=torch.float64),
        policy_N=policy,
        reference_N=reference,
        body_N=random(total) < 0.7,
        collision_N=exact(-0.02 - 3 * random(total)),
        kl_N=exact(2 * random(total)),
        rival_N=exact(-0.05 - 2 * random(total)),
    )


def extreme(objective: Any) -> Sequences:
    """Log-ratios up to 1e4 nats either way, in all combinations of chosen and rejected; lengths 1 and 400."""
    size = objective.responses or 3
    ratios = torch.tensor(
        [[CORNERS[(g // 8 ** (k % 2) + 3 * (k // 2)) % 8] for k in range(size)] for g in range(64 if size > 1 else 8)],
        dtype=torch.float64,
    )
    groups = len(ratios)
    # beyond 1e4 below 0, so that both log-probabilities are below 0
    policy = -(2.0**14) + (torch.arange(groups * size) ** 2 % 701) * 1.0
    count = groups * size
    tokens = torch.where(torch.arange(count) % 3 == 0, 1, 3)
    batch = usual(replace_size(size), groups)
    total = int(tokens.sum())
    per_token = torch.repeat_interleave(policy / tokens, tokens)
    ratio_token = torch.repeat_interleave(ratios.flatten() / tokens, tokens)
    return replace(
        batch,
        policy_S=exact(policy),
        reference_S=exact(policy - ratios.flatten()),
        tokens_S=tokens,
        scores_S=torch.tensor([1e3, -1e3, 0.5])[torch.arange(count) % size].double(),
        labels_S=torch.arange(count) % 2 == 0,
        mismatched_kl=torch.tensor(-1e4, dtype=torch.float64),
        policy_N=exact(per_token),
        reference_N=exact(per_token - ratio_token),
        body_N=torch.arange(total) % 2 == 0,
        collision_N=exact(per_token / 2),
        kl_N=exact(torch.arange(total) % 5 * 1e3),
        rival_N=exact(per_token + torch.where(torch.arange(total) % 2 == 0, 1e3, -1e3)),
    )


def tied(objective: Any) -> Sequences:
    """The policy is the reference, responses of one length; half of them have one token that is all but certain."""
    batch = usual(objective, groups=6, seed=3)
    count = len(batch.tokens_S)
    tokens = torch.where(batch_groups(batch) % 2 == 0, 1, 4)
    total = int(tokens.sum())
    tiny = torch.tensor([-1e-8, -1e-4, -1e-30, -2.0])[batch_groups(batch) % 4].double()
    policy = exact(tiny)
    per_token = torch.repeat_interleave(exact(policy / tokens), tokens)
    return replace(
        batch,
        policy_S=policy,
        reference_S=policy.clone(),
        tokens_S=tokens,
        policy_N=per_token,
        reference_N=per_token.clone(),
        body_N=torch.ones(total, dtype=torch.bool),
        collision_N=per_token - 1,
        kl_N=torch.zeros(total, dtype=torch.float64),
        rival_N=per_token.clone(),
        scores_S=torch.full((count,), 2.0, dtype=torch.float64),
        mismatched_kl=torch.tensor(0.0, dtype=torch.float64),
    )


def batch_groups(batch: Sequences) -> torch.Tensor:
    """int64 [S]: the group of each response."""
    return torch.repeat_interleave(torch.arange(len(batch.offsets_G1) - 1), batch.offsets_G1.diff())


class replace_size:  # noqa: N801
    """Stands for an objective over groups of a given size."""

    def __init__(self, size: int) -> None:
        self.responses = size


def one_group(batch: Sequences, group: int) -> Sequences:
    """A batch of one of its groups."""
    first, last = int(batch.offsets_G1[group]), int(batch.offsets_G1[group + 1])
    starts = batch.tokens_S.cumsum(0) - batch.tokens_S
    begin, end = int(starts[first]), int(starts[last - 1] + batch.tokens_S[last - 1])
    cut: dict[str, Any] = {"offsets_G1": torch.tensor([0, last - first])}
    for name, value in vars(batch).items():
        if isinstance(value, torch.Tensor) and name.endswith("_S"):
            cut[name] = value[first:last]
        if isinstance(value, torch.Tensor) and name.endswith("_N"):
            cut[name] = value[begin:end]
    return replace(batch, **cut)
