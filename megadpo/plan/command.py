"""`megadpo plan`: from a run file and a number of GPUs to a report. config.json is enough: no weights, no data."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from megadpo.config import Config, ParallelConfig
from megadpo.convert.shape import ModelShape
from megadpo.data.kinds import wanted
from megadpo.data.prepare import prepared
from megadpo.errors import ConfigError, MegadpoError
from megadpo.objectives.kinds import kind_of
from megadpo.plan import constants as c
from megadpo.plan import gpu_option
from megadpo.plan.grids import Space
from megadpo.plan.report import Report, of_the_model
from megadpo.plan.search import Count, Search
from megadpo.plan.workload import Assumed, Lengths, assumed, of_store
from megadpo.train.inputs import read_shapes


@dataclass(frozen=True)
class Request:
    """What the command line asks for. None: not given."""

    gpus: int
    gpu: str
    price: float | None = None
    rows: int | None = 15
    """None: all."""
    groups: int | None = None
    prompt_tokens: float | None = None
    response_tokens: float | None = None
    spread: float | None = None


def plan(config: Config, request: Request, count: Count) -> Report:
    """Raises ConfigError and ModelError."""
    search, said = search_of(config, request, count)
    found = search.run(every=request.rows is None, confirmed=request.rows or 15)
    return Report(search.space, found, said, request.price, request.rows)


def search_of(config: Config, request: Request, count: Count) -> tuple[Search, tuple[str, ...]]:
    """What is searched, and what was assumed for it. Raises ConfigError and ModelError."""
    gpu = gpu_option.parse_gpu(request.gpu)
    # The run file's own grid is not looked at: the search makes its own. The reference's mode is searched over, too.
    bare = replace(config, parallel=_without_sizes(config.parallel))
    shapes = read_shapes(bare, 1)
    lengths, assumptions = data_of(config, request, shapes.policy)
    space = Space(bare, shapes, gpu, request.gpus, lengths.longest)
    if config.model.real_fp8:
        assumptions.append(
            "FP8's memory (kept casts of weights, inputs saved in FP8) as Transformer Engine 2.9's sources say; "
            "gathers of sequence parallelism as in bfloat16"
        )
    if config.model.cuda_graphs:
        assumptions.append(
            "the memory that CUDA graphs hold is counted, as if weights' gradients were added inside the product; the "
            "launches saved are not, nor FP8's casts for every micro-batch"
        )
    return Search(space, lengths, count), (*assumptions, *gpu_option.assumed(request.gpu), *of_the_model(gpu))


def _without_sizes(parallel: ParallelConfig) -> ParallelConfig:
    """The overlap of communication and the optimizer's sharding as they are, on one process."""
    return ParallelConfig(
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
    )


def data_of(config: Config, request: Request, shape: ModelShape) -> tuple[Lengths, list[str]]:
    """Lengths of the run's data where it is prepared and none are given, else assumed; and what to say of it."""
    share = config.batch.share_prompt
    given = (request.groups, request.prompt_tokens, request.response_tokens)
    why = "given"
    if (*given, request.spread) == (None, None, None, None):
        lengths, why = _from_store(config, share, shape)
        if lengths is not None:
            return lengths, [f"lengths of {lengths.said}"]
    for name, value in zip(("--groups", "--prompt-tokens", "--response-tokens"), given, strict=True):
        if value is not None and not 0 < value < 1e12:
            raise ConfigError(f"{name} {value:g}: must be over 0")
    if request.spread is not None and not 0 <= request.spread <= 5:
        raise ConfigError(f"--spread {request.spread:g}: must be 0 (all lengths alike) to 5")
    longest = config.data.max_length
    data = Assumed(
        request.groups or c.ASSUMED_GROUPS,
        {"pairs": 2, "lists": c.ASSUMED_LIST}.get(kind_of(config.objective), 1),
        request.prompt_tokens or min(c.ASSUMED_PROMPT, longest / 4),
        request.response_tokens or min(c.ASSUMED_RESPONSE, longest / 2),
        c.ASSUMED_SPREAD if request.spread is None else request.spread,
    )
    lengths = assumed(data, longest, share, shape, config.batch.micro_batch_tokens)
    return lengths, [f"{lengths.said} ({why})"]


def _from_store(config: Config, share: bool, shape: ModelShape) -> tuple[Lengths | None, str]:
    """(lengths, nothing) or (None, why there are none). Nothing is downloaded."""
    sources = config.data.train
    if not all(Path(source).expanduser().exists() for source in sources):
        return None, "data.train is not here; --groups, --prompt-tokens, --response-tokens say it better"
    try:
        store = prepared(sources, config.data, config.model.path, wanted(config), config.batch)
    except MegadpoError as error:
        return None, f"the data cannot be read: {error}"
    if store is None:
        return None, "the data is not prepared yet: `megadpo prepare`"
    return of_store(store, share, shape), ""
