"""Which tokens are trained on: the answer, all turns, all tokens, or what a turn says without its form."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from chat_templates import CHATML, TEMPLATES
from tiny import MemoryStore
from vocabularies import metaspace_bpe, save

from megadpo.data import tokenize
from megadpo.data.batch import pack
from megadpo.data.records import Dropped, Group, Turn
from megadpo.data.store import GroupStore, StoreWriter
from megadpo.data.tokenize import BODY, SCORED, Limit, Marking, Tokenized, TokenizedGroup, tokenize_group
from megadpo.data.tokenizer import Tokenizer, load_tokenizer
from megadpo.observe.tokens import group_text

LONG = Limit(10_000, "keep_end")
TALK = Group(
    "row",
    (Turn("user", "What is it?"), Turn("assistant", "The cat."), Turn("user", "And the answer?")),
    ((Turn("assistant", "That is 42."),),),
)
PAIR = Group("row", (Turn("user", "What is it?"),), ((Turn("assistant", "The cat."),), (Turn("assistant", "A dog."),)))

REWRITES_HISTORY = ("channels", "empty thoughts in the last answer")
"""Templates that write an answer otherwise once another turn follows: what was trained would not be what is read."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tmp_path_factory.mktemp("model")
    return save(metaspace_bpe(legacy=False), model, bos="<s>", unk="<unk>", adds_bos=True)


def load(folder: Path, template: str) -> Tokenizer:
    (folder / "given.jinja").write_text(template)
    return load_tokenizer(str(folder), str(folder / "given.jinja"))


def done(group: Group, tokenizer: Tokenizer, limit: Limit = LONG, **marking: object) -> TokenizedGroup:
    result = tokenize_group(group, tokenizer, limit, Marking(**marking))  # type: ignore[arg-type]
    assert isinstance(result, Tokenized), result
    return result.group


def text(tokenizer: Tokenizer, ids: object) -> str:
    return "".join(tokenizer.backend.piece(int(i)) for i in ids).replace("\u2581", " ")  # type: ignore[attr-defined]


def scored(tokenizer: Tokenizer, group: TokenizedGroup, bit: int = SCORED) -> list[str]:
    """The stretches of scored tokens, as text."""
    assert group.marks is not None
    on = (group.marks[0] & bit) > 0
    cuts = np.flatnonzero(np.diff(on.astype(int))) + 1
    parts = zip(np.split(group.response_ids[0], cuts), np.split(on, cuts), strict=True)
    return [text(tokenizer, ids).strip() for ids, good in parts if good[0]]


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_all_turns_are_the_assistants_words(name: str, folder: Path) -> None:
    tokenizer = load(folder, TEMPLATES[name])
    if name in REWRITES_HISTORY:
        result = tokenize_group(TALK, tokenizer, LONG, Marking("all_turns"))
        assert result == Dropped("row", tokenize.NOT_CONTINUED)
        return
    group = done(TALK, tokenizer, loss_on="all_turns")
    whole = done(TALK, tokenizer)
    texts = [text(tokenizer, [*x.prompt_ids, *x.response_ids[0]]).replace(" ", "") for x in (group, whole)]
    assert texts[0] == texts[1]
    first, last = scored(tokenizer, group)
    assert "The cat." in first
    assert "That is 42." in last
    assert "user" not in first + last
    assert "What" not in first + last
    assert len(group.prompt_ids) == 1


def test_each_turn_is_scored_to_its_end(folder: Path) -> None:
    """The model must learn to stop, in every turn."""
    tokenizer = load(folder, CHATML)
    group = done(TALK, tokenizer, loss_on="all_turns")
    assert scored(tokenizer, group) == ["The cat.<|im_end|>", "That is 42.<|im_end|>"]


def test_all_tokens(folder: Path) -> None:
    tokenizer = load(folder, CHATML)
    group = done(TALK, tokenizer, loss_on="all_tokens")
    assert group.marks is None
    assert (len(group.prompt_ids), group.prompt_ids[0]) == (1, tokenizer.bos_id)
    plain = done(Group("row", "The cat", (" is it.",)), tokenizer, loss_on="all_tokens")
    assert text(tokenizer, plain.response_ids[0]).strip() == "The cat is it.</s>"
    assert plain.response_ids[0][-1] == tokenizer.eos_id


