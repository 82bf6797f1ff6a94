"""Hugging Face folder -> ranks of every grid -> checkpoint -> Hugging Face folder, with transformers as the
judge.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import run_ranks
from llamas import MODELS, write
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megadpo.config import ModelConfig, ParallelConfig
from megadpo.convert import families
from megadpo.convert.exporter import export_hf
from megadpo.convert.families import LLAMA, read_shape
from megadpo.convert.importer import check_hf, load_hf
from megadpo.data.batch import PackedBatch, Segment

TOKENS = 40
"""More than the 16 that the llama3 models say they were first trained on: positions inside and past it."""
STORIES = "stories260k"
NAMES = (*MODELS, STORIES)
GRIDS = {
    "TP1": ParallelConfig(),
    "TP2": ParallelConfig(2),
    "PP2": ParallelConfig(1, 2),
    "PP2 virtual": ParallelConfig(1, 2, 2),
    "TP2 PP2": ParallelConfig(2, 2),
    "TP4": ParallelConfig(4),
}
EXPERT_GRIDS = {
    "TP2 SP": ParallelConfig(2, sequence_parallel=True),
    "EP2": ParallelConfig(expert_model_parallel_size=2),
    "TP2 EP2": ParallelConfig(2, expert_model_parallel_size=2, sequence_parallel=True),
    "TP2 PP2 SP": ParallelConfig(2, 2, sequence_parallel=True),
    "TP2 PP2 EP2": ParallelConfig(2, 2, expert_model_parallel_size=2, sequence_parallel=True),
}
"""For models with experts, which need sequence parallelism beside tensor parallelism."""


def ranks_of(grid: ParallelConfig) -> int:
    """Ranks of the smallest world that the grid fits in."""
    tensor = grid.tensor_model_parallel_size
    return grid.pipeline_model_parallel_size * max(tensor, grid.expert_model_parallel_size)


def tokens(vocab: int) -> torch.Tensor:
    return torch.randint(0, vocab, (TOKENS,), generator=torch.Generator().manual_seed(3))


def every_token(ids_T: torch.Tensor, vocab: int) -> PackedBatch:
    """One sequence, scored with every token of the vocabulary at every position: all of the logits."""
    length = len(ids_T)
    return PackedBatch(
        tokens_T=ids_T,
        positions_T=torch.arange(length),
        rows_N=torch.arange(length).repeat_interleave(vocab),
        targets_N=torch.arange(vocab).repeat(length),
        tokens_S=torch.tensor([length]),
        offsets_G1=torch.tensor([0, 1]),
        reference_S=None,
        segments=(Segment(0, length, 0, 0),),
        groups=(0,),
        used=length,
    )


def forward(chunks: list, context: Any, batch: PackedBatch, vocab: int) -> torch.Tensor | None:
    """Log-probabilities [T, V] on the last stage: the stages one after the other, without the pipeline
    schedule.
    """
    stages = context.pipeline_size * len(chunks)
    ranks = torch.distributed.get_process_group_ranks(context.groups.pp)
    rows = len(batch.tokens_T) // (context.tensor_size if context.sequence_parallel else 1)
    hidden = torch.empty(rows, 1, chunks[0].config.hidden_size)
    for stage in range(stages):
        number, owner = divmod(stage, context.pipeline_size)
        if context.pipeline_rank == owner:
            if stage:
                chunks[number].set_input_tensor([hidden])
            hidden = chunks[number](batch)
            hidden = getattr(hidden, "logprob_N", hidden)  # of the last stage
        if stage == stages - 1:
            return hidden.view(-1, vocab) if context.pipeline_rank == owner else None
        torch.distributed.broadcast(hidden, ranks[owner], group=context.groups.pp)
    raise AssertionError("a model has at least one stage")


@torch.no_grad()
def convert(device: torch.device, folders: dict[str, Path], grids: list[str], out: Path) -> dict[tuple, dict]:
    """On every rank: fill, compute, save a checkpoint, for every model on every grid."""
    from megatron.core import dist_checkpointing

    from megadpo.checkpoint import METADATA
    from megadpo.model.build import build_chunks
    from megadpo.parallel.context import grid

    results = {}
    for name in grids:
        parallel = (GRIDS | EXPERT_GRIDS)[name]
        with grid(parallel, device, seed=0) as context:
            for model, folder in folders.items():
                shape = read_shape(folder)
                chunks = build_chunks(shape, parallel, context, ModelConfig("", "float32"))
                parameters = [p for chunk in chunks for p in chunk.named_parameters()]
                for _, parameter in parameters:
                    parameter.fill_(float("nan"))
                load_hf(chunks, shape, folder)
                batch = every_token(tokens(shape.vocab_size), shape.vocab_size)
                results[model, name] = {
                    "not filled": [n for n, p in parameters if not torch.isfinite(p).all()],
                    "logprobs": forward(chunks, context, batch, shape.vocab_size),
                }
                checkpoint = out / model / name
                if context.is_first:
                    checkpoint.mkdir(parents=True)
                torch.distributed.barrier()
                state = {
                    f"model{i}": chunk.sharded_state_dict(metadata=dict(METADATA)) for i, chunk in enumerate(chunks)
                }
                dist_checkpointing.save(state, str(checkpoint), content_metadata=dict(METADATA))
    return results


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, shared: Path) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: write(name, root / name) for name in MODELS} | {STORIES: shared / "models" / STORIES}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def results(folders: dict[str, Path], checkpoints: Path) -> dict[tuple, list[dict]]:
    """What each rank found, by (model, grid)."""
    found: dict[tuple, list[dict]] = {}
    for world in (1, 2, 4):
        grids = [name for name, grid in GRIDS.items() if ranks_of(grid) == world]
        ranks = run_ranks(world, convert, folders, grids, checkpoints)
        found |= {job: [rank[job] for rank in ranks] for job in ranks[0]}
    return found


@pytest.fixture(scope="module")
def logprobs(folders: dict[str, Path]) -> dict[str, torch.Tensor]:
    """transformers' log-probabilities [T, V] of the same tokens."""
    return {name: judge(folder) for name, folder in folders.items()}


