"""Every family, dense or not: config.json, table, numbers on every grid and the way back, with transformers as the
judge."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import run_ranks
from families_table import ROWS, write
from test_round_trip import (
    EXPERT_GRIDS,
    GRIDS,
    TOKENS,
    convert,
    every_token,
    forward,
    judge,
    ranks_of,
    tokens,
    weights,
)
from transformers import AutoModelForCausalLM

from megadpo.config import ModelConfig, ParallelConfig
from megadpo.convert import families
from megadpo.convert.exporter import export_hf
from megadpo.convert.families import FAMILIES, LLAMA, family_of, read_shape
from megadpo.convert.fit import misfits
from megadpo.convert.importer import check_hf, load_hf
from megadpo.convert.shape import ModelShape
from megadpo.convert.tables import Weight

CASES = [(name, grid) for name, row in ROWS.items() for grid in row.grids]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    return {name: write(name, root / name) for name in ROWS}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def results(folders: dict[str, Path], checkpoints: Path) -> dict[tuple, list[dict]]:
    """What each rank found, by (model, grid)."""
    found: dict[tuple, list[dict]] = {}
    for world in (1, 2, 4):
        for grid in (name for name, sizes in (GRIDS | EXPERT_GRIDS).items() if ranks_of(sizes) == world):
            models = {name: folders[name] for name, row in ROWS.items() if grid in row.grids}
            if models:
                ranks = run_ranks(world, convert, models, [grid], checkpoints)
                found |= {job: [rank[job] for rank in ranks] for job in ranks[0]}
    return found


@pytest.fixture(scope="module")
def logprobs(folders: dict[str, Path]) -> dict[str, torch.Tensor]:
    """transformers' log-probabilities [T, V] of the same tokens."""
    return {name: judge(folder) for name, folder in folders.items()}


@pytest.mark.parametrize(("model", "grid"), CASES)
def test_ranks_compute_what_transformers_computes(
    model: str, grid: str, results: dict[tuple, list[dict]], logprobs: dict[str, torch.Tensor]
) -> None:
    """Windows are of 7 tokens, yarn's original context is 24: positions inside and past both."""
    assert len(logprobs[model]) == TOKENS
    ranks = results[model, grid]
    assert [rank["not filled"] for rank in ranks] == [[] for _ in ranks]
    computed = [rank["logprobs"] for rank in ranks if rank["logprobs"] is not None]
    assert computed
    for found in computed:
        assert float((found - logprobs[model]).abs().max()) < 1e-4


@pytest.mark.parametrize(("model", "grid"), CASES)
def test_export_gives_the_folder_back(
    model: str,
    grid: str,
    results: dict[tuple, list[dict]],
    folders: dict[str, Path],
    checkpoints: Path,
    tmp_path: Path,
) -> None:
    source, out = folders[model], tmp_path / "out"
    export_hf(checkpoints / model / grid, source, out, max_shard_bytes=60_000)
    before, after = weights(source), weights(out)
    assert after.keys() == before.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert [name for name in before if before[name].dtype != after[name].dtype] == []
    assert (out / "config.json").read_bytes() == (source / "config.json").read_bytes()
    check_hf(read_shape(out), out)


