"""Kernels of megadpo: torch, and Triton where it is wanted; usable without the trainer."""

from megadpo_kernels.backends import BACKENDS, Backend, triton_problem
from megadpo_kernels.chunked import scored_rows
from megadpo_kernels.kl import linear_kl
from megadpo_kernels.logprob import linear_logprob, linear_logprob_collision, linear_logprob_entropy
from megadpo_kernels.rivals import draw_rivals, mixed
from megadpo_kernels.shard import LogitOptions, VocabShard
from megadpo_kernels.sums import response_sums

__all__ = [
    "BACKENDS",
    "Backend",
    "LogitOptions",
    "VocabShard",
    "draw_rivals",
    "linear_kl",
    "linear_logprob",
    "linear_logprob_collision",
    "linear_logprob_entropy",
    "mixed",
    "response_sums",
    "scored_rows",
    "triton_problem",
]
