"""The language-model head: hidden states of the stream in, log-probabilities of the scored tokens out."""

from __future__ import annotations

from typing import Any

from megadpo_kernels import VocabShard, linear_logprob
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor


class LogprobHead(ColumnParallelLinear):
    """Megatron-Core's output layer (same weight, same checkpoint key) whose forward is `linear_logprob`.

    The kernel runs inside `forward` because Megatron's overlapped parameter gather is awaited by a forward hook of the
    module that owns the weight.
    """

    def __init__(self, *args: Any, valid_vocab: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.valid_vocab = valid_vocab

    def forward(self, hidden_TD: Tensor, rows_N: Tensor, targets_N: Tensor, weight: Tensor | None) -> Tensor:
        """hidden [T, 1, D] (T / tensor ranks under sequence parallelism) -> float32 log-probabilities [N].

        rows_N: int64, rows of the stream that predict; targets_N: int64, what they must predict. `weight` is the
        embedding's where the two are tied and on one stage, else None. Only scored rows meet the vocabulary.
        """
        weight_VD = self.weight if weight is None else weight
        if self.sequence_parallel:
            hidden_TD = gather_from_sequence_parallel_region(
                hidden_TD, tensor_parallel_output_grad=True, group=self.tp_group
            )
        else:
            hidden_TD = copy_to_tensor_model_parallel_region(hidden_TD, group=self.tp_group)
        hidden_ND = hidden_TD.flatten(0, 1).index_select(0, rows_N)
        start = self.tp_group.rank() * weight_VD.shape[0]
        return linear_logprob(hidden_ND, weight_VD, targets_N, VocabShard(start, self.valid_vocab, self.tp_group))
