"""The language-model head: hidden states of the stream in, statistics of the scored tokens out.

Log-probabilities always; what an objective needs beyond them where it is asked for. Nothing here holds the vocabulary
for more than some rows at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megadpo_kernels import (
    Backend,
    LogitOptions,
    VocabShard,
    draw_rivals,
    linear_kl,
    linear_logprob,
    linear_logprob_collision,
    mixed,
    scored_rows,
)
from megatron.core.tensor_parallel import ColumnParallelLinear
from torch import Tensor

from megadpo.data.batch import PackedBatch


@dataclass(frozen=True)
class Rivals:
    """How tokens are drawn from the policy's own likeliest ones. The draw is a function of these three and of the
    token's place in the data: group of the store, response of the group, token of the response."""

    top_k: int
    seed: int
    consumed: int
    """Groups of the run before this batch."""


@dataclass(frozen=True)
class Asked:
    """What the head is asked for beside log-probabilities."""

    collision: bool = False
    rivals: Rivals | None = None
    kl_weight_VE: Tensor | None = None
    """The reference's head, this rank's part: asks for the KL. Its hidden rows come with the batch."""
    hidden: bool = False
    """Give the rows that predict, too, for the KL to this model later."""


NOTHING = Asked()


@dataclass(frozen=True)
class HeadOutput:
    """Of every scored token, float32 [N], the same on every tensor-parallel rank; what was not asked for is None."""

    logprob_N: Tensor
    """Its log-probability; of a reward model, the response's reward. Carries the gradient."""
    collision_N: Tensor | None = None
    """Log of the sum over the vocabulary of squared probabilities; no gradient."""
    kl_N: Tensor | None = None
    """KL(reference || policy) of the whole distributions; carries the gradient."""
    rival_N: Tensor | None = None
    """Log-probability of a token drawn from the likeliest others; carries the gradient."""
    hidden_ND: Tensor | None = None
    """[N, D] in the model's dtype, whole on every tensor-parallel rank: the rows that predict."""


class LogprobHead(ColumnParallelLinear):
    """Megatron-Core's output layer (same weight, same checkpoint key) whose forward is `linear_logprob`.

    The kernels run inside `forward` because Megatron's overlapped parameter gather is awaited by a forward hook of the
    module that owns the weight. They also do what Megatron's linear layers do around theirs: gather hidden under
    sequence parallelism, sum the input gradient over the tensor-parallel ranks, add the weight's to `main_grad`.
    """

    def __init__(
        self, *args: Any, valid_vocab: int, logprob_backend: Backend, options: LogitOptions, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.valid_vocab = valid_vocab
        self.options = options
        self.logprob_backend = logprob_backend

    def forward(
        self, hidden_TD: Tensor, batch: PackedBatch, weight: Tensor | None, asked: Asked = NOTHING
    ) -> HeadOutput:
        """hidden [T, 1, D] (T / tensor ranks under sequence parallelism) -> statistics of the N scored tokens.

        `weight` is the embedding's where the two are tied and on one stage, else None. Only scored rows meet the
        vocabulary.
        """
        weight_VD = self.weight if weight is None else weight
        start = self.tp_group.rank() * weight_VD.shape[0]
        shard = VocabShard(start, self.valid_vocab, self.tp_group, self.sequence_parallel)
        hidden_TD = hidden_TD.flatten(0, 1)
        head = (hidden_TD, weight_VD)
        how: dict[str, Any] = {"rows_N": batch.rows_N, "options": self.options}
        backend = self.logprob_backend
        collision_N = kl_N = rival_N = None
        if asked.collision:
            logprob_N, squares_N = linear_logprob_collision(*head, batch.targets_N, shard, backend=backend, **how)
            collision_N = squares_N.log()
        else:
            logprob_N = linear_logprob(*head, batch.targets_N, shard, backend=backend, **how)
        if asked.kl_weight_VE is not None:
            assert batch.reference_hidden_NE is not None, "the reference's pass comes first"
            kl_N = linear_kl(*head, batch.reference_hidden_NE, asked.kl_weight_VE, shard, backend=backend, **how)
        if asked.rivals is not None:
            keys_N = draw_keys(batch, asked.rivals)
            rivals_N = draw_rivals(*head, batch.targets_N, keys_N, asked.rivals.top_k, shard, **how)
            rival_N = linear_logprob(*head, rivals_N, shard, backend=backend, **how)
        hidden_ND = scored_rows(hidden_TD, batch.rows_N, shard) if asked.hidden else None
        return HeadOutput(logprob_N, collision_N, kl_N, rival_N, hidden_ND)


def draw_keys(batch: PackedBatch, rivals: Rivals) -> Tensor:
    """int64 [N]: a key for each scored token, the same in whatever micro-batch and on whatever rank it is."""
    device, size = batch.tokens_S.device, len(batch.targets_N)
    run = mixed(torch.tensor(rivals.seed, device=device), torch.tensor(rivals.consumed, device=device))
    groups_G = torch.tensor(batch.groups, dtype=torch.int64, device=device)
    sizes_G, responses = batch.offsets_G1.diff(), len(batch.tokens_S)
    group_S = torch.repeat_interleave(groups_G, sizes_G, output_size=responses)
    first_S = torch.repeat_interleave(batch.offsets_G1[:-1], sizes_G, output_size=responses)
    key_S = mixed(mixed(run, group_S), torch.arange(responses, device=device) - first_S)
    start_S = batch.tokens_S.cumsum(0) - batch.tokens_S
    key_N, start_N = torch.repeat_interleave(torch.stack([key_S, start_S]), batch.tokens_S, dim=1, output_size=size)
    return mixed(key_N, torch.arange(size, device=device) - start_N)
