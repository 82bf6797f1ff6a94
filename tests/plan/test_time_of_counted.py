"""What the time model says of a layer's collectives and products is what is counted on a fake rank."""

from pathlib import Path

import pytest
from tiny import write_llama

from megadpo.config.decode import load_config
from megadpo.plan.layers import Grid, linear_products
from megadpo.plan.profile import rank_numbers
from megadpo.plan.time import PHASES
from megadpo.train.inputs import read_shapes

LAYERS, MICRO_BATCHES, TOKENS = 2, 3, 256


@pytest.mark.parametrize(("sequence", "recompute"), [(True, "none"), (True, "full"), (False, "none"), (False, "full")])
def test_of_a_layer(tmp_path: Path, sequence: bool, recompute: str) -> None:
    model = write_llama(tmp_path / "model", layers=3 * LAYERS, hidden=64, ffn=96)
    (tmp_path / "run.yaml").write_text(
        f"run_dir: {tmp_path}/run\nmodel: {{path: {model}, recompute: {recompute}}}\ndata: {{train: none.jsonl}}\n"
        f"parallel: {{tensor_model_parallel_size: 2, pipeline_model_parallel_size: 3, sequence_parallel: {sequence}}}\n"
    )
    config = load_config(tmp_path / "run.yaml", [])
    shape = read_shapes(config, 6).policy
    middle = rank_numbers(shape, config, 6, 2, TOKENS, 100, MICRO_BATCHES)
    whole = TOKENS * shape.hidden_size * 2
    counted = {c.kind: c for c in middle.collectives if c.group == "tensor" and c.bytes >= whole * MICRO_BATCHES}
    assert counted.keys() == ({"all_gather", "reduce_scatter"} if sequence else {"all_reduce"})
    for kind, one in counted.items():
        forward, waited, beside = PHASES[kind]
        each = forward + waited + beside + (forward if recompute == "full" else 0)
        per_layer = LAYERS * MICRO_BATCHES
        assert one.calls // per_layer == each
        assert one.bytes // whole // per_layer == each
    products = linear_products(shape, Grid(2, 1, sequence), TOKENS, False)
    forward_flops = sum(2 * p.batches * p.rows * p.columns * p.inner for p in products)
    passes = 4 if recompute == "full" else 3
    attention = middle.flops / (LAYERS * MICRO_BATCHES) - passes * forward_flops
    assert 0 <= attention < 0.6 * passes * forward_flops  # of streams this short and narrow; nothing is missing
