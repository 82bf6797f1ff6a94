"""The language-model head: hidden states of the stream in, log-probabilities of the scored tokens out."""

from __future__ import annotations

from typing import Any

from megadpo_kernels import Backend, LogitOptions, VocabShard, linear_logprob
from megatron.core.tensor_parallel import ColumnParallelLinear
from torch import Tensor


class LogprobHead(ColumnParallelLinear):
    """Megatron-Core's output layer (same weight, same checkpoint key) whose forward is `linear_logprob`.

    The kernel runs inside `forward` because Megatron's overlapped parameter gather is awaited by a forward hook of the
    module that owns the weight. It also does what Megatron's linear layers do around theirs: gathers hidden under
    sequence parallelism, sums the input gradient over the tensor-parallel ranks, adds the weight's to `main_grad`.
    """

    def __init__(
        self, *args: Any, valid_vocab: int, logprob_backend: Backend, options: LogitOptions, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.valid_vocab = valid_vocab
        self.options = options
        self.logprob_backend = logprob_backend

    def forward(self, hidden_TD: Tensor, rows_N: Tensor, targets_N: Tensor, weight: Tensor | None) -> Tensor:
        """hidden [T, 1, D] (T / tensor ranks under sequence parallelism) -> float32 log-probabilities [N].

        rows_N: int64, rows of the stream that predict; targets_N: int64, what they must predict. `weight` is the
        embedding's where the two are tied and on one stage, else None. Only scored rows meet the vocabulary.
        """
        weight_VD = self.weight if weight is None else weight
        start = self.tp_group.rank() * weight_VD.shape[0]
        shard = VocabShard(start, self.valid_vocab, self.tp_group, self.sequence_parallel)
        return linear_logprob(
            hidden_TD.flatten(0, 1),
            weight_VD,
            targets_N,
            shard,
            rows_N=rows_N,
            options=self.options,
            backend=self.logprob_backend,
        )
