"""The model: Megatron-Core's GPTModel over a packed stream, with log-probabilities at the end."""

from __future__ import annotations

from typing import Any

import torch
from megadpo_kernels import Backend as LogprobBackend
from megadpo_kernels import LogitOptions
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megadpo.convert.shape import ModelShape
from megadpo.data.batch import PackedBatch
from megadpo.model.attention import Backend, stream_params
from megadpo.model.head import NOTHING, Asked, HeadOutput, LogprobHead
from megadpo.model.reward import RewardHead
from megadpo.model.rope import angles, cosines_and_sines, inverse_frequencies, local_frequencies


class Policy(GPTModel):
    """GPTModel with its own forward pass; policy and reference are both this class.

    Everything else is Megatron-Core's: parameters, initialisation, checkpoint keys, pipeline input.
    """

    def __init__(
        self, *args: Any, shape: ModelShape, attention: Backend, logprob_backend: LogprobBackend, **kwargs: Any
    ) -> None:
        self.shape = shape
        self.logprob_backend = logprob_backend
        self.attention = attention
        super().__init__(*args, **kwargs)
        scale = shape.embedding_scale
        # such a family rounds the number to the model's dtype first
        self.embedding_scale = None if scale is None else float(torch.tensor(scale, dtype=self.config.params_dtype))
        # Latent attention is the one kind for which Megatron-Core builds no table here.
        self.latent_frequencies = inverse_frequencies(shape) if shape.latent else None
        local = local_frequencies(shape)
        self.local_frequencies = None if local is None else local.to(self.rotary_pos_emb.inv_freq.device)

    def setup_embeddings_and_output_layer(self) -> None:
        """Called by GPTModel's constructor once embedding and output layer stand; here the head takes its place, so
        that Megatron-Core marks and ties the head's weight and not that of the layer that it replaces."""
        if self.post_process and self.shape.head != "vocabulary":
            self.output_layer = RewardHead(self.config)
        elif self.post_process:
            self.output_layer = LogprobHead(
                self.config.hidden_size,
                self.vocab_size,
                config=self.config,
                init_method=self.config.init_method,
                bias=False,
                skip_weight_param_allocation=self.pre_process and self.share_embeddings_and_output_weights,
                tp_group=self.pg_collection.tp,
                valid_vocab=self.shape.vocab_size,
                logprob_backend=self.logprob_backend,
                options=LogitOptions(soft_cap=self.shape.logit_soft_cap),
            )
        super().setup_embeddings_and_output_layer()

    def forward(self, batch: PackedBatch, asked: Asked = NOTHING) -> HeadOutput | Tensor:
        """Log-probabilities (of a reward model, rewards) of the scored tokens, and what else is asked for, on the last
        stage; hidden states [T, 1, D] for the next stage elsewhere."""
        hidden_TD = self.hidden_states(batch)
        if not self.post_process:
            return hidden_TD
        return self.output_layer(hidden_TD, batch, self.tied_weight(), asked)

    def hidden_states(self, batch: PackedBatch, positions: int | None = None) -> Tensor:
        """Output of this stage's layers, [T, 1, D] (T / tensor ranks under sequence parallelism).

        positions: one more than the largest in batch.positions_T, where that is over T.
        """
        # Later stages get their input from the pipeline schedule, through set_input_tensor.
        hidden_TD = self.embedded(batch.tokens_T) if self.pre_process else None
        window = self.shape.window.size if self.shape.window else None
        params = stream_params(batch, self.attention, window)
        if self.latent_frequencies is not None:
            frequencies = self.latent_frequencies.to(batch.positions_T.device)
            params.rotary = cosines_and_sines(batch.positions_T, frequencies, self.shape)
        return self.decoder(
            hidden_states=hidden_TD,
            attention_mask=None,
            rotary_pos_emb=None
            if params.rotary
            else self.rotary(batch.positions_T, positions or len(batch.positions_T)),
            packed_seq_params=params,
        )

    def embedded(self, tokens_T: Tensor) -> Tensor:
        """[T, 1, D]; some families multiply embeddings by a number."""
        hidden_TD = self.embedding(tokens_T[None], None)
        return hidden_TD if self.embedding_scale is None else hidden_TD * self.embedding_scale

    def rotary(self, positions_T: Tensor, positions: int) -> Tensor:
        """Angles [T, 1, 1, W] of every row by its position; with two rotary bases those of both, [2, T, 1, 1, W].

        positions: one more than the largest."""
        table = self.rotary_pos_emb(positions, packed_seq=True)[positions_T]
        if self.local_frequencies is None:
            return table
        return torch.stack([table, angles(positions_T, self.local_frequencies)])

    def tied_weight(self) -> Tensor | None:
        """The embedding's weight where it serves as the head's on this very stage; None where the head has its own."""
        if self.pre_process and self.share_embeddings_and_output_weights:
            return self.embedding.word_embeddings.weight
        return None

    def head_weight(self) -> Tensor | None:
        """The head's weight, this rank's part [V, D]; None on a stage without a head."""
        if not self.post_process:
            return None
        tied = self.tied_weight()
        return self.output_layer.weight if tied is None else tied
