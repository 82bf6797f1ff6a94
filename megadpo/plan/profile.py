"""Numbers of a rank without walking its whole step: one layer and the ends are measured, the rest is multiplication.

For searching over grids. `dry_run.walk` is the long way; tests compare the two.
"""

from __future__ import annotations

from megadpo.config import Config
from megadpo.convert.shape import ModelShape
from megadpo.plan.numbers import RankNumbers


def rank_numbers(
    shape: ModelShape,
    config: Config,
    world_size: int,
    rank: int,
    tokens: int,
    scored: int,
    micro_batches: int,
    gpu: bool = True,
    reference: ModelShape | None = None,
) -> RankNumbers:
    """What rank `rank` of `world_size` holds and sends in one step of config.parallel's grid.

    config: grid, dtype, recompute, optimizer sharding and the reference's mode are read from it; nothing on the disk
    is. The grid fits the model and the world (config.check.check_grid, convert.fit.misfits): not looked at here.
    tokens: rows of one micro-batch's stream. scored: scored tokens of it; the other rows are taken for prompts.
    micro_batches: of one data-parallel rank per step. reference: shape of a reference.path; the policy's where None.
    gpu: the code that runs on GPUs (flash attention, fused norms), else what runs on a CPU.
    Layers are measured once per process for each (shape, tensor size, sequence parallel, recompute, tokens ...), which
    takes tenths of a second; afterwards a call takes a millisecond, so that hundreds of grids can be asked for.
    Memory is within a few percent of `dry_run.walk`; weights, gradients, optimizer and parameters are exact.
    """
    raise NotImplementedError