@torch.no_grad()
def judge(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    logits = model(tokens(model.config.vocab_size)[None]).logits[0]
    return logits.float().log_softmax(-1)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: x for file in folder.glob("*.safetensors") for name, x in load_file(file).items()}


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("model", NAMES)
def test_ranks_compute_what_transformers_computes(
    model: str, grid: str, results: dict[tuple, list[dict]], logprobs: dict[str, torch.Tensor]
) -> None:
    ranks = results[model, grid]
    assert [rank["not filled"] for rank in ranks] == [[] for _ in ranks]
    computed = [rank["logprobs"] for rank in ranks if rank["logprobs"] is not None]
    assert len(computed) == GRIDS[grid].tensor_model_parallel_size  # every tensor rank of the last stage
    for found in computed:
        assert (found - logprobs[model]).abs().max() < 1e-4


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("model", NAMES)
def test_export_gives_the_folder_back(
    model: str,
    grid: str,
    results: dict[tuple, list[dict]],
    folders: dict[str, Path],
    checkpoints: Path,
    tmp_path: Path,
) -> None:
    source, out = folders[model], tmp_path / "out"
    export_hf(checkpoints / model / grid, source, out, max_shard_bytes=90_000)
    before, after = weights(source), weights(out)
    assert after.keys() == before.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert [name for name in before if before[name].dtype != after[name].dtype] == []
    assert (out / "config.json").read_bytes() == (source / "config.json").read_bytes()
    check_hf(read_shape(out), out)


@pytest.mark.parametrize("model", NAMES)
def test_transformers_loads_the_export(
    model: str,
    results: dict[tuple, list[dict]],
    folders: dict[str, Path],
    checkpoints: Path,
    logprobs: dict[str, torch.Tensor],
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    export_hf(checkpoints / model / "TP2 PP2", folders[model], out, max_shard_bytes=90_000)
    loaded, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert {name: list(found) for name, found in info.items() if found} == {}
    assert loaded.config.to_dict() == AutoModelForCausalLM.from_pretrained(folders[model]).config.to_dict() | {
        "_name_or_path": str(out)
    }
    assert torch.equal(judge(out), logprobs[model])


MISTAKES: dict[str, tuple[dict[str, Any], tuple[str, str]]] = {  # changes of the shape, names exchanged in the table
    "none": ({}, ("", "")),
    "theta off by 0.1%": ({"rotary_base": 500500.0}, ("", "")),
    "no rope scaling": ({"rope_scaling": None}, ("", "")),
    "epsilon ten times as large": ({"layernorm_epsilon": 1e-4}, ("", "")),
    "gate and up exchanged": ({}, ("gate_proj", "up_proj")),
    "norms exchanged": ({}, ("input_layernorm", "post_attention_layernorm")),
    "embedding and head exchanged": ({}, ("model.embed_tokens", "lm_head")),
}


def exchanged(text: str, one: str, other: str) -> str:
    return text.replace(one, "\0").replace(other, one).replace("\0", other) if one else text


@torch.no_grad()
def make_mistakes(device: torch.device, folder: Path) -> dict[str, torch.Tensor | None]:
    from megadpo.model.build import build_chunks
    from megadpo.parallel.context import grid

    parallel, shape, found = ParallelConfig(), read_shape(folder), {}
    batch = every_token(tokens(shape.vocab_size), shape.vocab_size)
    for name, (changes, names) in MISTAKES.items():
        families.FAMILIES = (
            replace(LLAMA, weights=tuple(replace(x, hf=exchanged(x.hf, *names)) for x in LLAMA.weights)),
        )
        with grid(parallel, device, seed=0) as context:
            chunks = build_chunks(replace(shape, **changes), parallel, context, ModelConfig("", "float32"))
            load_hf(chunks, shape, folder)
            found[name] = forward(chunks, context, batch, shape.vocab_size)
    return found


def test_comparison_would_see_a_mistake(folders: dict[str, Path], logprobs: dict[str, torch.Tensor]) -> None:
    """Each mistake alone is at least ten times the tolerance, so that passing means something."""
    [found] = run_ranks(1, make_mistakes, folders["llama3"])
    differences = {name: float((x - logprobs["llama3"]).abs().max()) for name, x in found.items()}
    assert differences.pop("none") < 1e-4
    assert {name: size for name, size in differences.items() if size < 1e-3} == {}