@pytest.mark.parametrize("model", ROWS)
def test_transformers_loads_the_export(
    model: str, results: dict[tuple, list[dict]], folders: dict[str, Path], checkpoints: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    export_hf(checkpoints / model / ROWS[model].grids[-1], folders[model], out)
    loaded, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert {name: list(found) for name, found in info.items() if found} == {}
    want = AutoModelForCausalLM.from_pretrained(folders[model])
    assert loaded.config.to_dict() | {"_name_or_path": ""} == want.config.to_dict() | {"_name_or_path": ""}


def test_every_family_and_every_row_of_its_table_is_used(folders: dict[str, Path]) -> None:
    """What no test model has would be untested. Llama and the rows it has are in test_shape.py."""
    shapes = [read_shape(folder) for folder in folders.values()]
    assert {family.name for family in FAMILIES} == {shape.family for shape in shapes} | {"llama"}
    known = {(row.megatron, row.hf) for family in FAMILIES for row in family.weights}
    used = {(row.megatron, row.hf) for shape in shapes for row in family_of(shape).weights if row.when(shape)}
    assert known - used - {(row.megatron, row.hf) for row in LLAMA.weights} == set()


@dataclass(frozen=True)
class Mistake:
    """One thing wrong with the shape that was read, or with the table."""

    model: str
    change: Callable[[ModelShape], ModelShape] = lambda shape: shape
    exchanged: tuple[str, str] = ("", "")
    """Hugging Face names in the table."""
    stacked: bool = False
    """Whether the two columns of a stacked tensor are exchanged."""


def scaling(**changes: Any) -> Callable[[ModelShape], ModelShape]:
    return lambda s: replace(s, rope_scaling=replace(s.rope_scaling, **changes))


def window(**changes: Any) -> Callable[[ModelShape], ModelShape]:
    return lambda s: replace(s, window=replace(s.window, **changes))


def norms(**changes: Any) -> Callable[[ModelShape], ModelShape]:
    return lambda s: replace(s, norms=replace(s.norms, **changes))


def scores(**changes: Any) -> Callable[[ModelShape], ModelShape]:
    return lambda s: replace(s, scores=replace(s.scores, **changes))


def experts(**changes: Any) -> Callable[[ModelShape], ModelShape]:
    return lambda s: replace(s, experts=replace(s.experts, **changes))


def latent(**changes: Any) -> Callable[[ModelShape], ModelShape]:
    return lambda s: replace(s, latent=replace(s.latent, **changes))


MISTAKES = {
    "window one too wide": Mistake("mistral", window(size=8)),
    "window one too narrow": Mistake("mistral", window(size=6)),
    "no window": Mistake("phi3", lambda s: replace(s, window=None)),
    "windows on the other layers": Mistake("qwen3", window(layers=(True, False, True, False))),
    "epsilon": Mistake("qwen2", lambda s: replace(s, layernorm_epsilon=1e-4)),
    "yarn without its factor on scores": Mistake("qwen2, yarn", scaling(attention_factor=1.0)),
    "yarn with the usual factor on scores": Mistake("qwen2, odd yarn", scaling(attention_factor=1.1386294361)),
    "yarn: beta_fast": Mistake("qwen2, odd yarn", scaling(beta_fast=32.0)),
    "yarn: beta_slow": Mistake("qwen2, odd yarn", scaling(beta_slow=1.0)),
    "yarn: truncate": Mistake("qwen2, odd yarn", scaling(truncate=True)),
    "yarn: original length": Mistake("qwen2, yarn", scaling(original_max_position_embeddings=48)),
    "q and k norms exchanged": Mistake("qwen3", exchanged=("q_norm", "k_norm")),
    "no soft cap on scores": Mistake("gemma2", scores(soft_cap=None)),
    "no soft cap on logits": Mistake("gemma2", lambda s: replace(s, logit_soft_cap=None)),
    "scores scaled by the head's width": Mistake("gemma2", scores(scale=None)),
    "embeddings not scaled": Mistake("gemma2", lambda s: replace(s, embedding_scale=None)),
    "SiLU for GELU": Mistake("gemma3", lambda s: replace(s, activation="silu")),
    "norms multiply by the weight": Mistake("gemma3", norms(zero_centred=False)),
    "one rotary base": Mistake("gemma3", lambda s: replace(s, local_rotary_base=s.rotary_base)),
    "local rotary base off by 1%": Mistake("gemma3", lambda s: replace(s, local_rotary_base=3030.0)),
    "linear factor": Mistake("gemma3", scaling(factor=4.0)),
    "norms behind exchanged": Mistake("gemma3", exchanged=("post_attention_layernorm", "post_feedforward_layernorm")),
    "norms before exchanged": Mistake("gemma3", exchanged=("input_layernorm", "pre_feedforward_layernorm")),
    "OLMo's norms exchanged": Mistake("olmo2", exchanged=("post_attention_layernorm", "post_feedforward_layernorm")),
    "scores not normalised": Mistake("qwen3_moe", experts(normalised=False)),
    "scores normalised": Mistake("qwen3_moe, scores as they are", experts(normalised=True)),
    "one expert too few": Mistake("mixtral", experts(per_token=1)),
    "gate and up of experts exchanged": Mistake("mixtral", exchanged=(".w1.", ".w3.")),
    "no scaling of the scores": Mistake("deepseek_v2", experts(scaling=1.0)),
    "groups worth two scores": Mistake("deepseek_v2", experts(group_score=2)),
    "no groups": Mistake("deepseek_v3", experts(groups_per_token=4)),
    "groups worth one score": Mistake("deepseek_v3", experts(group_score=1)),
    "softmax for sigmoid": Mistake("deepseek_v3", experts(score="softmax")),
    "rotary pairs as halves": Mistake("deepseek_v3", latent(interleaved=False)),
    "rotary pairs as neighbours": Mistake("deepseek_v3, odd", latent(interleaved=True)),
    "yarn's mscale_all_dim": Mistake("deepseek_v3", scores(scale=28**-0.5)),
    "yarn without its factor on what is rotated": Mistake("deepseek_v2", scaling(attention_factor=1.0)),
    "no clamp": Mistake("gpt_oss", lambda s: replace(s, experts=replace(s.experts, clamp=9.0))),
    "SiLU of slope 1": Mistake("gpt_oss", lambda s: replace(s, activation="silu")),
    "gate and up of gpt-oss exchanged": Mistake("gpt_oss", stacked=True),
    "all of each head rotated": Mistake("phi3", lambda s: replace(s, rotary_percent=1.0)),
}


def exchange(text: str, one: str, other: str) -> str:
    return text.replace(one, "\0").replace(other, one).replace("\0", other) if one else text


def mistaken(weight: Weight, mistake: Mistake) -> Weight:
    stacked = weight.stacked
    if mistake.stacked and stacked is not None and stacked.step == 2:
        stacked = replace(stacked, start=1 - stacked.start)
    return replace(weight, hf=exchange(weight.hf, *mistake.exchanged), stacked=stacked)


@torch.no_grad()
def make_mistakes(device: torch.device, folders: dict[str, Path]) -> dict[str, torch.Tensor | None]:
    from megadpo.model.build import build_chunks
    from megadpo.parallel.context import grid

    parallel, found, right = ParallelConfig(), {}, families.FAMILIES
    for name, mistake in MISTAKES.items():
        shape = read_shape(folders[mistake.model])
        batch = every_token(tokens(shape.vocab_size), shape.vocab_size)
        families.FAMILIES = tuple(replace(x, weights=tuple(mistaken(w, mistake) for w in x.weights)) for x in right)
        with grid(parallel, device, seed=0) as context:
            chunks = build_chunks(mistake.change(shape), parallel, context, ModelConfig("", "float32"))
            load_hf(chunks, shape, folders[mistake.model])
            found[name] = forward(chunks, context, batch, shape.vocab_size)
        families.FAMILIES = right
    return found


def test_comparison_would_see_a_mistake(folders: dict[str, Path], logprobs: dict[str, torch.Tensor]) -> None:
    """Each mistake alone is at least ten times the tolerance, so that passing means something."""
    [found] = run_ranks(1, make_mistakes, folders)
    differences = {name: float((x - logprobs[MISTAKES[name].model]).abs().max()) for name, x in found.items()}
    assert {name: size for name, size in differences.items() if not size > 1e-3} == {}


def test_a_norm_over_all_keys_cannot_split_one_key_head(folders: dict[str, Path], tmp_path: Path) -> None:
    """Said before any rank starts."""
    given = json.loads((folders["olmo2"] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(given | {"num_key_value_heads": 1}))
    [line] = misfits(read_shape(tmp_path), ParallelConfig(2))
    assert "tensor_model_parallel_size = 2" in line
    assert "num_key_value_heads 1 has a norm over all keys; use a divisor of that number" in line
    assert misfits(read_shape(folders["olmo2"]), ParallelConfig(2)) == []
