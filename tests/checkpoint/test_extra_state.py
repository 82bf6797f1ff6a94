"""What Transformer Engine calls extra state, a pickle that loading would run, is in no checkpoint of ours."""

from pathlib import Path

import numpy as np
import torch
from distributed import run_ranks
from tiny import random_groups, write_llama
from train.engine import Case, build

from megadpo import checkpoint
from megadpo.convert.torch_dist import read_metadata
from megadpo.parallel.context import grid
from megadpo.train.step import train_step


def saved_keys(device: torch.device, case: Case, run_dir: Path) -> list[str]:
    """Of a checkpoint after one step, by a model whose layers have such state."""
    with grid(case.parallel, device, 1) as context:
        state, stream = build(case, context)
        for layer in state.modules[0].decoder.layers:
            linear = layer.mlp.linear_fc2
            type(linear).get_extra_state = lambda self: torch.zeros(3, dtype=torch.uint8)
            assert "_extra_state" in linear.state_dict()
        column = np.zeros(int(case.store.offsets[-1]))
        train_step(state, stream.batches(np.arange(case.batch), 0, column), case.objective, None, context)
        folder = checkpoint.save(state, run_dir, 1, 1, context)
        with (folder / ".metadata").open("rb") as file:
            return list(read_metadata(file).state_dict_metadata)


def test_it_is_not_saved(tmp_path: Path) -> None:
    case = Case(write_llama(tmp_path / "llama"), random_groups(8), distributed=True)
    [keys] = run_ranks(1, saved_keys, case, tmp_path / "run")
    assert any("linear_fc2.weight" in key for key in keys)
    assert not [key for key in keys if "_extra_state" in key]
