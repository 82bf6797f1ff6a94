"""The model: Megatron-Core's GPTModel over a packed stream, with log-probabilities at the end."""

from __future__ import annotations

from typing import Any

from megadpo_kernels import Backend as LogprobBackend
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megadpo.data.batch import PackedBatch
from megadpo.model.attention import Backend, stream_params
from megadpo.model.head import LogprobHead


class Policy(GPTModel):
    """GPTModel with its own forward pass; policy and reference are both this class.

    Everything else is Megatron-Core's: parameters, initialisation, checkpoint keys, pipeline input.
    """

    def __init__(
        self, *args: Any, valid_vocab: int, attention: Backend, logprob_backend: LogprobBackend, **kwargs: Any
    ) -> None:
        self.valid_vocab = valid_vocab
        self.logprob_backend = logprob_backend
        self.attention = attention
        super().__init__(*args, **kwargs)

    def setup_embeddings_and_output_layer(self) -> None:
        """Called by GPTModel's constructor once embedding and output layer stand; here the head takes its place, so
        that Megatron-Core marks and ties the head's weight and not that of the layer that it replaces."""
        if self.post_process:
            self.output_layer = LogprobHead(
                self.config.hidden_size,
                self.vocab_size,
                config=self.config,
                init_method=self.config.init_method,
                bias=False,
                skip_weight_param_allocation=self.pre_process and self.share_embeddings_and_output_weights,
                tp_group=self.pg_collection.tp,
                valid_vocab=self.valid_vocab,
                logprob_backend=self.logprob_backend,
            )
        super().setup_embeddings_and_output_layer()

    def forward(self, batch: PackedBatch) -> Tensor:
        """Log-probabilities float32 [N] on the last stage, hidden states [T, 1, D] for the next stage elsewhere."""
        hidden_TD = self.hidden_states(batch)
        if not self.post_process:
            return hidden_TD
        return self.output_layer(hidden_TD, batch.rows_N, batch.targets_N, self.tied_weight())

    def hidden_states(self, batch: PackedBatch) -> Tensor:
        """Output of this stage's layers, [T, 1, D] (T / tensor ranks under sequence parallelism)."""
        # Later stages get their input from the pipeline schedule, through set_input_tensor.
        hidden_TD = self.embedding(batch.tokens_T[None], None) if self.pre_process else None
        rotary = self.rotary_pos_emb(len(batch.tokens_T), packed_seq=True)[batch.positions_T]
        return self.decoder(
            hidden_states=hidden_TD,
            attention_mask=None,
            rotary_pos_emb=rotary,
            packed_seq_params=stream_params(batch, self.attention),
        )

    def tied_weight(self) -> Tensor | None:
        """The embedding's weight where it serves as the head's on this very stage; None where the head has its own."""
        if self.pre_process and self.share_embeddings_and_output_weights:
            return self.embedding.word_embeddings.weight
        return None
