"""`megadpo inspect --batch`: the drawing says what is in the packed batch, with and without colour."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from megadpo import cli
from megadpo.config.decode import load_config
from megadpo.data.kinds import Wanted
from megadpo.data.prepare import prepare
from megadpo.inspection import batch_text
from megadpo.observe.packed import Part, stream_text

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def run_file(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(
        f"run_dir: run\nmodel: {{path: {shared / 'models' / 'stories260k'}}}\n"
        f"data: {{train: {shared / 'data' / 'stories_pairs_eval.jsonl'}, cache_dir: cache}}\n"
        "batch: {global_batch_size: 8}\nparallel: {data_parallel_size: 2, pipeline_model_parallel_size: 2}\n"
    )
    return "run.yaml"


HEAD = re.compile(r"group (\d+) (\w+)  rows? (\d+)(?:-(\d+))?  positions? (\d+)(?:-(\d+))?  attends to (.*)")


def test_the_drawing_of_a_run(run_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", run_file, "--batch", "2:1", "--ids"]) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert lines[0] == "micro-batch 1 of step 2, data rank 0"
    heads = [match for line in lines if (match := HEAD.match(line))]
    assert [head[2] for head in heads] == ["prompt", "chosen", "rejected"] * (len(heads) // 3)
    assert [int(head[3]) for head in heads[1:]] == [int(head[4]) + 1 for head in heads[:-1]], "a row is missing"
    config = load_config(run_file, [])
    store = prepare(config.data.train, config.data, config.model.path, Wanted("pairs"))
    for prompt, chosen, rejected in zip(*[iter(heads)] * 3, strict=True):
        group = store.group(int(prompt[1]))
        assert (prompt[5], prompt[6]) == ("0", str(len(group.prompt_ids) - 2))
        assert prompt[7] == "attends to its own rows".removeprefix("attends to ")
        for head, ids in ((chosen, group.response_ids[0]), (rejected, group.response_ids[1])):
            assert head[5] == str(len(group.prompt_ids) - 1)
            assert head[7] == f"rows {prompt[3]}-{prompt[4]} and its own  {len(ids)} scored"
        first, *_, last = drawn(lines, chosen[0])
        token = group.response_ids[0]
        assert first.startswith(f"{chosen[5]} ")
        assert f":{group.prompt_ids[-1]}->" in first
        assert first.endswith(f":{token[0]}")
        assert last.endswith(f":{token[-1]}")
        assert "->" not in "".join(drawn(lines, prompt[0]))
    rows = int(re.search(r"^stream   (\d+) rows", out, re.MULTILINE)[1])
    padding = [line for line in lines if line.endswith("  padding")]
    assert (int(heads[-1][4]) + 1 < rows) == bool(padding)
    assert re.search(r"2 data-parallel ranks with \d+ micro-batches", out)
    assert "epoch    9 steps of 8 groups" in out
    assert "is not given" not in out
    alone = batch_text(load_config(run_file, ["parallel.data_parallel_size=null"]), "0", False, 80).plain
    assert "load imbalance of 1 data-parallel rank: 0.0%" in alone
    assert alone.endswith("parallel.data_parallel_size is not given: 1 is taken here")


def drawn(lines: list[str], head: str) -> list[str]:
    """The cells under a head line."""
    found = []
    for line in lines[lines.index(head) + 1 :]:
        if not line.startswith("  "):
            break
        found += re.split(r"  (?=\d)", line.strip())
    return found


def test_the_summary_counts(run_file: str) -> None:
    """Sharing off: prompts stand with their responses, nothing is saved, every number is of the batch itself."""
    texts = {
        share: batch_text(load_config(run_file, [f"batch.share_prompt={share}"]), "0", False, 80).plain
        for share in ("true", "false")
    }
    assert "prompts  stand once: " in texts["true"]
    assert "stand once per response (share_prompt: false)" in texts["false"]
    assert "chosen  rows 0-" in texts["false"]
    assert " 0 prompt tokens saved by sharing, 0.0% of" in texts["false"]
    saved, percent, without = re.search(r"(\d+) prompt .* sharing, ([\d.]+)% of the (\d+)", texts["true"]).groups()
    config = load_config(run_file, [])
    store = prepare(config.data.train, config.data, config.model.path, Wanted("pairs"))
    assert int(saved) == (store.prompt_lengths - 1).sum()
    assert int(without) == 2 * (store.prompt_lengths - 1).sum() + store.response_lengths.sum()
    assert float(percent) == pytest.approx(100 * int(saved) / int(without), abs=0.06)


@pytest.mark.parametrize(
    ("which", "expected"), [("99", "data rank 0 has the micro-batches 0 to"), ("10:0", "has the steps 1 to 9")]
)
def test_no_such_batch(run_file: str, capsys: pytest.CaptureFixture[str], which: str, expected: str) -> None:
    assert cli.main(["inspect", run_file, "--batch", which]) == 2
    assert expected in capsys.readouterr().err


def test_neither_ranks_nor_megatron_are_needed(run_file: str) -> None:
    code = (
        "import sys; from megadpo import cli\n"
        "assert cli.main(['inspect', 'run.yaml', '--batch', '0']) == 0\n"
        "assert 'megatron' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env={"PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr
    assert "\x1b[" not in done.stdout


def test_lines_are_as_wide_as_allowed_and_colour_adds_nothing_to_the_words() -> None:
    parts = [Part(7, "prompt", 0, 3, (0, 0)), Part(7, "chosen", 3, 5, (0, 3)), Part(9, "response", 5, 6, (5, 5))]
    text = stream_text(
        parts, [10, 11, 12, 13, 20, 99], [0, 1, 2, 3, 4, 0], {3: 20, 4: 2, 5: 8}, lambda token: f"t{token}\n", 30
    )
    assert text.plain.splitlines() == [
        "group 7 prompt  rows 0-2  positions 0-2  attends to its own rows",
        "  0 t10\\n  1 t11\\n  2 t12\\n",
        "group 7 chosen  rows 3-4  positions 3-4  attends to rows 0-2 and its own  2 scored",
        "  3 t13\\n->t20\\n",
        "  4 t20\\n->t2\\n",
        "group 9 response  row 5  position 0  attends to its own rows  1 scored",
        "  0 t99\\n->t8\\n",
    ]
    terminal = Console(force_terminal=True, color_system="standard", width=200)
    with terminal.capture() as capture:
        terminal.print(text)
    coloured = capture.get()
    assert "\x1b[" in coloured
    assert [line.rstrip() for line in re.sub(r"\x1b\[[\d;]*m", "", coloured).splitlines()] == text.plain.splitlines()
