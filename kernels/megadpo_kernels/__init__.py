"""Kernels of megadpo: torch (and, later, Triton) only, usable without the trainer."""

from megadpo_kernels.logprob import VocabShard, linear_logprob

__all__ = ["VocabShard", "linear_logprob"]
