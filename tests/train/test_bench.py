"""megadpo bench: parts that sum to the step, waiting told from communication, and what the command line gives."""

import io
import json
import multiprocessing
import os
import re
import socket
import subprocess
import sys
import time
from contextlib import redirect_stderr
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks
from tiny import write_llama

from megadpo import cli
from megadpo.config import Config, DataConfig, ModelConfig, ParallelConfig
from megadpo.convert.families import read_shape
from megadpo.data.kinds import Wanted
from megadpo.data.packing import Budget
from megadpo.data.synthetic import Lengths, random_groups, write_store
from megadpo.errors import ConfigError, StorageError
from megadpo.model.build import build_chunks
from megadpo.model.drawn import draw_weights
from megadpo.objectives.reference_free import SimPO
from megadpo.observe import parts as parts_module
from megadpo.observe.parts import PARTS, Parts
from megadpo.parallel.calls import waited, watched
from megadpo.parallel.context import grid
from megadpo.sweep import combinations, reason
from megadpo.train.bench_report import batch_text, check_table, grid_text, objective_text, precision_text

LLAMA = read_shape(Path(__file__).resolve().parents[2] / "launch" / "recipes" / "shapes" / "llama3.1-8b")
ROOT = Path(__file__).resolve().parents[2]
SLEEP = 0.5


def test_every_moment_belongs_to_one_part(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 3.0, 7.0, 15.0, 31.0, 63.0, 127.0])
    monkeypatch.setattr(parts_module.time, "perf_counter", lambda: next(clock))
    parts = Parts(torch.device("cpu"))
    parts.enter("optimizer")  # before the first step: not counted
    parts.leave()
    parts.step()
    with parts.part("backward"), parts.part("communication", call=5):
        pass
    parts.step()
    times = parts.read()
    assert times.parts == dict.fromkeys(PARTS, 0.0) | {
        "other": 4.0 + 64.0,
        "backward": 8.0 + 32.0,
        "communication": 16.0,
    }
    assert times.steps == [124.0]
    assert sum(times.parts.values()) == sum(times.steps)
    assert times.calls == {5: 16.0}


def late(device: torch.device) -> dict[str, Any]:
    """Rank 1 comes late to a collective, and then rank 0 to a message."""
    rank, parts = dist.get_rank(), Parts(device)
    dist.barrier()
    before = dist.ProcessGroup.allreduce
    with watched(parts) as calls:
        parts.step()
        if rank == 1:
            time.sleep(SLEEP)
        dist.all_reduce(torch.ones(4))
        if rank == 0:
            time.sleep(SLEEP)
            dist.send(torch.ones(2), 1)
        else:
            dist.recv(torch.empty(2), 0)
        work = dist.all_reduce(torch.ones(4), async_op=True)
        time.sleep(SLEEP)  # a collective that others' work hides
        work.wait()
        parts.step()
    times = parts.read()
    spent = waited(calls, times.calls, dist.group.WORLD)
    dist.all_reduce(torch.ones(4))  # as before, and not seen
    return {
        "waited": spent,
        "communication": times.parts["communication"],
        "other": times.parts["other"],
        "restored": dist.ProcessGroup.allreduce is before,
        "collectives": sum(len(numbers) for numbers in calls.collectives.values()),
    }


def test_who_comes_first_waits() -> None:
    """Each rank waits once for the other, and computes meanwhile what it computes."""
    for found in run_ranks(2, late):
        assert found["collectives"] == 2
        assert found["restored"]
        assert 0.8 * SLEEP < found["waited"] <= found["communication"]
        # the hidden collective is not in it: else there would be twice as much
        assert found["communication"] < 2 * SLEEP
        assert found["other"] > 1.9 * SLEEP


def drawn(device: torch.device, folder: Path, parallel: ParallelConfig) -> dict[str, torch.Tensor]:
    shape = read_shape(folder)
    with grid(parallel, device, seed=0) as context:
        chunks = build_chunks(shape, parallel, context, ModelConfig("", "float32"))
        draw_weights(chunks, shape, 3, context)
        return {name: p.detach().clone() for name, p in chunks[0].named_parameters()}


