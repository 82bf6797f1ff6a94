"""Every data-set form on small samples, how it is told from the others, and what is said of bad input."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megadpo.data.records import FORMATS, Dropped, Group, Turn, detect_format, read_groups
from megadpo.data.sources import read_rows, source_digest
from megadpo.errors import ConfigError, DataError

PAIR = {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}
USER = {"role": "user", "content": "What colour is the sky?"}
BLUE = {"role": "assistant", "content": "Blue."}
GREEN = {"role": "assistant", "content": "Green."}
QUESTION = (Turn("user", "What colour is the sky?"),)
ANSWERS = ((Turn("assistant", "Blue."),), (Turn("assistant", "Green."),))


def lines(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def groups(source: str, format: str = "auto", split: str | None = None) -> list[Group]:
    items = list(read_groups(source, split, format))
    assert not [item for item in items if isinstance(item, Dropped)]
    return [item for item in items if isinstance(item, Group)]


def only(tmp_path: Path, row: dict[str, Any], format: str = "auto") -> Group:
    return groups(lines(tmp_path / "one.jsonl", row), format)[0]


SAMPLES: dict[str, tuple[dict[str, Any], Any, Any]] = {
    "trl_standard": (PAIR | {"score": 3}, "The sky is", (" blue.", " green.")),
    "trl_standard_implicit": (
        {"chosen": "The sky is bluish.", "rejected": "The sky is blunt."},
        "The sky is",
        (" bluish.", " blunt."),
    ),
    "trl_conversational": ({"prompt": [USER], "chosen": [BLUE], "rejected": [GREEN]}, QUESTION, ANSWERS),
    "trl_conversational_implicit": ({"chosen": [USER, BLUE], "rejected": [USER, GREEN]}, QUESTION, ANSWERS),
    "orca_dpo_pairs": (
        {"system": "Be brief.", "question": USER["content"], "chosen": "Blue.", "rejected": "Green."},
        (Turn("system", "Be brief."), *QUESTION),
        ANSWERS,
    ),
    "ultrafeedback_binarized": (
        {
            "prompt": USER["content"],
            "prompt_id": "1",
            "chosen": [USER, BLUE],
            "rejected": [USER, GREEN],
            "messages": [USER, BLUE],
            "score_chosen": 8.0,
            "score_rejected": 2.0,
        },
        QUESTION,
        ANSWERS,
    ),
    "hh_rlhf": (
        {
            "chosen": "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Sky?\n\nAssistant: Blue.",
            "rejected": "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Sky?\n\nAssistant: Green.",
        },
        (Turn("user", "Hi"), Turn("assistant", "Hello"), Turn("user", "Sky?")),
        ANSWERS,
    ),
    "sharegpt": (
        {
            "conversations": [{"from": "human", "value": "What colour is the sky?"}],
            "chosen": {"from": "gpt", "value": "Blue."},
            "rejected": {"from": "gpt", "value": "Green."},
        },
        QUESTION,
        ANSWERS,
    ),
    "prompt_completion": ({"prompt": "The sky is", "completion": " blue."}, "The sky is", (" blue.",)),
    "messages": ({"messages": [USER, BLUE]}, QUESTION, ANSWERS[:1]),
    "text": ({"text": "The sky is blue."}, "", ("The sky is blue.",)),
    "trl_unpaired": ({"prompt": "The sky is", "completion": " blue.", "label": True}, "The sky is", (" blue.",)),
    "messages_unpaired": ({"messages": [USER, BLUE], "label": True}, QUESTION, ANSWERS[:1]),
    "ranked": ({"prompt": "The sky is", "completions": [" blue.", " green."]}, "The sky is", (" blue.", " green.")),
    "ultrafeedback": (
        {
            "instruction": USER["content"],
            "completions": [{"response": "Blue.", "overall_score": 8}, {"response": "Green.", "overall_score": 2}],
        },
        QUESTION,
        ANSWERS,
    ),
}


@pytest.mark.parametrize("name", [known.name for known in FORMATS])
def test_format(name: str, tmp_path: Path) -> None:
    row, prompt, responses = SAMPLES[name]
    group = only(tmp_path, row)
    assert (group.origin, group.prompt, group.responses) == ("one.jsonl:1", prompt, responses)
    assert detect_format(row, "x").name == name
    assert only(tmp_path, row, name) == group


def test_variants(tmp_path: Path) -> None:
    raw = {"question": USER["content"], "chatgpt": "Blue.", "llama2-13b-chat": "Green.", "system": ""}
    assert only(tmp_path, raw).prompt == QUESTION
    assert only(tmp_path, raw).responses == ANSWERS
    bare = only(tmp_path, {"prompt": USER["content"], "chosen": [BLUE], "rejected": [GREEN]})
    assert (bare.prompt, bare.responses) == (QUESTION, ANSWERS)
    chat = only(tmp_path, {"prompt": [USER], "completion": [BLUE]})
    assert (chat.prompt, chat.responses) == (QUESTION, ANSWERS[:1])
    parts = [{"type": "text", "text": "Bl"}, {"type": "text", "text": "ue."}]
    split = only(tmp_path, {"messages": [USER, {"role": "assistant", "content": parts}]})
    assert split.responses == ANSWERS[:1]
    system = only(tmp_path, SAMPLES["sharegpt"][0] | {"system": "Be brief."})
    assert system.prompt == (Turn("system", "Be brief."), *QUESTION)


def test_identical_conversations_stay_a_pair(tmp_path: Path) -> None:
    """So that they are dropped for what they are, once they are tokens."""
    same = only(tmp_path, {"chosen": [USER, BLUE], "rejected": [USER, BLUE]})
    assert (same.prompt, same.responses) == (QUESTION, (ANSWERS[0], ANSWERS[0]))


def test_implicit_prompt_keeps_words_whole(tmp_path: Path) -> None:
    prefix = only(tmp_path, {"chosen": "I like cats", "rejected": "I like cats a lot"})
    assert (prefix.prompt, prefix.responses) == ("I like", (" cats", " cats a lot"))
    nothing = only(tmp_path, {"chosen": "yes", "rejected": "yesterday"})
    assert (nothing.prompt, nothing.responses) == ("", ("yes", "yesterday"))


def test_roles() -> None:
    row = {"messages": [{"from": role, "value": "x"} for role in ("system", "human", "user", "tool", "gpt")]}
    prompt, (answer,), *_ = detect_format(row, "x").convert(row)
    assert [turn.role for turn in (*prompt, *answer)] == ["system", "user", "user", "tool", "assistant"]  # type: ignore[union-attr]


def test_real_sharegpt(shared: Path) -> None:
    found = groups(str(shared / "data" / "dpo_en_demo.json"))
    assert len(found) == 299
    assert all(len(group.responses) == 2 for group in found)
    assert {turn.role for group in found for turn in group.prompt} == {"system", "user", "assistant"}  # type: ignore[union-attr]
    assert found[17].origin == "dpo_en_demo.json[17]"


def test_real_unpaired(shared: Path) -> None:
    """Not demonstrations: half of them are answers that the model should not give."""
    found = groups(str(shared / "data" / "kto_en_demo.json"))
    assert len(found) == 300
    assert {group.kind for group in found} == {"unpaired"}
    assert sum(group.labels == (True,) for group in found) == 150


def test_labels(tmp_path: Path) -> None:
    for value, label in ((True, True), (0, False), (1, True)):
        assert only(tmp_path, {"prompt": "a", "completion": "b", "label": value}).labels == (label,)
    assert only(tmp_path, {"prompt": "a", "completion": "b", "kto_tag": False}).labels == (False,)
    for wrong in ("good", 2, -1, 0.5, []):
        with pytest.raises(DataError, match="`label` must be true"):
            only(tmp_path, {"prompt": "a", "completion": "b", "label": wrong})


@pytest.mark.parametrize(
    ("columns", "scores"),
    [
        ({"margin": 1.5}, (1.5, 0.0)),
        ({"margin": 1.5, "chosen_score": 9, "rejected_score": 1}, (1.5, 0.0)),
        ({"chosen_score": 9, "rejected_score": 1}, (9.0, 1.0)),
        ({"score_chosen": 1.0, "score_rejected": 9.0}, (1.0, 9.0)),
        ({"chosen_rating": 4, "rejected_rating": 2}, (4.0, 2.0)),
        ({"chosen_score": None, "rejected_score": 1}, None),
        ({}, None),
    ],
)
def test_scores_of_pairs(columns: dict[str, Any], scores: Any, tmp_path: Path) -> None:
    assert only(tmp_path, PAIR | columns).scores == scores


@pytest.mark.parametrize("wrong", [{"margin": "big"}, {"margin": True}, {"chosen_score": [1], "rejected_score": 2}])
def test_scores_that_are_no_numbers(wrong: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="must be a finite number"):
        only(tmp_path, PAIR | wrong)


def test_ranked_lists(tmp_path: Path) -> None:
    """Best first whatever their order in the file; the aspects' mean goes before UltraFeedback's overall score."""
    items = [{"response": "a", "score": 1}, {"response": "b", "score": 3}, {"response": "c", "score": 3}]
    group = only(tmp_path, {"prompt": "x", "completions": items})
    assert (group.kind, group.responses, group.scores) == ("lists", ("b", "c", "a"), (3.0, 3.0, 1.0))
    apart = only(tmp_path, {"prompt": "x", "responses": ["a", "b"], "scores": [1, 2]})
    assert (apart.responses, apart.scores) == (("b", "a"), (2.0, 1.0))
    in_order = only(tmp_path, {"prompt": "x", "responses": ["b", "a"]})
    assert (in_order.responses, in_order.scores, in_order.kind) == (("b", "a"), None, "lists")
    items = [
        {"response": "Green.", "overall_score": 10, "fine-grained_score": 1.25},
        {"response": "Blue.", "overall_score": 8.5, "fine-grained_score": 4.75},
    ]
    feedback = only(tmp_path, {"instruction": USER["content"], "completions": items, "models": ["a", "b"]})
    assert (feedback.prompt, feedback.responses, feedback.scores) == (QUESTION, ANSWERS, (4.75, 1.25))
    without = only(tmp_path, {"prompt": "", "completions": ["a", "b"]})
    assert (without.prompt, without.responses) == ("", ("a", "b"))
    chat = only(tmp_path, {"prompt": [USER], "completions": [[BLUE], [GREEN]]})
    assert (chat.prompt, chat.responses) == (QUESTION, ANSWERS)
    reasons = [
        {"prompt": "x", "completions": [{"response": "a", "score": 1}]},
        {"prompt": "x", "completions": [{"response": "a", "score": 1}, {"response": "b", "score": None}]},
    ]
    dropped = [item for item in read_groups(lines(tmp_path / "odd.jsonl", *reasons), None, "auto")]
    assert [item.reason for item in dropped if isinstance(item, Dropped)] == [
        "a list with fewer than two responses",
        "a completion has no score",
    ]
    for wrong in ({"completions": "a"}, {"completions": [{"answer": "a"}] * 2}, {"completions": [1, 2]}):
        with pytest.raises(DataError):
            only(tmp_path, {"prompt": "x"} | wrong)
    with pytest.raises(DataError, match="one per completion"):
        only(tmp_path, {"prompt": "x", "completions": ["a", "b"], "scores": [1]})


@pytest.mark.parametrize(
    ("format", "row", "reason"),
    [
        ("trl_standard", PAIR | {"chosen": None}, "`chosen` is null"),
        (
            "trl_conversational_implicit",
            {"chosen": [USER, BLUE, USER, BLUE], "rejected": [USER, GREEN]},
            "not exactly one assistant turn",
        ),
        ("messages", {"messages": [BLUE, USER]}, "not exactly one assistant turn"),
        ("messages", {"messages": [BLUE]}, "no turn before the response"),
        ("messages", {"messages": [USER, {"role": "assistant", "content": None}]}, "no text (null)"),
        ("messages", {"messages": [USER, BLUE | {"tool_calls": [{"name": "f"}]}]}, "tool calls"),
        ("messages", {"messages": [USER, BLUE], "tools": [{"name": "f"}]}, "tools"),
        (
            "hh_rlhf",
            {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nHuman: b"},
            "not exactly",
        ),
        ("hh_rlhf", {"chosen": "just text", "rejected": "more text"}, "not a Human/Assistant transcript"),
    ],
)
def test_left_out_and_named(format: str, row: dict[str, Any], reason: str, tmp_path: Path) -> None:
    source = lines(tmp_path / "rows.jsonl", SAMPLES[format][0], row)
    good, bad = read_groups(source, None, "auto")
    assert isinstance(good, Group)
    assert isinstance(bad, Dropped)
    assert bad.origin == "rows.jsonl:2"
    assert reason in bad.reason


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [PAIR, {"prompt": "x", "chosen": "y"}],
            r"^bad\.jsonl:2: no column `rejected`.*the row has `prompt`, `chosen`",
        ),
        ([PAIR, PAIR | {"chosen": 7}], r"^bad\.jsonl:2: `chosen` must be text, found a number"),
        (
            [{"messages": "hello"}],
            r"^bad\.jsonl:1: `messages` must be a list of \{role, content\}, found text",
        ),
        ([{"messages": [USER, "hello"]}], r"^bad\.jsonl:1: a turn of `messages` must be .*, found text"),
        (
            [{"messages": [USER, {"role": "robot", "content": "x"}]}],
            r"has role 'robot'; allowed: system, human",
        ),
    ],
)
def test_rows_without_the_form_of_the_first(rows: list[Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        list(read_groups(lines(tmp_path / "bad.jsonl", *rows), None, "auto"))


def test_unknown_columns_and_formats(tmp_path: Path) -> None:
    path = lines(tmp_path / "odd.jsonl", {"question": "a", "answer": 1})
    with pytest.raises(DataError) as caught:
        groups(path)
    message = str(caught.value)
    assert "question (text), answer (a number)" in message
    assert all(known.name in message for known in FORMATS)
    assert "\n" not in message
    with pytest.raises(ConfigError, match=r"data\.format: unknown format `trl_standart`; did you mean trl_standard"):
        groups(path, "trl_standart")
    with pytest.raises(DataError, match=r"no column `prompt`, `completion`, which format prompt_completion needs"):
        groups(path, "prompt_completion")


# Bad files -------------------------------------------------------------------------------------------------


def test_bad_json_line_is_named_by_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(PAIR) + "\n\n" + '{"prompt": "x", "chosen": }\n' + json.dumps(PAIR) + "\n")
    with pytest.raises(DataError) as caught:
        groups(str(path))
    assert str(caught.value).startswith(f"{path}:3: not valid JSON (")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1}\n[1, 2]\n', r":2: a line must be a JSON object, found a list"),
        (b'{"a": 1}\n{"a": "\xff"}\n', r":2: not valid UTF-8"),
        (b'{"a": 1}\n{"a": 1', r":2: not valid JSON"),
    ],
)
def test_bad_lines(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(read_rows(str(path), None))


def test_bad_json_list(tmp_path: Path) -> None:
    path = tmp_path / "pairs.json"
    path.write_text('[\n {"a": 1},\n {"a": 2,}\n]\n')
    with pytest.raises(DataError, match=r"pairs\.json:3: not valid JSON"):
        list(read_rows(str(path), None))
    path.write_text('[{"a": 1}, 2]')
    with pytest.raises(DataError, match=r"pairs\.json\[1\]: an item of the list must be an object, found a number"):
        list(read_rows(str(path), None))
    path.write_text('"a"')
    with pytest.raises(DataError, match=r"must hold a list of objects, found text"):
        list(read_rows(str(path), None))


def test_line_numbers_count_blank_lines_and_bom(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(PAIR).encode() + b"\r\n\r\n" + json.dumps(PAIR).encode())
    assert [group.origin for group in groups(str(path))] == ["pairs.jsonl:1", "pairs.jsonl:3"]


def test_json_file_of_json_lines(tmp_path: Path) -> None:
    assert groups(lines(tmp_path / "pairs.json", PAIR, PAIR))[1].origin == "pairs.json:2"


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_empty_is_an_error(content: str, tmp_path: Path) -> None:
    path = tmp_path / "none.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=r"none\.jsonl: the data set is empty"):
        groups(str(path))


def test_sources_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no\.jsonl: no such file or folder; give a \.jsonl"):
        groups(str(tmp_path / "no.jsonl"))
    (tmp_path / "pairs.csv").write_text("a,b\n")
    with pytest.raises(DataError, match=r"may not end in `\.csv`"):
        groups(str(tmp_path / "pairs.csv"))
    with pytest.raises(DataError, match="not a folder written by datasets' save_to_disk"):
        groups(str(tmp_path))
    (tmp_path / "pairs.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(DataError, match=r"pairs\.parquet: not a readable Parquet file"):
        groups(str(tmp_path / "pairs.parquet"))


# Other kinds of source -------------------------------------------------------------------------------------

CHAT = [{"chosen": [USER, BLUE], "rejected": [USER, GREEN | {"content": f"Green {n}."}]} for n in range(5)]


def write_parquet(path: Path) -> str:
    pq.write_table(pa.Table.from_pylist(CHAT), path / "chat.parquet")
    return str(path / "chat.parquet")


def write_folder(path: Path) -> str:
    datasets.Dataset.from_list(CHAT).save_to_disk(str(path / "chat"))
    return str(path / "chat")


def write_splits(path: Path) -> str:
    whole = datasets.Dataset.from_list(CHAT)
    datasets.DatasetDict(train=whole, test=whole.select([0])).save_to_disk(str(path / "both"))
    return str(path / "both")


def write_arrow(path: Path) -> str:
    return str(next(Path(write_folder(path)).glob("*.arrow")))


def write_json(path: Path) -> str:
    (path / "chat.json").write_text(json.dumps(CHAT, indent=1))
    return str(path / "chat.json")


@pytest.mark.parametrize(
    ("write", "third"),
    [
        (write_parquet, "chat.parquet[2]"),
        (write_folder, "chat[2]"),
        (write_splits, "both/train[2]"),
        (write_arrow, "data-00000-of-00001.arrow[2]"),
        (write_json, "chat.json[2]"),
    ],
)
def test_kinds_of_source(write: Callable[[Path], str], third: str, tmp_path: Path) -> None:
    source = write(tmp_path)
    found = groups(source)
    want = groups(lines(tmp_path / "chat.jsonl", *CHAT))
    assert [(g.prompt, g.responses) for g in found] == [(g.prompt, g.responses) for g in want]
    assert found[2].origin == third
    assert source_digest(source, None) == source_digest(source, None)


def test_splits(tmp_path: Path) -> None:
    source = write_splits(tmp_path)
    assert len(groups(source, split="test")) == 1
    assert source_digest(source, "test") != source_digest(source, None) == source_digest(source, "train")
    with pytest.raises(DataError, match="no split `dev`; it has train, test"):
        groups(source, split="dev")


def test_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hub itself is not asked: what is passed to `datasets`, and what comes of its answer."""
    asked = []

    def answer(name: str, split: str) -> datasets.Dataset:
        asked.append((name, split))
        return datasets.Dataset.from_list(CHAT)

    monkeypatch.setattr(datasets, "load_dataset", answer)
    assert groups("someone/pairs", split="test")[4].origin == "someone/pairs/test[4]"
    assert source_digest("someone/pairs", None) != ""
    assert asked == [("someone/pairs", "test"), ("someone/pairs", "train")]

    def refuse(name: str, split: str) -> datasets.Dataset:
        raise ConnectionError("no route to the Hub\nand much more")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(DataError, match=r"someone/pairs: neither .* \(no route to the Hub\)"):
        groups("someone/pairs")


@pytest.mark.parametrize("nothing", ["null", "NaN"])
def test_a_null_in_the_first_row_does_not_decide_the_format(tmp_path: Path, nothing: str) -> None:
    """Without its prompt column a pair would pass for one whose prompt is inside the responses."""
    rows = [f'{{"prompt": {nothing}, "chosen": "a b", "rejected": "a c"}}']
    rows += ['{"prompt": "Once", "chosen": "a b", "rejected": "a c"}']
    (tmp_path / "pairs.jsonl").write_text("\n".join(rows) + "\n")
    names: list[str] = []
    dropped, group = read_groups(str(tmp_path / "pairs.jsonl"), None, "auto", names.append)
    assert dropped == Dropped("pairs.jsonl:1", "`prompt` is null")
    assert group == Group("pairs.jsonl:2", "Once", ("a b", "a c"))
    assert names == ["trl_standard"]


def test_half_a_surrogate_pair_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "\\ud800", "chosen": "a", "rejected": "b"}\n')
    [item] = read_groups(str(tmp_path / "pairs.jsonl"), None, "auto")
    assert item == Dropped("pairs.jsonl:1", "text that is not valid Unicode (half of a surrogate pair)")
