"""Which grids are looked at, and that those which are refused are refused in the words of a run."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from counted import count
from situations import candidate, config, search, with_experts

from megadpo.config import Config
from megadpo.config.decode import load_config, to_yaml
from megadpo.convert.shape import ModelShape
from megadpo.errors import ConfigError
from megadpo.model.build import padded_vocab
from megadpo.observe.gpus import GIB, GPUS
from megadpo.plan.grids import Candidate, candidates, check_space, modes, reasons
from megadpo.plan.numbers import RankNumbers
from megadpo.plan.profile import layers_of
from megadpo.plan.search import Found, Plan, Search, usable
from megadpo.train.inputs import Shapes, read_shapes


def said_by_a_run(one: Candidate, found: Search, folder: Path) -> set[str]:
    """What `megadpo train` says of these settings, with so many ranks; without the names of files in front."""
    given = one.applied(found.space.config)
    path = folder / "said.yaml"
    path.write_text(to_yaml(replace(given, parallel=replace(given.parallel, data_parallel_size=None))))
    try:
        read_shapes(load_config(path, []), found.space.gpus)
    except ConfigError as error:
        return {line.strip().removeprefix(f"{path}").lstrip(":0123456789 ") for line in str(error).splitlines()}
    return set()


@pytest.mark.parametrize(
    ("one", "gpus", "part"),
    [
        (candidate(tensor=3, data=2), 6, "must divide its 32 attention heads"),
        (candidate(tensor=16, data=1), 16, None),  # divides everything
        (candidate(pipeline=64, data=1, tokens=8192), 64, "64 stages for 32 layers"),
        (candidate(pipeline=16, virtual=4, data=1), 16, "16 x virtual_pipeline_model_parallel_size = 4"),
        (candidate(pipeline=1, virtual=2), 8, "needs parallel.pipeline_model_parallel_size of at least 2"),
        (candidate(tensor=2, data=4, sequence=True, tokens=8191), 8, "must be a multiple of"),
        (candidate(sequence=True), 8, "needs parallel.tensor_model_parallel_size of at least 2"),
        (candidate(expert=2), 8, "this model has no experts"),
    ],
)
def test_reasons_are_the_runs(tmp_path: Path, one: Candidate, gpus: int, part: str | None) -> None:
    found = search(config(tmp_path), gpus)
    ours, runs = reasons(found.space, one), said_by_a_run(one, found, tmp_path)
    if part is None:
        assert not runs
    else:
        assert any(part in line for line in ours)
        assert set(ours) == runs


@pytest.mark.parametrize(
    ("one", "part"),
    [
        (candidate(expert=16, data=16), "must divide the model's 8 experts"),
        (candidate(tensor=2, data=8, expert=2), "models with experts need it"),
    ],
)
def test_reasons_of_experts_are_the_runs(tmp_path: Path, one: Candidate, part: str) -> None:
    found = search(config(tmp_path, with_experts(tmp_path)), 16)
    ours = reasons(found.space, one)
    assert any(part in line for line in ours)
    assert set(ours) == said_by_a_run(one, found, tmp_path)


def test_what_a_run_would_start_is_not_refused(tmp_path: Path) -> None:
    """Over all grids of a small world: refused here exactly where a run refuses."""
    for model in ("llama3.1-8b", with_experts(tmp_path)):
        found = search(config(tmp_path, model), 6, replace(GPUS["h100-80gb"], per_node=6))
        seen: set[tuple[object, ...]] = set()
        for one in candidates(found.space):
            key = (*one.ways, one.sequence)
            if key in seen or one.tokens < found.space.longest:
                continue
            seen.add(key)
            assert bool(reasons(found.space, one)) == bool(said_by_a_run(one, found, tmp_path)), one
        assert len(seen) > 10


def test_a_group_must_fit_its_stream(tmp_path: Path) -> None:
    found = search(config(tmp_path), 8)
    assert "the longest group takes" in reasons(found.space, candidate(tokens=256))[0]


def test_candidates_are_all_grids(tmp_path: Path) -> None:
    found = search(config(tmp_path), 16)
    every = list(candidates(found.space))
    assert len(set(every)) == len(every)
    assert all(one.tensor * one.pipeline * one.data == 16 for one in every)
    grids = {(one.tensor, one.pipeline) for one in every}
    assert grids == {(t, p) for t in (1, 2, 4, 8, 16) for p in (1, 2, 4, 8, 16) if t * p <= 16}
    assert {one.recompute for one in every} == {"none", "selective", "full"}
    assert {one.sequence for one in every if one.tensor > 1} == {True, False}
    assert {one.virtual for one in every if one.pipeline == 4} == {None, 2, 4, 8}
    fixed = search(config(tmp_path, batch={"micro_batch_tokens": 6144}), 16)
    assert {one.tokens for one in candidates(fixed.space)} == {6144}


def test_reference_modes(tmp_path: Path) -> None:
    assert modes(config(tmp_path, reference={"mode": "resident"}))[0] == "resident"
    assert len(modes(config(tmp_path))) >= 2
    assert len(modes(config(tmp_path, objective={"loss_type": "simpo"}))) == 1
    # looks at single tokens: no column can serve it
    tdpo = search(config(tmp_path, objective={"loss_type": "tdpo"}, reference={"mode": "resident"}), 8)
    refused = reasons(tdpo.space, candidate(reference="precomputed"))
    assert "reference.mode = precomputed" in refused[0]
    assert not reasons(tdpo.space, candidate(reference="resident"))


def test_recompute_beside_cuda_graphs(tmp_path: Path) -> None:
    """The search tries every way; a run would refuse this one."""
    given = config(tmp_path)
    found = search(replace(given, model=replace(given.model, cuda_graphs=("mlp",))), 8)
    [refused] = reasons(found.space, candidate(recompute="full"))
    assert "model.cuda_graphs = [mlp]: not with model.recompute = full" in refused
    assert not reasons(found.space, candidate(recompute="selective"))


@pytest.fixture(scope="module")
def seventy(tmp_path_factory: pytest.TempPathFactory) -> tuple[Search, Found]:
    found = search(config(tmp_path_factory.mktemp("70b"), "llama3.1-70b", batch={"global_batch_size": 128}), 64)
    return found, found.run()


def test_search(seventy: tuple[Search, Found]) -> None:
    _, found = seventy
    steps = [plan.estimate.step for plan in found.plans]
    assert steps == sorted(steps)
    assert found.considered == len(found.plans) + len(found.rejected) + found.dominated
    room = usable(GPUS["h100-80gb"])
    assert all(plan.memory.total <= room for plan in found.plans)
    assert found.best[0] is found.plans[0]
    assert len({plan.candidate.ways for plan in found.best}) == len(found.best)
    why = [reason for one in found.rejected for reason in one.reasons]
    assert any("most of it gradients" in reason for reason in why)
    assert any("most of it activations" in reason for reason in why)
    assert any("over the 8 GPUs of a node" in reason for reason in why)


def test_nothing_better_is_left_out(tmp_path: Path) -> None:
    """What the short search leaves out is never faster than what it finds of the same grid."""
    found = search(config(tmp_path), 8)
    short, every = found.run(), found.run(every=True)
    assert every.dominated == 0
    assert short.dominated > 0
    assert every.considered == short.considered
    assert {p.candidate.ways: p.candidate for p in short.best} == {p.candidate.ways: p.candidate for p in every.best}


def test_the_fullest_rank_decides(seventy: tuple[Search, Found]) -> None:
    found, _ = seventy
    one = candidate(tensor=8, pipeline=4, data=2, sequence=True, tokens=4096)
    plan = found.look_at(one)
    assert isinstance(plan, Plan)
    given, done = one.applied(found.space.config), found.work(one)
    shape = found.space.shapes.policy
    assert padded_vocab(shape.vocab_size, 8) == shape.vocab_size
    for rank in range(0, 64, 8):  # one of every tensor-parallel group
        memory = count(shape, given, 64, rank, 4096, round(done.most_scored), done.micro_batches).memory
        assert memory.total <= plan.memory.total


def test_more_memory_allows_more(tmp_path: Path) -> None:
    given = config(tmp_path, "llama3.1-70b")
    small, large = search(given, 8, "h100-80gb").run(), search(given, 8, "b200").run()
    assert {p.candidate for p in small.plans} & {p.candidate for p in large.plans} or not small.plans
    assert len(large.best) > len(small.best)
    tiny = replace(GPUS["h100-80gb"], name="custom", memory=4 * GIB)
    assert not search(given, 4, tiny).run().plans


def test_worlds_that_cannot_be(tmp_path: Path) -> None:
    given = config(tmp_path)
    with pytest.raises(ConfigError, match=r"--gpus 12: must be a multiple of the 8 of a node .* such as 8 or 16"):
        search(given, 12).run()
    with pytest.raises(ConfigError, match="--gpus 0: must be at least 1"):
        search(given, 0).run()
    fp8 = replace(given, model=replace(given.model, fp8_format="hybrid"))
    with pytest.raises(ConfigError, match="a100-80gb has no FP8"):
        search(fp8, 8, "a100-80gb").run()
    float32 = replace(given, model=replace(given.model, dtype="float32"))
    with pytest.raises(ConfigError, match="float32: the planner knows the speed of bfloat16 and FP8 only"):
        search(float32, 8).run()


def test_recipes_that_the_gpu_has_not(tmp_path: Path) -> None:
    """In the words of a run (model/fp8.py)."""
    given = config(tmp_path)
    fp8 = {
        recipe: replace(given, model=replace(given.model, fp8_format="e4m3", fp8_recipe=recipe))
        for recipe in ("mxfp8", "blockwise", "tensorwise")
    }
    with pytest.raises(ConfigError, match=r"h100-80gb: model.fp8_recipe = mxfp8: needs compute capability 10.x"):
        check_space(search(fp8["mxfp8"], 8).space)
    check_space(search(fp8["mxfp8"], 8, "b200").space)
    check_space(search(fp8["blockwise"], 8, "h100-80gb").space)
    ada = replace(GPUS["h100-80gb"], name="custom", capability=(8, 9))
    with pytest.raises(ConfigError, match=r"blockwise: needs compute capability 9\.0"):
        check_space(search(fp8["blockwise"], 8, ada).space)
    check_space(search(fp8["tensorwise"], 8, ada).space)
    with pytest.raises(ConfigError, match=r"FP8 needs compute capability 8\.9"):
        check_space(search(fp8["tensorwise"], 8, replace(ada, capability=(8, 0))).space)


def test_a_stage_in_the_middle_can_be_the_fullest(tmp_path: Path) -> None:
    """Dense layers first, then experts: stages 2 and 3 have most, neither an end nor the one beside it."""
    found = search(config(tmp_path, with_experts(tmp_path)), 64)
    experts = found.space.shapes.policy.experts
    assert experts is not None
    layers = (False,) * 3 + (True,) * 58
    shape = replace(found.space.shapes.policy, num_layers=61, experts=replace(experts, layers=layers))

    def heavy(shape: ModelShape, config: Config, world: int, rank: int, *rest: Any) -> RankNumbers:
        plain = count(shape, config, world, rank, *rest)
        here = [layer for chunk in range(4) for layer in layers_of(layers, plain.stage, 8, chunk, 4)]
        return replace(plain, memory=replace(plain.memory, weights=GIB * (10 * sum(here) + len(here))))

    whole = Search(replace(found.space, shapes=Shapes(shape, shape)), found.lengths, heavy)
    one = candidate(pipeline=8, virtual=4, expert=8, tokens=4096)
    every = [whole.numbers(one, stage) for stage in range(8)]
    fullest = whole.fullest(one)
    assert fullest == max(every, key=lambda numbers: numbers.memory.total)
    assert fullest.stage == 2
    # what the time is made of: a stage that is not counted is taken from one of its own kind
    for said, numbers in zip(whole._of_training(one), every, strict=True):
        assert said.memory.weights == numbers.memory.weights
