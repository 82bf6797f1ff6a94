"""The engine without files and command line: a model folder, a store and a grid in; numbers out."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megadpo_kernels import Backend
from tape import make_graphed_callables

from megadpo.config import ModelConfig, OptimizerConfig, ParallelConfig
from megadpo.convert.families import read_shape, with_head
from megadpo.convert.importer import load_hf
from megadpo.data.mismatch import mismatched
from megadpo.data.packing import Budget
from megadpo.data.stream import Scored, Stream
from megadpo.model.build import build_chunks
from megadpo.model.graphs import capture
from megadpo.model.policy import Policy
from megadpo.model.reference import build_reference
from megadpo.objectives import DPO, Objective
from megadpo.parallel.context import ParallelContext, grid
from megadpo.train.evaluate import evaluate
from megadpo.train.optimizer import build_optimizer, set_learning_rate, settled, wrap
from megadpo.train.portions import Portions
from megadpo.train.score import score_groups
from megadpo.train.state import TrainState
from megadpo.train.step import train_step
from megadpo.train.swapped import SwappedPortions


@dataclass(frozen=True)
class Case:
    """One way to run the same training."""

    folder: Path
    store: Any
    tensor: int = 1
    pipeline: int = 1
    virtual: int | None = None
    expert: int = 1
    sequence: bool = False
    distributed: bool = False
    overlap: bool = False
    dtype: str = "float32"
    recompute: str = "none"
    budget: Budget = field(default_factory=lambda: Budget(96))
    steps: int = 2
    batch: int = 8
    learning_rate: float = 1e-3
    objective: Objective = field(default_factory=lambda: DPO(beta=0.5))
    resident: bool = False
    swap_steps: int = 0
    """Over 0: a swapped reference, each visit for so many steps."""
    fp8_reference: bool = False
    tp_overlap: bool = False
    share: bool = True
    grain: int | None = None
    bucket_size: int | None = None
    evaluated: bool = False
    logprob_backend: Backend = "auto"
    model_options: dict[str, Any] = field(default_factory=dict)
    """More settings of the run file's model section."""
    graphs: tuple[str, ...] = ()
    """model.cuda_graphs, which a CPU's run file may not ask for: there tests/tape.py replays them."""

    @property
    def live(self) -> bool:
        """Whether a second model says what the reference does, and not a column."""
        return self.resident or self.swap_steps > 0

    @property
    def model(self) -> ModelConfig:
        how = {"recompute": self.recompute, "logprob_backend": self.logprob_backend, **self.model_options}
        return ModelConfig(str(self.folder), self.dtype, **how)

    @property
    def parallel(self) -> ParallelConfig:
        return ParallelConfig(
            tensor_model_parallel_size=self.tensor,
            pipeline_model_parallel_size=self.pipeline,
            virtual_pipeline_model_parallel_size=self.virtual,
            expert_model_parallel_size=self.expert,
            sequence_parallel=self.sequence,
            use_distributed_optimizer=self.distributed,
            overlap_grad_reduce=self.overlap,
            overlap_param_gather=self.overlap and self.distributed,
            tp_comm_overlap=self.tp_overlap,
        )


@dataclass
class Piece:
    """This rank's part of one tensor."""

    shape: tuple[int, ...]
    offset: tuple[int, ...]
    data: torch.Tensor


def build(case: Case, context: ParallelContext) -> tuple[TrainState, Stream]:
    shape = with_head(read_shape(case.folder), case.objective.head, case.folder)
    modules = build_chunks(shape, case.parallel, context, case.model)
    load_hf(modules, shape, case.folder)
    chunks = wrap(modules, case.parallel, case.bucket_size)
    optimizer = build_optimizer(chunks, OptimizerConfig(weight_decay=0.1), case.parallel)
    if case.graphs:
        on_gpu = context.device.type == "cuda"
        make = None if on_gpu else make_graphed_callables
        capture(chunks, case.graphs, case.budget.tokens, shape.hidden_size, context, make)
    scalar = case.objective.head == "scalar"
    multiple = case.pipeline if case.virtual else 1
    stream = Stream(
        case.store, case.budget, context.data_size, multiple, share=case.share, grain=case.grain, scalar=scalar
    )
    return TrainState(chunks, optimizer), stream


