"""Files to store: what is kept and counted, the cache and its key, other processes, and failure."""

import json
import multiprocessing
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_templates import CHATML
from vocabularies import byte_level, metaspace_bpe, save, sentencepiece_model

from megadpo.config import BatchConfig, DataConfig
from megadpo.data import prepare as room
from megadpo.data import processes
from megadpo.data import store as store_room
from megadpo.data.batch import stream_tokens
from megadpo.data.kinds import Wanted
from megadpo.data.prepare import prepare, store_folder
from megadpo.data.store import GroupStore
from megadpo.data.tokenize import OVER_BUDGET, Limit
from megadpo.data.tokenizer import check_vocabulary, load_tokenizer
from megadpo.errors import ConfigError, DataError, MachineError, StorageError, TokenizerError

PAIRS = Wanted("pairs")
USER = {"role": "user", "content": "What is the answer?"}


def pair(number: int) -> dict[str, Any]:
    return {"prompt": f"The answer to {number}", "chosen": f" is {number}.", "rejected": " is all."}


def chat(number: int) -> dict[str, Any]:
    answer = {"role": "assistant", "content": f"The answer is {number}."}
    return {"prompt": [USER], "chosen": [answer], "rejected": [answer | {"content": "That is all."}]}


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def model(tmp_path: Path) -> str:
    return str(save(byte_level(), tmp_path / "model"))


@pytest.fixture
def data(tmp_path: Path) -> DataConfig:
    source = write(tmp_path / "pairs.jsonl", [pair(number) for number in range(40)])
    return DataConfig(train=(source,), cache_dir=str(tmp_path / "cache"), num_proc=1)


def left_over(data: DataConfig) -> list[str]:
    """What lies in the cache besides finished stores."""
    folders = Path(data.cache_dir).iterdir()
    return [path.name for path in folders if not (path / "store.json").is_file()]


def contents(store: GroupStore) -> list[Any]:
    groups = [store.group(number) for number in range(len(store))]
    return [(g.origin, g.prompt_ids.tolist(), [r.tolist() for r in g.response_ids]) for g in groups]


def test_prepare(data: DataConfig, model: str) -> None:
    store = prepare(data.train, data, model, PAIRS)
    assert len(store) == 40
    assert store.group(3).origin == "pairs.jsonl:4"
    assert store.report.rows_read == store.report.groups == 40
    assert store.report.template == "none"
    assert store.vocab_size == load_tokenizer(model, None).vocab_size
    assert left_over(data) == []


