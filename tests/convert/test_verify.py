"""--verify: it sees what is wrong, says where, and answers with the exit code; and stories260k through all of it."""

import json
import shutil
from pathlib import Path
from typing import Any

import families_table
import pytest
import torch
from distributed import run_ranks
from llamas import write
from test_adapters import adapter
from test_quantised import CASES as QUANTISED
from test_quantised import rewrite
from test_round_trip import STORIES
from test_to_checkpoint import same, weights
from transformers import AutoModelForCausalLM, GenerationConfig

from megadpo.cli import main
from megadpo.config import ModelConfig, ParallelConfig
from megadpo.convert.exporter import export_hf
from megadpo.convert.families import read_shape
from megadpo.convert.importer import load_hf
from megadpo.convert.to_checkpoint import import_hf
from megadpo.convert.verify import compare, positions, text_ids, transformers_logits
from megadpo.data.tokenizer import load_tokenizer
from megadpo.errors import ModelError


def test_positions_are_near_and_far() -> None:
    short, long = positions(6, 100)
    assert short == [0, 1, 2, 3, 4, 5]
    assert long == [0, 1, 2, 97, 98, 99]
    assert positions(4, 4) == [[0, 1, 2, 3]] * 2


def test_ids_of_a_text(shared: Path, tmp_path: Path) -> None:
    """Repeated to the length; random ones where there is no tokenizer."""
    folder = shared / "models" / STORIES
    once = load_tokenizer(str(folder), None).encode("Once upon a time", add_bos=True)
    assert text_ids(folder, 512, 2 * len(once) + 1, "Once upon a time") == [*once, *once, once[0]]
    assert len(set(text_ids(tmp_path, 97, 50))) > 20
    assert max(text_ids(tmp_path, 97, 50)) < 97


def test_compare_says_how_much_and_where() -> None:
    theirs, ours = torch.zeros(3, 5), torch.zeros(3, 5)
    ours[1, 4] = 0.25
    found = compare(theirs, ours, [0, 7, 9])
    assert (found.logit, found.position, found.token) == (0.25, 7, 4)
    assert found.nats == pytest.approx(0.25 - torch.logsumexp(ours[1], 0).item() + torch.tensor(5.0).log().item())
    ours[2, 0] = float("nan")
    assert compare(theirs, ours, [0, 7, 9]).logit == float("inf")
    with pytest.raises(ModelError, match="another vocabulary"):
        compare(theirs, torch.zeros(3, 6), [0, 1, 2])


def verify(device: torch.device, *arguments: str) -> int:
    """A command in a process of its own, as it makes a process group."""
    torch.distributed.destroy_process_group()
    code = main(arguments)
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    return code


