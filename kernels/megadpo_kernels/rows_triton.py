"""The row operations of the chunked head through Triton kernels; what they mean stands in `rows`."""

from __future__ import annotations

import torch
from torch import Tensor

from megadpo_kernels.configs import config_for
from megadpo_kernels.rows import Extra
from megadpo_kernels.shard import LogitOptions
from megadpo_kernels.triton_kernels import combine_kernel, row_stats_kernel, segment_sums_kernel, slope_kernel

KINDS = {None: 0, "entropy": 1, "collision": 2}
"""How the kernels call `rows.Extra`."""


def row_stats(
    stats_KM: Tensor, logits_MP: Tensor, columns: int, targets_M: Tensor, options: LogitOptions, extra: Extra = None
) -> None:
    """`rows.row_stats`."""
    config = config_for("row_stats", logits_MP.device, columns, stats_KM.dtype)
    row_stats_kernel[(len(logits_MP),)](
        logits_MP,
        logits_MP.stride(0),
        targets_M,
        stats_KM,
        stats_KM.stride(0),
        columns,
        *_numbers(options),
        BLOCK=config.block,
        CAPPED=options.soft_cap is not None,
        EXTRA=KINDS[extra],
        num_warps=config.warps,
    )


def combine(stats_RKN: Tensor, extra: Extra = None) -> tuple[Tensor, Tensor, Tensor | None]:
    """`rows.combine`."""
    ranks, _, rows = stats_RKN.shape
    logprob_N = torch.empty(rows, dtype=torch.float32, device=stats_RKN.device)
    normaliser_3N = logprob_N.new_empty(3, rows)
    extra_N = logprob_N.new_empty(rows) if extra else None
    if rows:
        config = config_for("combine", stats_RKN.device, rows, logprob_N.dtype)
        combine_kernel[(-(-rows // config.block),)](
            stats_RKN.contiguous(),
            logprob_N,
            normaliser_3N,
            logprob_N if extra_N is None else extra_N,
            ranks,
            rows,
            BLOCK=config.block,
            EXTRA=KINDS[extra],
            num_warps=config.warps,
        )
    return logprob_N, normaliser_3N, extra_N


def slope(
    logits_MP: Tensor,
    columns: int,
    targets_M: Tensor,
    normaliser_3M: Tensor,
    upstream_KM: Tensor,
    entropy_M: Tensor | None,
    options: LogitOptions,
    dtype: torch.dtype,
) -> Tensor:
    """`rows.slope`, in the memory of the logits for every dtype."""
    config = config_for("slope", logits_MP.device, columns, dtype)
    slope_MP = logits_MP.view(dtype)
    slope_kernel[(len(logits_MP),)](
        logits_MP,
        logits_MP.stride(0),
        slope_MP,
        slope_MP.stride(0),
        targets_M,
        normaliser_3M,
        normaliser_3M.stride(0),
        upstream_KM,
        upstream_KM.stride(0),
        normaliser_3M if entropy_M is None else entropy_M,
        columns,
        *_numbers(options),
        BLOCK=config.block,
        CAPPED=options.soft_cap is not None,
        ENTROPY=entropy_M is not None,
        num_warps=config.warps,
    )
    return slope_MP[:, :columns]


def segment_sums(values_N: Tensor, lengths_S: Tensor) -> Tensor:
    """float64 [S] from float32 [N] and int64 [S]; see `sums.response_sums`."""
    sums_S = torch.empty(len(lengths_S), dtype=torch.float64, device=values_N.device)
    if len(lengths_S):
        config = config_for("segment_sums", values_N.device, len(values_N), sums_S.dtype)
        segment_sums_kernel[(len(lengths_S),)](
            values_N.contiguous(), lengths_S.cumsum(0), sums_S, BLOCK=config.block, num_warps=config.warps
        )
    return sums_S


def _numbers(options: LogitOptions) -> tuple[float, float, float]:
    """multiplier, soft_cap, coolness (1 / temperature) as the kernels take them."""
    return options.multiplier, options.soft_cap or 1.0, 1 / options.temperature
