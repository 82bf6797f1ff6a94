"""A token for every scored row, drawn from the policy's own likeliest ones, another than the scored one.

The draw is a function of a key per row and of nothing else: no generator's state, no rank, no place in the batch. Its
noise is a hash of (key, token) by the finaliser of splitmix64 (Steele et al. 2014); the largest of log p + Gumbel noise
is a draw from the softmax (Gumbel 1954).
"""

from __future__ import annotations

import torch
from torch import Tensor

from megadpo_kernels.chunked import chunks, logits, scored_rows
from megadpo_kernels.collectives import gather_ranks
from megadpo_kernels.logprob import check, limits
from megadpo_kernels.rows import transformed
from megadpo_kernels.shard import PLAIN, LogitOptions, VocabShard

GOLDEN, FIRST, SECOND = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15
"""splitmix64's increment and its two factors, as int64."""


@torch.no_grad()
def draw_rivals(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    keys_N: Tensor,
    top_k: int,
    shard: VocabShard,
    *,
    rows_N: Tensor | None = None,
    options: LogitOptions = PLAIN,
    chunk: int | None = None,
) -> Tensor:
    """int64 [N], global ids: of the `top_k` likeliest tokens that are not the target one, drawn by their softmax.

    Inputs as of `linear_logprob`; keys_N: int64. The same on every rank, and for the same key on any grid (where
    rounding does not decide which logit is larger). No gradient: its log-probability has one (`linear_logprob` with it
    as target). A vocabulary with fewer tokens gives those that there are. One way for all back ends.

    Logits of `chunk` rows exist at once. Collectives: all-gather of float32 [k, N] and of int64 [k, N], plus one of
    hidden under sequence parallelism. Raises ValueError for shapes and dtypes that cannot work.
    """
    check(hidden_TD, weight_VD, targets_N, shard, rows_N)
    if top_k < 1 or keys_N.shape != targets_N.shape or keys_N.dtype != torch.int64:
        raise ValueError(
            f"top_k = {top_k}, keys are {keys_N.dtype} {list(keys_N.shape)}: need at least 1, and int64 "
            f"{list(targets_N.shape)}"
        )
    hidden_ND = scored_rows(hidden_TD, rows_N, shard)
    columns = shard.columns(len(weight_VD))
    here = min(top_k, columns)
    z_KN = torch.full((top_k, len(hidden_ND)), -torch.inf, device=hidden_ND.device)
    ids_KN = torch.zeros(top_k, len(hidden_ND), dtype=torch.int64, device=hidden_ND.device)
    chunk = limits(columns, hidden_ND.device)[0] if chunk is None else chunk
    for rows in chunks(len(hidden_ND), chunk) if columns else ():
        z_MV = transformed(logits(hidden_ND[rows], weight_VD[:columns])[:, :columns], options)
        own_M1 = (targets_N[rows] - shard.start)[:, None]
        inside_M1 = (own_M1 >= 0) & (own_M1 < columns)
        own_M1 = torch.where(inside_M1, own_M1, 0)
        z_MV.scatter_(1, own_M1, torch.where(inside_M1, -torch.inf, z_MV.gather(1, own_M1)))
        best = z_MV.topk(here, dim=-1)
        z_KN[:here, rows] = best.values.t()
        ids_KN[:here, rows] = best.indices.t() + shard.start
    # every rank's candidates, one after the other, then the best of them all
    z_CN, ids_CN = gather_ranks(z_KN, shard).flatten(0, 1), gather_ranks(ids_KN, shard).flatten(0, 1)
    best = z_CN.topk(top_k, dim=0)
    ids_KN = ids_CN.gather(0, best.indices)
    picked_1N = (best.values.double() + gumbel(keys_N, ids_KN)).argmax(0, keepdim=True)
    return ids_KN.gather(0, picked_1N)[0]


def gumbel(keys_N: Tensor, ids_KN: Tensor) -> Tensor:
    """float64 [K, N]: standard Gumbel noise of (key, id)."""
    uniform = (_shifted(mixed(keys_N, ids_KN), 12).double() + 0.5) * 2.0**-52  # in (0, 1), without its ends
    return -(-uniform.log()).log()


def mixed(key: Tensor, value: Tensor) -> Tensor:
    """int64: a hash of the two; its bits are independent of each other and of those of any other pair's."""
    x = mixed_bits(key + GOLDEN) ^ value
    return mixed_bits(x + GOLDEN)


def mixed_bits(x: Tensor) -> Tensor:
    """The finaliser of splitmix64; a bijection of int64."""
    x = (x ^ _shifted(x, 30)) * FIRST
    x = (x ^ _shifted(x, 27)) * SECOND
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """x >> bits without the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