def test_import_and_export_are_verified(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Positions inside and past the 16 that the rotary scaling was made from, up to the model's last."""
    source = write("llama3", tmp_path / "source")
    [code] = run_ranks(1, verify, "import", str(source), str(tmp_path / "in"), "--verify", "--dtype", "bfloat16")
    out = capfd.readouterr().out
    assert code == 0, out
    assert "short positions (0 to 255, 256 tokens)" in out
    assert "verify     equal: largest difference" in out
    assert "tolerance 1e-04" in out
    [code] = run_ranks(1, verify, "export", str(tmp_path / "in"), str(tmp_path / "out"), "--verify")
    assert code == 0, capfd.readouterr().out
    assert {x.dtype for x in weights(tmp_path / "out").values()} == {torch.float32}  # as config.json says
    assert "converted from | `source` (digest `" in (tmp_path / "out" / "README.md").read_text()
    lora = adapter(tmp_path / "lora", source)
    [code] = run_ranks(1, verify, "import", str(source), str(tmp_path / "merged"), "--adapter", str(lora), "--verify")
    assert code == 0, capfd.readouterr().out


def changed_table(device: torch.device, source: Path, out: Path) -> int:
    """An import by a table with gate and up exchanged: the mistake is in what is written."""
    from dataclasses import replace

    from megadpo.convert import families

    llama = families.FAMILIES[0]
    rows = llama.weights
    swapped = [
        replace(x, hf=x.hf.replace("gate_proj", "?").replace("up_proj", "gate_proj").replace("?", "up_proj"))
        for x in rows
    ]
    families.FAMILIES = (replace(llama, weights=tuple(swapped)),)
    return verify(device, "import", str(source), str(out), "--verify")


def test_a_wrong_conversion_is_found(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source = write("llama3", tmp_path / "source")
    [code] = run_ranks(1, changed_table, source, tmp_path / "out")
    out = capfd.readouterr().out
    assert code == 1
    assert "verify     NOT EQUAL: largest difference" in out


def test_long_positions_are_looked_at(tmp_path: Path) -> None:
    """A rotary scaling that differs moves the far positions; the comparison sees it there."""
    source = write("llama3", tmp_path / "source")
    other = Path(shutil.copytree(source, tmp_path / "other"))
    config = json.loads((other / "config.json").read_text())
    config["rope_parameters"]["factor"] = 5.0
    (other / "config.json").write_text(json.dumps(config))
    where = positions(32, 256)
    ids = text_ids(source, 128, 32)
    one, two = transformers_logits(source, ids, where), transformers_logits(other, ids, where)
    assert compare(one[1], two[1], where[1]).logit > 1e-2
    assert compare(one[1], two[1], where[1]).position > 200


def test_what_transformers_cannot_compute_is_said_in_a_line(tmp_path: Path) -> None:
    source = families_table.write("mixtral", tmp_path, sliding_window=0)
    with pytest.raises(ModelError, match="transformers cannot compute it: ") as error:
        transformers_logits(source, [1, 2, 3], [[0, 1, 2]])
    assert "\n" not in str(error.value)


def test_quantised_folders_are_verified(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Sides that the blocks do not divide, which transformers itself does not load. It computes with the meaning."""
    for name, (quantise, changes) in QUANTISED.items():
        source = families_table.write(name, tmp_path / name, **changes)
        plain = families_table.write(name, tmp_path / f"{name}-plain", **changes)
        rewrite(plain, quantise(source))
        ids, where = text_ids(source, 101, 20), positions(20, 256)
        for one, other in zip(*(transformers_logits(x, ids, where) for x in (source, plain)), strict=True):
            # not to the bit: the order of sums depends on how a matrix lies in memory
            assert compare(one, other, range(20)).logit < 1e-5
        [code] = run_ranks(1, verify, "import", str(source), str(tmp_path / f"{name}-in"), "--verify")
        assert code == 0, capfd.readouterr().out


# ---- stories260k

PROMPT, NEW = "Once upon a time, there was a little", 200


@torch.no_grad()
def greedy(device: torch.device, folder: Path, prompt: list[int]) -> list[int]:
    """The prompt and NEW more tokens, each the likeliest after all before it."""
    from megadpo.model.build import build_chunks
    from megadpo.model.logits import text_logits
    from megadpo.parallel.context import grid

    shape, ids = read_shape(folder), list(prompt)
    with grid(ParallelConfig(), device, seed=0) as context:
        [policy] = build_chunks(shape, ParallelConfig(), context, ModelConfig("", "float32"))
        load_hf([policy], shape, folder)
        for _ in range(NEW):
            ids.append(int(text_logits(policy, ids, context)[-1].argmax()))
    return ids


def test_stories_are_told_token_by_token_as_transformers_tells_them(shared: Path, tmp_path: Path) -> None:
    """HF -> import -> export is bit-equal, and 200 greedy tokens from the imported folder are transformers'."""
    source = shared / "models" / STORIES
    import_hf(source, tmp_path / "in")
    export_hf(tmp_path / "in", tmp_path / "in", tmp_path / "out")
    assert same(weights(tmp_path / "out"), weights(source))
    for file in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json"):
        assert (tmp_path / "out" / file).read_bytes() == (source / file).read_bytes()
    prompt = text_ids(source, 512, 9, PROMPT)
    [ours] = run_ranks(1, greedy, tmp_path / "in", prompt)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    settings = GenerationConfig(max_new_tokens=NEW, do_sample=False, pad_token_id=0, bos_token_id=1)
    theirs = model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, 9), generation_config=settings)
    assert len(ours) == 9 + NEW
    assert ours == theirs[0].tolist()


@torch.no_grad()
def logits_of(device: torch.device, folders: dict[str, Path], texts: dict[str, Any]) -> dict[str, list[torch.Tensor]]:
    from megadpo.model.build import build_chunks
    from megadpo.model.logits import text_logits
    from megadpo.parallel.context import grid

    found = {}
    with grid(ParallelConfig(), device, seed=0) as context:
        for name, folder in folders.items():
            shape = read_shape(folder)
            [policy] = build_chunks(shape, ParallelConfig(), context, ModelConfig("", "float32"))
            load_hf([policy], shape, folder)
            ids, where = texts[name]
            found[name] = [text_logits(policy, ids, context, at) for at in where]
    return found


def test_every_family_near_and_far(tmp_path: Path) -> None:
    """HF -> import -> export is bit-equal for every family, and the imported model computes what transformers does at
    its first and at its last positions."""
    sources = {name: families_table.write(name, tmp_path / name) for name in families_table.ROWS}
    imported, texts = {}, {}
    for name, source in sources.items():
        imported[name] = tmp_path / f"{name}-in"
        import_hf(source, imported[name])
        export_hf(imported[name], imported[name], tmp_path / f"{name}-out")
        assert same(weights(tmp_path / f"{name}-out"), weights(source))
        assert (tmp_path / f"{name}-out" / "config.json").read_bytes() == (source / "config.json").read_bytes()
        shape = read_shape(source)
        count = min(40, shape.max_position_embeddings)
        texts[name] = text_ids(source, shape.vocab_size, count), positions(count, shape.max_position_embeddings)
    [ours] = run_ranks(1, logits_of, imported, texts)
    for name, (ids, where) in texts.items():
        theirs = transformers_logits(sources[name], ids, where)
        for one, other, at in zip(theirs, ours[name], where, strict=True):
            assert compare(one, other, at).logit < 1e-4, (name, at[-1])