def test_second_time_nothing_is_done(data: DataConfig, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepare(data.train, data, model, PAIRS)
    monkeypatch.setattr(processes, "tokenize_group", None)
    again = prepare(data.train, data, model, PAIRS)
    assert (again.folder, again.digest) == (first.folder, first.digest)
    assert contents(again) == contents(first)


def test_what_is_dropped_is_counted_and_named(data: DataConfig, model: str, tmp_path: Path) -> None:
    same = pair(1) | {"rejected": " is 1."}
    null = pair(2) | {"chosen": None}
    inside = pair(3) | {"chosen": " is</s> 3"}
    rows = [pair(0), same, null, inside, pair(4), *[same] * 4]
    report = prepare((write(tmp_path / "odd.jsonl", rows),), data, model, PAIRS).report
    assert (report.rows_read, report.groups) == (9, 2)
    assert sorted(report.dropped.values()) == [1, 1, 5]
    assert report.examples["all responses are identical"] == ["odd.jsonl:2", "odd.jsonl:6", "odd.jsonl:7"]
    assert report.examples["`chosen` is null"] == ["odd.jsonl:3"]
    assert any("5 dropped: all responses are identical (odd.jsonl:2" in line for line in report.lines())


def test_truncation_and_boundaries_are_counted(data: DataConfig, model: str, tmp_path: Path) -> None:
    torn = pair(0) | {"prompt": "The little ca", "chosen": "t sat", "rejected": " x"}
    long = pair(1) | {"prompt": "The cat" * 40}
    longer = pair(2) | {"chosen": " The cat" * 60}
    source = write(tmp_path / "long.jsonl", [torn, long, longer])
    report = prepare((source,), replace(data, max_length=50), model, PAIRS).report
    assert (report.groups, report.truncated, report.responses_cut, report.boundary_splits) == (3, 2, 1, 1)
    dropped = prepare((source,), replace(data, max_length=50, truncation_mode="drop"), model, PAIRS).report
    assert dropped.dropped == {"longer than data.max_length": 2}


def test_no_group_is_over_a_given_budget(data: DataConfig, model: str, tmp_path: Path) -> None:
    """Cut or dropped by truncation_mode, counted and named, whatever the layout; far too small a budget is an error."""
    rows = [pair(number) for number in range(4)] + [pair(5) | {"prompt": "The cat" * 40}]
    source = (write(tmp_path / "long.jsonl", rows),)
    whole = prepare(source, data, model, PAIRS)
    usual = int(stream_tokens(whole, share=False)[:4].max())
    for share in (True, False):
        batch = BatchConfig(micro_batch_tokens=usual, share_prompt=share)
        cut = prepare(source, data, model, PAIRS, batch)
        assert stream_tokens(cut, share).max() <= usual < stream_tokens(whole, share).max()
        assert (len(cut), cut.report.over_budget, cut.report.responses_cut) == (5, 1, 0)
        assert any("batch.micro_batch_tokens" in line and "long.jsonl:5" in line for line in cut.report.lines())
    dropped = prepare(source, replace(data, truncation_mode="drop"), model, PAIRS, batch)
    assert (len(dropped), dropped.report.dropped) == (4, {OVER_BUDGET: 1})
    with pytest.raises(ConfigError, match=r"micro_batch_tokens = 4: 5 of 5 groups take more rows"):
        prepare(source, data, model, PAIRS, BatchConfig(micro_batch_tokens=4))


def test_conversations_name_their_template(data: DataConfig, model: str, tmp_path: Path) -> None:
    source = write(tmp_path / "chat.jsonl", [chat(1), chat(2)])
    assert prepare((source,), data, model, PAIRS).report.template == "ChatML, as the model has no template"
    (tmp_path / "mine.jinja").write_text(CHATML)
    given = replace(data, chat_template=str(tmp_path / "mine.jinja"))
    assert prepare((source,), given, model, PAIRS).report.template.endswith("mine.jinja")


def test_several_sources_in_their_order(data: DataConfig, model: str, tmp_path: Path) -> None:
    other = write(tmp_path / "chat.jsonl", [chat(1), chat(2)])
    store = prepare((other, *data.train), data, model, PAIRS)
    assert [store.group(number).origin for number in (0, 1, 2)] == [
        "chat.jsonl:1",
        "chat.jsonl:2",
        "pairs.jsonl:1",
    ]


# Real data -------------------------------------------------------------------------------------------------


def test_real_conversations(shared: Path, data: DataConfig) -> None:
    source = str(shared / "data" / "dpo_en_demo.json")
    model = str(shared / "models" / "stories260k")
    store = prepare((source,), replace(data, max_length=4096), model, PAIRS)
    assert len(store) + sum(store.report.dropped.values()) == 299
    assert len(store) > 290
    check_vocabulary(load_tokenizer(model, None), 512)
    for number in range(len(store)):
        group = store.group(number)
        assert group.prompt_ids[0] == 1
        assert np.count_nonzero(group.prompt_ids == 1) == 1
        for ids in group.response_ids:
            assert 1 <= len(ids) <= 4096 - len(group.prompt_ids)
            may_be_cut = len(ids) == 4096 - len(group.prompt_ids)
            ends = np.flatnonzero(ids == 2).tolist()
            assert ends == [len(ids) - 1] or (may_be_cut and not ends)
            assert max(ids.max(), group.prompt_ids.max()) < store.vocab_size


def test_bare_sentencepiece_gives_the_same_tokens(shared: Path, data: DataConfig, tmp_path: Path) -> None:
    """The model file alone, and a folder that holds nothing else, against the whole Hugging Face folder."""
    source = (str(shared / "data" / "stories_pairs_eval.jsonl"),)
    folder = shared / "models" / "stories260k"
    (tmp_path / "bare").mkdir()
    shutil.copy(folder / "tokenizer.model", tmp_path / "bare")
    digests = {
        prepare(source, replace(data, tokenizer=tokenizer), str(folder), PAIRS).digest
        for tokenizer in (None, str(folder / "tokenizer.model"), str(tmp_path / "bare"))
    }
    assert len(digests) == 1


# The cache key ---------------------------------------------------------------------------------------------


def key(data: DataConfig, model: str, wanted: Wanted = PAIRS) -> str:
    tokenizer = load_tokenizer(data.tokenizer or model, data.chat_template)
    return store_folder(data.train, data, Limit(data.max_length, data.truncation_mode), tokenizer, wanted).name


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def test_trap_14_one_change_changes_the_key(data: DataConfig, model: str, tmp_path: Path) -> None:
    template = tmp_path / "t.jinja"
    template.write_text(CHATML)
    data = replace(data, chat_template=str(template))
    keys = [key(data, model)]
    keys += [key(replace(data, max_length=1023), model), key(replace(data, truncation_mode="drop"), model)]
    keys += [key(replace(data, format="trl_standard"), model), key(data, model, Wanted("lists"))]
    keys += [key(data, model, replace(PAIRS, scores=True)), key(data, model, replace(PAIRS, body=True))]
    random = replace(PAIRS, convert="lists_to_pairs_best_random")
    keys += [key(data, model, random), key(data, model, replace(random, seed=1))]
    keys += [key(replace(data, train=data.train * 2), model)]
    template.write_text(CHATML + " ")
    keys.append(key(data, model))
    edit(Path(model) / "tokenizer_config.json", "{", "{ ")
    keys.append(key(data, model))
    edit(Path(data.train[0]), "The answer", "the answer")
    keys.append(key(data, model))
    assert len(set(keys)) == len(keys)


def test_trap_14_code_version_changes_the_key(data: DataConfig, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = key(data, model)
    monkeypatch.setattr(room, "RULES", room.RULES + 1)
    assert key(data, model) != before


def test_trap_14_template_in_the_tokenizer_changes_the_key(data: DataConfig, model: str) -> None:
    before = key(data, model)
    (Path(model) / "chat_template.jinja").write_text(CHATML)
    assert key(data, model) != before


def test_trap_14_nothing_else_changes_the_key(data: DataConfig, model: str, tmp_path: Path) -> None:
    before = key(data, model)
    assert key(data, model, replace(PAIRS, seed=1)) == before
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    shutil.copy(data.train[0], moved / "renamed.jsonl")
    shutil.copytree(model, moved / "copy")
    (moved / "copy" / "config.json").write_text('{"model_type": "llama"}')
    for same in (
        replace(data, num_proc=7),
        replace(data, cache_dir=str(moved)),
        replace(data, eval=("something.jsonl",)),
        replace(data, split="train"),
        replace(data, train=(str(moved / "renamed.jsonl"),)),
        replace(data, tokenizer=str(moved / "copy")),
    ):
        assert key(same, model) == before
    os.utime(data.train[0], (1, 1))
    assert key(data, model) == before


# Other processes -------------------------------------------------------------------------------------------


def test_processes_give_what_one_gives(data: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = str(sentencepiece_model(tmp_path / "m.model"))  # loads sooner than transformers
    monkeypatch.setattr(processes, "SMALL", 4)
    monkeypatch.setattr(processes, "CHUNK", 3)
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    seen: list[int] = []
    many = prepare(data.train, replace(data, num_proc=2), model, PAIRS, on_progress=seen.append)
    assert "TOKENIZERS_PARALLELISM" not in os.environ
    assert seen == [*range(3, 40, 3), 40]
    one = prepare(data.train, replace(data, cache_dir=data.cache_dir + "-one"), model, PAIRS)
    assert contents(many) == contents(one)
    assert many.digest == one.digest


def test_killed_process_is_reported(data: DataConfig, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "SMALL", 4)
    monkeypatch.setattr(processes, "_start_process", partial(os._exit, 9))
    with pytest.raises(MachineError, match=r"a tokenising process was killed.*lower data\.num_proc"):
        prepare(data.train, replace(data, num_proc=2), model, PAIRS)
    assert left_over(data) == []


def start(function: Callable[..., None], *arguments: object) -> Any:
    process = multiprocessing.get_context("fork").Process(target=function, args=arguments)
    process.start()
    return process


def prepare_when_told(data: DataConfig, model: str, barrier: Any) -> None:
    publish = room._publish

    def together(temporary: Path, folder: Path) -> None:
        barrier.wait(60)  # both have written all of theirs, and neither has given it its name
        publish(temporary, folder)

    room._publish = together
    store = prepare(data.train, data, model, PAIRS)
    os._exit(0 if len(store) == 40 else 1)


def test_two_preparers_at_once(data: DataConfig, model: str) -> None:
    barrier = multiprocessing.get_context("fork").Barrier(2)
    both = [start(prepare_when_told, data, model, barrier) for _ in range(2)]
    for process in both:
        process.join(120)
    assert [process.exitcode for process in both] == [0, 0]
    assert left_over(data) == []
    assert len(prepare(data.train, data, model, PAIRS)) == 40


# Failure ---------------------------------------------------------------------------------------------------


def test_nothing_left_is_an_error(data: DataConfig, model: str, tmp_path: Path) -> None:
    source = write(tmp_path / "same.jsonl", [pair(1) | {"rejected": " is 1."}] * 2)
    with pytest.raises(DataError) as caught:
        prepare((source,), data, model, PAIRS)
    assert "nothing to train on; 2 rows read as trl_standard, 0 groups kept" in str(caught.value)
    assert "2 dropped: all responses are identical (same.jsonl:1, same.jsonl:2)" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bad_line_leaves_nothing_behind(data: DataConfig, model: str, tmp_path: Path) -> None:
    source = write(tmp_path / "bad.jsonl", [pair(number) for number in range(300)])
    with open(source, "a") as file:
        file.write("{oops}\n")
    with pytest.raises(DataError, match=r"bad\.jsonl:301: not valid JSON"):
        prepare((source,), data, model, PAIRS)
    assert left_over(data) == []


def test_another_kind_names_what_would_do(data: DataConfig, model: str, tmp_path: Path) -> None:
    texts = (write(tmp_path / "texts.jsonl", [{"text": "The cat sat."}]),)
    assert len(prepare(texts, data, model, Wanted("demonstrations"))) == 1
    with pytest.raises(DataError, match=r"texts\.jsonl:1: .* demonstrations .*, but .* needs pairs .*; give oth"):
        prepare(texts, data, model, PAIRS)
    with pytest.raises(DataError, match=r"pairs\.jsonl:1: .* set data\.convert to pairs_to_demonstrations, or"):
        prepare(data.train, data, model, Wanted("demonstrations"))


def test_full_disk(data: DataConfig, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(groups: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store_room, "_record_batch", full)
    with pytest.raises(StorageError, match=r"cannot be written; the disk is full: free some space, or set data"):
        prepare(data.train, data, model, PAIRS)
    assert left_over(data) == []


def test_cache_dir_that_cannot_be(data: DataConfig, model: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written"):
        prepare(data.train, replace(data, cache_dir=str(tmp_path / "file" / "cache")), model, PAIRS)


def test_too_short_a_length(data: DataConfig, model: str) -> None:
    with pytest.raises(ConfigError, match=r"data\.max_length = 1: must be at least 2"):
        prepare(data.train, replace(data, max_length=1), model, PAIRS)


# Tokenizers ------------------------------------------------------------------------------------------------


def test_tokenizer_that_does_not_fit_the_model(model: str) -> None:
    tokenizer = load_tokenizer(model, None)
    check_vocabulary(tokenizer, tokenizer.vocab_size)
    with pytest.raises(TokenizerError, match=rf"ids up to {tokenizer.vocab_size - 1}, .* set data\.tokenizer"):
        check_vocabulary(tokenizer, tokenizer.vocab_size - 1)


def test_tokenizers_that_cannot_be_loaded(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"no such folder or \.model file"):
        load_tokenizer(str(tmp_path / "none"), None)
    with pytest.raises(TokenizerError, match=r"no tokenizer here .* set data\.tokenizer"):
        load_tokenizer(str(tmp_path), None)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerError, match="the tokenizer cannot be loaded"):
        load_tokenizer(str(tmp_path), None)
    (tmp_path / "bad.model").write_bytes(b"not a model")
    with pytest.raises(TokenizerError, match="not a sentencepiece model"):
        load_tokenizer(str(tmp_path / "bad.model"), None)
    with pytest.raises(TokenizerError, match="the tokenizer has no EOS"):
        load_tokenizer(str(save(byte_level(), tmp_path / "endless", eos=None)), None)


def test_code_in_the_folder_is_not_run(model: str, tmp_path: Path) -> None:
    config = json.loads((Path(model) / "tokenizer_config.json").read_text())
    config["auto_map"] = {"AutoTokenizer": ["mine.Mine", None]}
    config["tokenizer_class"] = "Mine"
    (Path(model) / "tokenizer_config.json").write_text(json.dumps(config))
    (Path(model) / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Mine: pass\n")
    with suppress(TokenizerError):  # loading without it is as good as refusing
        load_tokenizer(model, None)
    assert not (tmp_path / "ran").exists()


def test_where_the_template_comes_from(tmp_path: Path) -> None:
    folder = save(metaspace_bpe(legacy=False), tmp_path / "m", bos="<s>", unk="<unk>", adds_bos=True)
    assert "<|im_end|>" in load_tokenizer(str(folder), None).chat_template
    config = json.loads((folder / "tokenizer_config.json").read_text())
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    for entry, want in (("C", "C"), (named, "D")):
        (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": entry}))
        assert load_tokenizer(str(folder), None).chat_template == want
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": named[:1]}))
    with pytest.raises(TokenizerError, match="named tool_use, none of them `default`"):
        load_tokenizer(str(folder), None)
    (folder / "chat_template.jinja").write_text("J")
    assert load_tokenizer(str(folder), None).chat_template == "J"
    (tmp_path / "mine.jinja").write_text("M")
    assert load_tokenizer(str(folder), str(tmp_path / "mine.jinja")).chat_template == "M"


def test_chatml_where_im_end_is_no_token(model: str) -> None:
    """Then a turn ends with EOS, in the template too, so that it can be exported with the model."""
    template = load_tokenizer(model, None).chat_template
    assert "<|im_end|>" not in template
    assert "eos_token" in template
