"""A stand-in for plan.profile.rank_numbers: a dense model by closed forms, good enough to test what is built on it."""

from megadpo.config import Config
from megadpo.convert.shape import ModelShape
from megadpo.model.build import stage_layers
from megadpo.plan.numbers import Collective, Memory, RankNumbers


def count(
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
    grid = config.parallel
    tensor, stages = grid.tensor_model_parallel_size, grid.pipeline_model_parallel_size
    data, chunks = world_size // tensor // stages, grid.virtual_pipeline_model_parallel_size or 1
    stage = rank // (tensor * data)
    layers = sum(stage_layers(shape.num_layers, stages * chunks)[stage::stages])
    ends = (stage == 0) + (stage == stages - 1)
    parameters = int((layers * shape.linear_multiplications + ends * shape.vocab_size * shape.hidden_size) / tensor)
    row = shape.hidden_size * 2 / (tensor if grid.sequence_parallel else 1)
    kept = {"none": 17 / (1 if grid.sequence_parallel else 2), "selective": 15, "full": 1}[config.model.recompute]
    alive = min(stages - stage, micro_batches) + (chunks > 1) * stages / 2
    again = 1.5 if config.model.recompute == "full" else 1.0
    size = tokens * shape.hidden_size * 2
    found = []
    if tensor > 1:
        kinds = {"all_gather": 6, "reduce_scatter": 4} if grid.sequence_parallel else {"all_reduce": 4}
        calls = {kind: int(number * layers * micro_batches * again) for kind, number in kinds.items()}
        found += [Collective(kind, "tensor", tensor, number, number * size) for kind, number in calls.items()]
    if data > 1:
        found.append(Collective("reduce_scatter", "data", data, 1, 4 * parameters))
        found.append(Collective("all_gather", "data", data, 1, 2 * parameters))
    shard = data if grid.use_distributed_optimizer else 1
    return RankNumbers(
        rank,
        stage,
        parameters,
        Memory(
            weights=2 * parameters,
            gradients=4 * parameters,
            optimizer=12 * parameters // shard,
            reference=2 * parameters if config.reference.mode != "precomputed" else 0,
            activations=int(alive * layers * tokens * row * kept),
            logits=2**31 if stage == stages - 1 else 0,
            buffers=2**30,
        ),
        tuple(found),
    )
