"""Megatron-Core's linear layers with operands rounded to FP8: the same on one rank and split over two."""

from typing import Any

import pytest
import torch
from distributed import run_ranks
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import TransformerConfig

from megadpo.config import ParallelConfig
from megadpo.model.fp8_emulation import Rounding, with_rounding
from megadpo.parallel.context import ParallelContext, grid

RECIPES = ("tensorwise", "delayed", "blockwise", "mxfp8")
ROWS, INPUTS, OUTPUTS = 256, 512, 256  # each rank's part is whole blocks
NUMBERS = torch.Generator().manual_seed(0)
X = torch.randn(ROWS, 1, INPUTS, generator=NUMBERS) * torch.logspace(-2, 1, INPUTS)
W = torch.randn(OUTPUTS, INPUTS, generator=NUMBERS) * torch.logspace(-3, 0, OUTPUTS)[:, None]
DY = torch.randn(ROWS, 1, OUTPUTS, generator=NUMBERS) * torch.logspace(-6, -4, OUTPUTS)


def part(x: torch.Tensor, axis: int, context: ParallelContext) -> torch.Tensor:
    return x.chunk(context.tensor_size, axis)[context.tensor_rank].contiguous()


def layers(device: torch.device, parallel: ParallelConfig) -> dict[str, Any]:
    """(y, dx, dw) of both kinds of layer with every recipe: this rank's parts."""
    found: dict[str, Any] = {}
    with grid(parallel, device, seed=1) as context:
        sequence = parallel.sequence_parallel
        config = TransformerConfig(
            num_layers=1,
            hidden_size=INPUTS,
            num_attention_heads=4,
            use_cpu_initialization=True,
            perform_initialization=False,
            tensor_model_parallel_size=context.tensor_size,
            sequence_parallel=sequence,
            cuda_graph_scope=[],
        )
        options = {"config": config, "init_method": None, "bias": False, "skip_bias_add": False}
        for recipe in RECIPES:
            rounding = Rounding(recipe, "e5m2")  # type: ignore[arg-type]
            column = with_rounding(ColumnParallelLinear, rounding)(INPUTS, OUTPUTS, gather_output=False, **options)
            row = with_rounding(RowParallelLinear, rounding)(INPUTS, OUTPUTS, input_is_parallel=True, **options)
            column.weight.data.copy_(part(W, 0, context))
            row.weight.data.copy_(part(W, 1, context))
            whole_x, whole_dy = (part(X, 0, context), part(DY, 0, context)) if sequence else (X, DY)
            for name, layer, x, dy in (
                ("column", column, whole_x, part(DY, 2, context)),
                ("row", row, part(X, 2, context), whole_dy),
            ):
                x = x.clone().requires_grad_()
                y, _ = layer(x)
                y.backward(dy)
                found[f"{recipe} {name}"] = [y.detach(), x.grad, layer.weight.grad]
    return found


def joined(ranks: list[dict[str, Any]], key: str, sequence: bool) -> list[torch.Tensor]:
    """The parts of all ranks put together; what every rank has whole must be the same on all."""
    split = [0, 2] if sequence else [None, 2]
    axes = [2, split[0], 0] if key.endswith("column") else [split[0], 2, 1]
    found = []
    for index, axis in enumerate(axes):
        parts = [rank[key][index] for rank in ranks]
        if axis is None:
            assert all(torch.equal(parts[0], other) for other in parts)
        found.append(parts[0] if axis is None else torch.cat(parts, axis))
    return found


@pytest.mark.parametrize("sequence", [False, True])
def test_split_over_ranks(sequence: bool) -> None:
    """Every operand is rounded as on one rank, so only the order of sums differs."""
    [alone] = run_ranks(1, layers, ParallelConfig())
    ranks = run_ranks(2, layers, ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=sequence))
    plain = {"y": X @ W.t(), "dx": DY @ W, "dw": DY.flatten(0, 1).t() @ X.flatten(0, 1)}
    for key, want in alone.items():
        for got, wanted, unrounded in zip(joined(ranks, key, sequence), want, plain.values(), strict=True):
            size = wanted.norm()
            assert (got - wanted).norm() < 1e-6 * size, key
            assert (wanted - unrounded).norm() > 1e-2 * size, key