def test_drawn_weights_are_the_same_on_replicas_only(tmp_path: Path) -> None:
    folder = write_llama(tmp_path, tied=True)
    one, two = run_ranks(2, drawn, folder, ParallelConfig())
    assert all(torch.equal(one[name], two[name]) for name in one)
    split = "decoder.layers.0.self_attention.linear_qkv.weight"
    assert 0.018 < float(one[split].std()) < 0.022
    assert (one["decoder.final_layernorm.weight"] == 1).all()
    one, two = run_ranks(2, drawn, folder, ParallelConfig(tensor_model_parallel_size=2))
    assert not torch.equal(one[split], two[split])
    assert torch.equal(one["decoder.final_layernorm.weight"], two["decoder.final_layernorm.weight"])
    one, two = run_ranks(2, drawn, folder, ParallelConfig(pipeline_model_parallel_size=2))
    assert torch.equal(one["embedding.word_embeddings.weight"], two["output_layer.weight"])


def test_random_groups_have_the_lengths_that_were_asked_for(tmp_path: Path) -> None:
    lengths = Lengths(prompt=64, response=32, spread=0.5, most=256)
    groups = random_groups(400, lengths, 100, 0, Wanted("pairs"))
    prompts = [len(group.prompt_ids) for group in groups]
    answers = [len(ids) for group in groups for ids in group.response_ids]
    assert np.mean(prompts) == pytest.approx(64, rel=0.1)
    assert np.mean(answers) == pytest.approx(32, rel=0.1)
    assert np.std(np.log(prompts)) == pytest.approx(0.5, rel=0.1)
    assert max(p + max(map(len, g.response_ids)) for p, g in zip(prompts, groups, strict=True)) <= 256
    even = random_groups(3, Lengths(64, 32, 0.0, 256), 100, 0, Wanted("pairs"))
    assert {(len(group.prompt_ids), *map(len, group.response_ids)) for group in even} == {(64, 32, 32)}
    unpaired = random_groups(4, lengths, 100, 0, Wanted("unpaired", body=True))
    store = write_store(tmp_path, unpaired, 100)
    assert store.labels_S is not None
    assert store.labels_S.tolist() == [True, False, True, False]
    assert store.bodies


# The command -------------------------------------------------------------------------------------------------


