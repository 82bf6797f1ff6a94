"""The scalar head of a reward model: one number per picked row of the stream."""

from __future__ import annotations

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer import MegatronModule, TransformerConfig
from torch import Tensor

from megadpo.data.batch import PackedBatch
from megadpo.model.head import NOTHING, Asked, HeadOutput


class RewardHead(MegatronModule):
    """r = w h, float32, w [1, D] whole on every tensor-parallel rank (checkpoint key as Megatron-Core's output layer).

    Every tensor-parallel rank computes all rewards from the same hidden states, so its gradients are whole, too:
    nothing is summed over the ranks.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        device = torch.device("cpu") if config.use_cpu_initialization else torch.device("cuda")
        self.weight = torch.nn.Parameter(torch.zeros(1, config.hidden_size, dtype=config.params_dtype, device=device))

    def forward(
        self, hidden_TD: Tensor, batch: PackedBatch, weight: Tensor | None, asked: Asked = NOTHING
    ) -> HeadOutput:
        """hidden [T, 1, D] (T / tensor ranks under sequence parallelism) -> float32 rewards [N] at the batch's rows_N.

        weight and what is asked for are the log-probability head's; a reward has neither.
        """
        assert asked == NOTHING, "a reward has no distribution over tokens"
        if self.config.sequence_parallel:
            # Backward only takes this rank's rows: every rank has the whole gradient.
            hidden_TD = tensor_parallel.gather_from_sequence_parallel_region(
                hidden_TD, tensor_parallel_output_grad=False
            )
        picked_ND = hidden_TD.flatten(0, 1)[batch.rows_N]
        return HeadOutput((picked_ND.float() @ self.weight.float().t())[:, 0])
