"""`megadpo plan` as its user sees it: table, JSON, picture, settings; lengths of the data; mistakes."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import counted
import numpy as np
import pytest
import yaml
from situations import SHAPES, config, run_file
from tiny import random_groups

from megadpo import cli
from megadpo.config.decode import load_config
from megadpo.convert.families import read_shape
from megadpo.errors import ConfigError
from megadpo.observe.gpus import GIB, GPUS
from megadpo.plan import command, picture, report
from megadpo.plan.gpu_option import assumed as gpu_assumed
from megadpo.plan.gpu_option import parse_gpu
from megadpo.plan.search import Found
from megadpo.plan.workload import Assumed, assumed, of_store, work

SHAPE = read_shape(SHAPES / "llama3.1-8b")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> report.Report:
    given = config(tmp_path_factory.mktemp("plan"), batch={"global_batch_size": 64})
    return command.plan(given, command.Request(8, "h100-80gb", price=2.0, rows=6), counted.count)


def test_text(made: report.Report) -> None:
    lines = report.text(made)
    assert "Estimated, not measured." in lines[0]
    assert any("assumed: 60000 groups of 2 responses" in line for line in lines)
    head = next(line for line in lines if "tok/s/GPU" in line and "assumed" not in line)
    assert head.split()[-1] == "cost"
    best = lines[lines.index(head) + 1].split()
    assert best[0] == "1"
    plan = made.found.plans[0]
    assert float(best[-1]) == pytest.approx(plan.gpu_hours * 2.0, rel=0.01)
    assert f"{len(made.found.rejected)} do not" in "\n".join(lines)
    assert max(len(line) for line in lines if not line.startswith("  ")) < 150


def test_settings_are_a_run_file(made: report.Report, tmp_path: Path) -> None:
    plan = made.found.plans[0]
    lines = report.settings(plan)
    base = yaml.safe_load(run_file(tmp_path).read_text())
    for name, section in yaml.safe_load("\n".join(lines[1:])).items():
        base[name] = base.get(name, {}) | section
    path = tmp_path / "pasted.yaml"
    path.write_text(yaml.safe_dump(base))
    pasted = load_config(path, [])
    assert pasted.parallel.tensor_model_parallel_size == plan.candidate.tensor
    assert pasted.parallel.pipeline_model_parallel_size == plan.candidate.pipeline
    assert pasted.parallel.sequence_parallel == plan.candidate.sequence
    assert pasted.batch.micro_batch_tokens == plan.candidate.tokens
    assert pasted.model.recompute == plan.candidate.recompute


GRID = {"tensor": int, "pipeline": int, "virtual": (int, type(None)), "data": int, "expert": int, "sequence": bool}
GRID |= {"tokens": int, "recompute": str, "reference": str}
ROW: dict[str, Any] = {
    "grid": GRID,
    "parts": dict,
    "memory": dict,
    "memory_exact": bool,
    "fullest_stage": int,
    "parameters": int,
}
ROW |= {name: float for name in ("step_seconds", "update_seconds", "mfu", "pairs_per_second", "padding", "hours")}
ROW |= {"tokens_per_second_per_gpu": float, "micro_batches": int, "steps": int, "gpu_hours": float, "cost": float}
WHOLE: dict[str, Any] = {"model": str, "gpus": int, "gpu": dict, "usable_memory": int, "measured": bool, "price": float}
WHOLE |= {"assumptions": list, "considered": int, "dominated": int, "grids": list, "rejected": list}


def has(value: dict[str, Any], schema: dict[str, Any]) -> None:
    assert value.keys() == schema.keys()
    for name, kind in schema.items():
        if isinstance(kind, dict):
            has(value[name], kind)
        else:
            assert isinstance(value[name], kind), (name, value[name])


def test_json(made: report.Report) -> None:
    tree = json.loads(json.dumps(report.as_json(made)))
    has(tree, WHOLE)
    assert tree["measured"] is False
    assert len(tree["grids"]) == min(6, len(made.found.best))
    for row in tree["grids"]:
        has(row, ROW)
        assert sum(row["parts"].values()) == pytest.approx(row["step_seconds"])
        assert sum(row["memory"].values()) == 2 * row["memory"]["total"]
        assert row["memory"]["total"] <= tree["usable_memory"]
    for one in tree["rejected"]:
        has(one, {"reason": str, "count": int, "example": GRID})
    assert sum(one["count"] for one in tree["rejected"]) >= len(made.found.rejected)


def test_picture(made: report.Report) -> None:
    root = ElementTree.fromstring(picture.svg(made))
    name = "{http://www.w3.org/2000/svg}"
    bars = [rect for rect in root.iter(f"{name}rect") if rect.find(f"{name}title") is not None]
    plan = made.shown[0]
    parts = sum(1 for value in [*vars(plan.estimate.parts).values(), *vars(plan.memory).values()] if value > 0)
    assert len(bars) >= parts
    width = float(root.attrib["width"])
    assert all(0 <= float(bar.attrib["x"]) + float(bar.attrib["width"]) <= width for bar in bars)
    assert "not measured" in "".join(root.itertext())


def test_nothing_fits(tmp_path: Path) -> None:
    given = config(tmp_path, "llama3.1-405b")
    found = command.plan(given, command.Request(8, "h100-80gb"), counted.count)
    assert "no grid is left" in report.text(found)
    assert any("does not fit: needs" in line for line in report.text(found))
    ElementTree.fromstring(picture.svg(found))


def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("megadpo.plan.profile.rank_numbers", counted.count)
    path, target = str(run_file(tmp_path)), tmp_path / "deep" / "plan.svg"
    arguments = ["plan", path, "--gpus", "8", "--gpu", "h200", "batch.global_batch_size=32", "--svg", str(target)]
    assert cli.main([*arguments, "--json", "--groups", "1000", "--prompt-tokens", "100"]) == 0
    tree = json.loads(capsys.readouterr().out)
    assert tree["grids"][0]["steps"] == 32
    assert "prompts of 100 and responses of 350 tokens on average" in tree["assumptions"][0]
    ElementTree.parse(target)
    assert cli.main([*arguments, "--json", "--spread", "0.3", "model.cuda_graphs=[mlp]"]) == 0
    graphed = json.loads(capsys.readouterr().out)
    assert "spread 0.3" in graphed["assumptions"][0]
    assert graphed["assumptions"][1].startswith("the memory that CUDA graphs hold is counted, ")
    assert cli.main(["plan", path, "--gpus", "8", "--gpu", "h300"]) == 2
    assert "did you mean h200?" in capsys.readouterr().err
    assert cli.main(["plan", path, "--gpus", "8", "--gpu", "memory=1GiB,bf16=1e12", "--top", "3"]) == 1
    assert "no grid is left" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("h100-80g", "did you mean h100-80gb"),
        ("tpu", "There are a100-80gb"),
        ("memory=80GiB", "bf16 missing"),
        ("memory=80GiB,bf16=fast", "must be a number over 0"),
        ("memory=80GiB,bf16=-1", "must be a number over 0"),
        ("memory=80GiB,bf61=1e15", "did you mean bf16"),
        ("memory=80GiB,,bf16=1e15", "Numbers are memory="),
        ("memory=80GiB,bf16=1e15,per_node=0.5", "per_node=0.5: must be a whole number of GPUs"),
    ],
)
def test_gpus_that_are_none(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as raised:
        parse_gpu(text)
    assert "\n" not in str(raised.value)


def test_gpus() -> None:
    assert parse_gpu("H100") is GPUS["h100-80gb"]
    assert parse_gpu("b200") is GPUS["b200"]
    own = parse_gpu("memory=96GiB, bf16=500e12,network=1e11,per_node=4")
    assert (own.memory, own.bf16_flops, own.network_bandwidth, own.per_node) == (96 * GIB, 5e14, 1e11, 4)
    assert own.fp8_flops is None
    assert own.memory_bandwidth == GPUS["h100-80gb"].memory_bandwidth
    assert (
        "bandwidth, link of the GPU as of h100-80gb" in gpu_assumed("memory=96GiB,bf16=5e14,network=1e11,per_node=4")[0]
    )
    assert parse_gpu("memory=80e9,bf16=1e15").memory == 80_000_000_000
    assert parse_gpu("memory=96GiB,bf16=5e14,fp8=1e15,capability=8.9").capability == (8, 9)
    assert (
        "capability of the GPU as of"
        in gpu_assumed("memory=1GiB,bf16=1,fp8=1,bandwidth=1,link=1,network=1,per_node=1")[0]
    )


def test_bad_data_flags(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--spread 9: must be 0"):
        command.data_of(config(tmp_path), command.Request(8, "h100-80gb", spread=9), SHAPE)
    with pytest.raises(ConfigError, match="--prompt-tokens -3: must be over 0"):
        command.data_of(config(tmp_path), command.Request(8, "h100-80gb", prompt_tokens=-3), SHAPE)


def test_assumed_lengths() -> None:
    data = Assumed(5000, 2, 200, 300)
    lengths = assumed(data, 100_000, share=True, shape=SHAPE)
    assert lengths.groups == 5000
    assert lengths.rows_G.mean() == pytest.approx(200 - 1 + 2 * 300, rel=0.03)
    assert lengths.scored_G.mean() == pytest.approx(600, rel=0.03)
    assert assumed(data, 100_000, share=False, shape=SHAPE).rows_G.mean() == pytest.approx(2 * 199 + 600, rel=0.03)
    cut = assumed(data, 512, share=True, shape=SHAPE, most_rows=700)
    assert cut.longest <= 700
    flat = assumed(Assumed(10, 2, 200, 300, 0.0), 1024, share=True, shape=SHAPE)
    assert set(flat.rows_G) == {799}


def test_lengths_of_a_store() -> None:
    store = random_groups(200)
    lengths = of_store(store, share=True, shape=SHAPE)
    assert lengths.groups == 200
    assert int(lengths.scored_G.sum()) == int(store.response_lengths.sum())
    done = work(lengths, 64, 2, 64, None, 1)
    assert 0 <= done.padding < 1
    assert done.mean_rows * done.micro_batches * 2 == pytest.approx(64 * lengths.rows_G.mean(), rel=0.15)
    assert done.most_area >= done.mean_area
    assert work(lengths, 64, 2, 64, None, 4).micro_batches % 4 == 0


def test_work_has_all_rows() -> None:
    """Rows, padding included, are those of the streams; nothing is lost where ranks have nothing to do."""
    lengths = assumed(Assumed(100, 2, 50, 50, 0.0), 512, share=True, shape=SHAPE)
    done = work(lengths, 4, 16, 1024, None, 1)
    assert done.micro_batches == 1
    assert done.mean_rows == pytest.approx(4 * 149 / 16)
    assert done.padding == pytest.approx(1 - 4 * 149 / 16 / 1024)
    assert done.most_area == pytest.approx(float(np.max(lengths.area_G)))


def test_prepared_data_is_looked_at(shared: Path, tmp_path: Path) -> None:
    from megadpo.data.kinds import wanted
    from megadpo.data.prepare import prepare

    sections = {"data": {"train": str(shared / "data" / "stories_pairs_train.jsonl"), "cache_dir": str(tmp_path)}}
    given = config(tmp_path, shared / "models" / "stories260k", **sections)
    request = command.Request(8, "h100-80gb")
    _, before = command.data_of(given, request, SHAPE)
    assert "not prepared yet" in before[0]
    store = prepare(given.data.train, given.data, given.model.path, wanted(given), given.batch)
    lengths, after = command.data_of(given, request, SHAPE)
    assert lengths.groups == len(store)
    assert str(store.folder) in after[0]
    _, asked = command.data_of(given, command.Request(8, "h100-80gb", groups=7), SHAPE)
    assert "7 groups" in asked[0]


def test_shapes_are_config_json_only() -> None:
    for folder in SHAPES.iterdir():
        assert [file.name for file in folder.iterdir()] == ["config.json"]


def test_fp8s_memory_is_said_to_be_from_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    request = command.Request(8, "h100-80gb", rows=1)
    monkeypatch.setattr(command.Search, "run", lambda self, **more: Found((), (), 0, 0))
    for fp8 in (None, "hybrid"):
        given = config(tmp_path)
        given = replace(given, model=replace(given.model, fp8_format=fp8))
        said = command.plan(given, request, counted.count).assumptions
        assert any("FP8's memory" in line for line in said) == (fp8 is not None)