def pieces(state: TrainState, tensor_of: Any) -> dict[str, Piece]:
    """tensor_of(parameter) for every parameter here, under its global name; gate and up apart."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

    found = {}
    for module in state.modules:
        # by identity: a tensor subclass, as Transformer Engine's FP8 weights are, has no address of its own
        parameters = {id(p): p for p in module.parameters()}
        missing = set(parameters)
        for entry in module.sharded_state_dict(metadata={"singleton_local_shards": True}).values():
            parameter = parameters.get(id(getattr(entry, "data", None)))
            if parameter is None:  # a buffer
                continue
            missing.discard(id(parameter))
            entry = replace(entry, data=tensor_of(parameter).to(parameter.dtype))
            for part in entry.build() if isinstance(entry, ShardedTensorFactory) else [entry]:
                found[part.key] = Piece(part.global_shape, part.global_offset, part.data.detach().float().clone())
        assert not missing, "parameters without a place in a checkpoint"
    return found


def run(device: torch.device, cases: list[Case]) -> list[dict[str, Any]]:
    """Every case one after the other in the same ranks."""
    return [run_one(device, case) for case in cases]


def run_one(device: torch.device, case: Case) -> dict[str, Any]:
    """Reference column, then `steps` updates; the column, the totals, the first step's gradients, the final weights."""
    with grid(case.parallel, device, seed=1) as context:
        state, stream = build(case, context)
        everything = np.arange(len(case.store))
        column = None
        if case.objective.needs_reference:
            column = score_groups(state.modules, stream, everything, 5, context, lambda done: None)
        train = replace(mismatched_of(case, state, stream, context), column=None if case.live else column)
        reference = reference_of(case, context) if case.live else None
        run_of = (train, case.batch, case.steps * case.batch, context)
        portions = Portions(*run_of, reference)
        if reference is not None and case.swap_steps:
            portions = SwappedPortions(*run_of, reference, case.swap_steps)
        held_out = Scored(stream, None if case.live else column, whole_store(case, state, stream, context))
        result: dict[str, Any] = {"column": column, "sums": [], "grad_norms": [], "micro_batches": []}
        first_gradients(state, result)
        for _ in range(case.steps):
            set_learning_rate(state.optimizer, case.learning_rate)
            part = portions.at(state.consumed)
            coming = partial(portions.prepare, state.consumed + case.batch)
            sums, norm = train_step(
                state, part.batches, case.objective, portions.resident, context, part.mismatched, before_update=coming
            )
            result["micro_batches"].append(len(part.batches))
            result["sums"].append(sums)
            result["grad_norms"].append(norm)
        if case.evaluated:
            with settled(state.chunks), portions.reference() as chunks:
                result["held_out"] = evaluate(state.chunks, held_out, case.objective, chunks, 5, context)
        with settled(state.chunks):
            result["weights"] = pieces(state, lambda p: p.data)
        return result


def reference_of(case: Case, context: ParallelContext) -> list[Policy]:
    """The model as it is at the start, a second time."""
    shape = read_shape(case.folder)
    chunks = build_reference(shape, case.parallel, context, case.model, case.fp8_reference)
    load_hf(chunks, shape, case.folder)
    return chunks


def mismatched_of(case: Case, state: TrainState, stream: Stream, context: ParallelContext) -> Scored:
    """The training stream with its mismatched responses, scored by the model as it is at the start."""
    order = stream.next_groups(0, case.steps * case.batch)
    return Scored(stream, None, _mismatched(case, state, stream, order, case.batch, context))


def whole_store(case: Case, state: TrainState, stream: Stream, context: ParallelContext) -> Scored | None:
    """The store's mismatched responses as one batch, scored by the model as it is at the start."""
    return _mismatched(case, state, stream, np.arange(len(case.store)), len(case.store), context)


def _mismatched(
    case: Case, state: TrainState, stream: Stream, order: np.ndarray, batch: int, context: ParallelContext
) -> Scored | None:
    if "mismatched_kl" not in case.objective.needs:
        return None
    other = replace(stream, store=mismatched(case.store, order, batch, seed=0), shuffle=False)
    if case.live:
        return Scored(other, None)
    with settled(state.chunks):
        column = score_groups(state.modules, other, np.arange(len(other.store)), 5, context, lambda done: None)
    return Scored(other, column)


def first_gradients(state: TrainState, result: dict[str, Any]) -> None:
    """Keep the gradients as they are when the optimizer first gets them: reduced and divided."""
    prepare = state.optimizer.prepare_grads

    def keep() -> Any:
        result.setdefault("gradients", pieces(state, lambda p: p.main_grad))
        return prepare()

    state.optimizer.prepare_grads = keep


def assemble(results: list[dict[str, Any]], what: str, vocab: int) -> dict[str, torch.Tensor]:
    """Whole tensors from all ranks' pieces, padded vocabulary cut off. Replicas must agree to the last bit."""
    whole: dict[str, torch.Tensor] = {}
    for result in results:
        for key, piece in result[what].items():
            full = whole.setdefault(key, torch.full(piece.shape, torch.nan))
            index = tuple(slice(o, o + n) for o, n in zip(piece.offset, piece.data.shape, strict=True))
            known = full[index]
            same = torch.isnan(known) | (known == piece.data)
            assert same.all(), f"{what} of {key}: replicas differ by {(known - piece.data).abs().max()}"
            full[index] = piece.data
    for key, full in whole.items():
        if "word_embeddings" in key or key == "output_layer.weight":
            whole[key] = full = full[:vocab]
        assert not torch.isnan(full).any(), f"{what} of {key}: no rank holds all of it"
    return whole


def worst(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> tuple[float, str]:
    """Largest relative difference |got - want| / |want| (Frobenius) over all tensors, and whose it is."""
    assert got.keys() == want.keys()
    return max((float((got[k] - want[k]).norm() / want[k].norm().clamp(min=1e-30)), k) for k in want)


def gathered(results: list[list[dict[str, Any]]], index: int) -> Iterator[dict[str, Any]]:
    """One case's results of every rank."""
    return (rank[index] for rank in results)