def test_plain_text_has_one_turn(folder: Path) -> None:
    tokenizer = load(folder, CHATML)
    plain = Group("row", "The cat", (" is it.",))
    turns, answer = done(plain, tokenizer, loss_on="all_turns"), done(plain, tokenizer)
    assert scored(tokenizer, turns) == ["is it.</s>"]
    np.testing.assert_array_equal(turns.response_ids[0][turns.marks[0] > 0], answer.response_ids[0])  # type: ignore[index]


def test_nothing_left_to_score(folder: Path) -> None:
    """Cut before the assistant says a word."""
    tokenizer = load(folder, CHATML)
    result = tokenize_group(TALK, tokenizer, Limit(8, "keep_end"), Marking("all_turns"))
    assert result == Dropped("row", tokenize.NOTHING_SCORED)
    cut = done(TALK, tokenizer, Limit(40, "keep_end"), loss_on="all_turns")
    assert scored(tokenizer, cut)[0] == "The cat.<|im_end|>"
    assert len(cut.response_ids[0]) == len(cut.marks[0]) == 39  # type: ignore[index]


def test_body_is_what_is_said(folder: Path) -> None:
    """Llama 3's masked formatting tokens: header and termination."""
    tokenizer = load(folder, CHATML)
    pair = done(PAIR, tokenizer, body=True)
    assert scored(tokenizer, pair) == ["The cat.<|im_end|>"]
    assert scored(tokenizer, pair, BODY) == ["The cat."]
    assert [mark.tolist().count(SCORED) for mark in pair.marks or ()] == [1, 1]
    thinks = CHATML.replace("{% if add_generation_prompt %}\n", "{% if add_generation_prompt %}\n<think>")
    headed = done(PAIR, load(folder, thinks), body=True)
    assert scored(tokenizer, headed)[0].startswith("<|im_start|>")
    assert scored(tokenizer, headed, BODY) == ["The cat."]
    cut = done(PAIR, tokenizer, Limit(5, "keep_start"), body=True)
    assert cut.marks is not None
    assert [mark.tolist() for mark in cut.marks] == [[SCORED | BODY] * 4] * 2  # the end is cut off


def test_from_store_to_batch(folder: Path, tmp_path: Path) -> None:
    """Marks come back from the disk, and only scored tokens have rows."""
    tokenizer = load(folder, CHATML)
    groups = [
        done(TALK, tokenizer, loss_on="all_turns"),
        done(replace(TALK, origin="b"), tokenizer, loss_on="all_turns"),
    ]
    with StoreWriter(tmp_path, 512) as writer:
        from test_store import REPORT

        writer.add(groups)
        writer.finish(REPORT)
    store = GroupStore.open(tmp_path)
    scored = [int((marks & SCORED > 0).sum()) for group in groups for marks in group.marks or ()]
    assert store.scored_lengths.tolist() == MemoryStore(groups).scored_lengths.tolist() == scored
    assert 0 < scored[0] < store.response_lengths[0]
    for number, group in enumerate(groups):
        np.testing.assert_array_equal(store.group(number).marks, group.marks)
    one, other = pack(store, [1, 0], 400, None), pack(MemoryStore(groups), [1, 0], 400, None)  # type: ignore[arg-type]
    for batch in (one, other):
        ids, marks = groups[0].response_ids[0], groups[0].marks[0]  # type: ignore[index]
        assert batch.targets_N.tolist() == ids[marks > 0].tolist() * 2
        assert batch.tokens_S.tolist() == [int((marks > 0).sum())] * 2
        assert batch.rows_N[: batch.tokens_S[0]].tolist() == np.flatnonzero(marks > 0).tolist()
        assert batch.body_N is None
    paired = pack(MemoryStore([done(PAIR, tokenizer, body=True)]), [0], 400, None)  # type: ignore[arg-type]
    assert paired.body_N is not None
    assert (~paired.body_N).nonzero().flatten().tolist() == (paired.tokens_S.cumsum(0) - 1).tolist()


def test_inspection_shows_which_are_scored() -> None:
    shown = group_text("x", [1, 2], [[3, 4, 5]], str, scored=[[False, True, True]])
    assert "response: 3 tokens, 2 scored" in shown.plain
    green = [shown.plain[s.start : s.end] for s in shown.spans if "green" in str(s.style)]
    assert green == ["4", "5"]