@pytest.fixture
def run_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'kernels'}")
    write_llama(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()  # config.json is enough
    file = tmp_path / "run.yaml"
    file.write_text(
        f"run_dir: {tmp_path}/run\nmodel: {{path: {tmp_path}/model, dtype: float32}}\n"
        f"data: {{train: nowhere.jsonl, max_length: 64, cache_dir: {tmp_path}/cache}}\n"
        "batch: {global_batch_size: 4}\n"
    )
    return file


RANDOM = ("--synthetic", "--prompt", "12", "--response", "8", "--steps", "3", "--warm-up", "1")


def bench(capfd: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert cli.main(["bench", *arguments, "--json"]) == 0
    found: dict[str, Any] = json.loads(capfd.readouterr().out)  # nothing else on standard output
    return found


def test_parts_sum_to_the_step_on_every_rank(run_file: Path, capfd: pytest.CaptureFixture[str]) -> None:
    found = bench(
        capfd, str(run_file), *RANDOM, "parallel.pipeline_model_parallel_size=2", "--append", "rows.md",
        "--trace", "trace.json",
    )  # fmt: skip
    first, last = found["ranks"]
    for rank in (first, last):
        assert sum(rank["parts"].values()) == pytest.approx(rank["step_seconds"], rel=1e-9)
        for part in ("data", "forward", "backward", "optimizer", "communication", "other"):
            assert rank["parts"][part] > 0, part
        assert rank["parts"]["reference"] == 0
        assert rank["peak_memory"] > 2**26
    assert (first["stage"], last["stage"]) == (0, 1)
    assert first["parts"]["head"] == 0 < last["parts"]["head"]
    assert first["parts"]["waiting"] > 0
    assert len(found["records"]) == found["steps"] == 3
    for record in found["records"]:
        assert record["tokens_per_second"] * record["seconds"] == pytest.approx(record["num_tokens"])
        assert record["seconds"] >= max(rank["step_seconds"] for rank in found["ranks"]) / 3
    assert found["seconds_lowest"] <= found["seconds"] <= found["seconds_highest"]
    assert found["reference_ahead_seconds"] > 0
    assert "perf/mfu" not in found  # no peak of a CPU is made up
    assert found["perf/tflops_per_gpu"] > 0
    # nothing in the run folder but logs
    assert not [path for path in Path("run").rglob("*") if path.is_file() and path.parent.name != "logs"]
    for rank in (0, 1):
        events = json.loads(Path(f"trace-{rank}.json").read_text())["traceEvents"]
        assert {"megadpo: forward", "megadpo: backward", "megadpo: optimizer"} <= {e.get("name") for e in events}
    bench(capfd, str(run_file), *RANDOM, "--append", "rows.md", "reference.mode=resident")
    lines = Path("rows.md").read_text().splitlines()
    rows = [line for line in lines if line.startswith("| 20")]
    assert len(rows) == 2
    assert sum(line.startswith("| date |") for line in lines) == 1
    assert len({line.count(" | ") for line in lines if line.startswith("| ")}) == 1
    assert "reference.mode=resident" in rows[1]
    assert "reference " in rows[1]


def test_a_sweep_has_a_row_for_what_failed(
    run_file: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What fails is refused in this process: a further one would import everything to say the same."""
    run = subprocess.run

    def refused_here(command: list[str], **more: Any) -> Any:
        if "parallel.tensor_model_parallel_size=0" not in command:
            return run(command, **more)
        with redirect_stderr(io.StringIO()) as said:
            code = cli.main(command[3:])
        return subprocess.CompletedProcess(command, code, "", said.getvalue())

    monkeypatch.setattr(subprocess, "run", refused_here)
    sweep = ("--sweep", "parallel.tensor_model_parallel_size=1,0", "batch.micro_batch_tokens=80")
    assert cli.main(["bench", str(run_file), *RANDOM, *sweep]) == 0
    head, _, good, bad = capfd.readouterr().out.splitlines()
    assert head.startswith("| settings | s per step |")
    settings = "parallel.tensor_model_parallel_size=1 batch.micro_batch_tokens=80"
    assert re.match(rf"\| {re.escape(settings)} \| \d+\.\d{{4}} \| \d", good)
    assert bad.startswith("| parallel.tensor_model_parallel_size=0 batch.micro_batch_tokens=80 | failed: ")
    assert "must be at least 1" in bad
    assert "; TP1 PP1 DP1, sharded optimizer; float32, recompute none; dpo, reference precomputed; " in good


def as_torchrun_starts(rank: int, port: int, arguments: list[str]) -> None:
    """One of two processes that `torchrun -m megadpo.cli` would start; what it says goes to a file."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in names.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
    os.dup2(os.open(f"said-{rank}", os.O_CREAT | os.O_WRONLY), 1)
    sys.exit(cli.main(arguments))


def test_under_torchrun(run_file: Path) -> None:
    """Two ranks that are data-parallel: one speaks and one writes the row, and both are in the table. (The real
    torchrun: tests/launch/test_join.py; here it would import everything twice more.)"""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = ["bench", str(run_file), *RANDOM, "--append", "rows.md", "--json"]
    fork: Any = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=as_torchrun_starts, args=(rank, port, arguments)) for rank in (0, 1)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
        assert process.exitcode == 0
    found = json.loads(Path("said-0").read_text())
    assert Path("said-1").read_text() == ""
    assert [(rank["rank"], rank["stage"]) for rank in found["ranks"]] == [(0, 0), (1, 0)]
    for rank in found["ranks"]:
        assert sum(rank["parts"].values()) == pytest.approx(rank["step_seconds"], rel=1e-9)
    assert found["grid"] == "TP1 PP1 DP2, sharded optimizer"
    assert "2 processes" in found["device"]
    [row] = [line for line in Path("rows.md").read_text().splitlines() if line.startswith("| 20")]
    assert found["what"] in row


def test_what_two_rows_can_differ_in() -> None:
    """Every setting that makes a step another one is in the cell."""
    plain = Config("", ModelConfig("m"), DataConfig(("d",)))

    def cell(config: Config, world: int = 16) -> str:
        return "; ".join([
            grid_text(config.parallel, world, True), precision_text(config.model), objective_text(config, LLAMA),
            batch_text(config.batch, Budget(8192, config.batch.micro_batch_size), True),
        ])  # fmt: skip

    changes: dict[str, dict[str, Any]] = {
        "parallel": dict(
            tensor_model_parallel_size=2, pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2,
            expert_model_parallel_size=2, sequence_parallel=True, use_distributed_optimizer=False,
            overlap_grad_reduce=True, overlap_param_gather=True, tp_comm_overlap=True,
        ),
        "model": dict(
            dtype="float32", recompute="full", logprob_backend="triton", fp8_format="hybrid", cuda_graphs=("mlp",),
        ),
        "reference": dict(mode="swapped", fp8_weights=True, path="other"),
        "batch": dict(global_batch_size=8, micro_batch_size=3, share_prompt=False),
    }  # fmt: skip
    cells = [cell(plain), cell(plain, world=32)]
    for section, settings in changes.items():
        for name, value in settings.items():
            cells.append(cell(replace(plain, **{section: replace(getattr(plain, section), **{name: value})})))
    fp8 = replace(plain.model, fp8_format="hybrid")
    in_fp8: dict[str, Any] = {"fp8_format": "e4m3", "fp8_recipe": "blockwise", "fp8_emulation": True}
    in_fp8 |= {"fp8_param_gather": True, "first_last_layers_bf16": True}
    for name, value in in_fp8.items():
        cells.append(cell(replace(plain, model=replace(fp8, **{name: value}))))
    cells.append(cell(replace(plain, objective=SimPO())))
    # a setting that is new is either in the cell or on this list
    elsewhere = {"path", "num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16", "check_groups", "swap_steps"}
    elsewhere |= {"data_parallel_size", "overlap_p2p_comm", "micro_batch_tokens"}
    for section, settings in changes.items():
        names = {field.name for field in fields(getattr(plain, section))}
        assert names <= settings.keys() | in_fp8.keys() | elsewhere
    assert len(set(cells)) == len(cells)
    assert cells[0] == (
        "TP1 PP1 DP16 EP1, sharded optimizer; bfloat16, recompute none; dpo, reference precomputed; "
        "64 groups a step, micro-batches of 8192 rows"
    )


def test_a_table_of_another_kind_is_not_added_to(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("other.md").write_text("| date | speed |\n| --- | --- |\n")
    with pytest.raises(ConfigError, match="is no table of this version's rows"):
        check_table(Path("other.md"))
    check_table(Path("deep/new.md"))
    assert list(Path("deep").iterdir()) == []
    with pytest.raises(StorageError, match="set --append to another place"):
        check_table(Path("other.md/rows.md"))


def test_combinations_of_settings() -> None:
    assert combinations(["a=1,2", "b=x"]) == [("a=1", "b=x"), ("a=2", "b=x")]
    for wrong in ("a", "=1", "a=", "a=1,,2"):
        with pytest.raises(ConfigError, match="must be a setting and its values"):
            combinations([wrong])


def test_the_reason_is_one_line() -> None:
    lines = (
        "Traceback",
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB.",
        "megadpo: error: rank 0",
    )
    assert reason("\n".join(lines), 1) == "out of memory CUDA out of memory. Tried to allocate 2 GiB."
    assert reason("noise\nmegadpo: error: the grid does not fit\n", 2) == "the grid does not fit"
    assert reason("", 7) == "exit code 7, no word"


def test_mistakes_are_one_line(
    run_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*arguments: str) -> str:
        assert cli.main(["bench", str(run_file), *arguments]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        return said

    assert "must be a setting and its values" in refused("--sweep", "model.recompute")
    assert "--trace is of one setting" in refused("--sweep", "model.recompute=none", "--trace", "x")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "29999")
    assert "leave torchrun or srun out" in refused("--sweep", "model.recompute=none")
