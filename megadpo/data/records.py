"""Groups of text: a prompt and its K responses, read from whatever form the data set has."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, NamedTuple

from megadpo.data.sources import Row, kind, read_rows
from megadpo.errors import ConfigError, DataError

if TYPE_CHECKING:  # it brings torch with it, which tokenising processes do not need
    from megadpo.objectives.kinds import Kind


@dataclass(frozen=True)
class Turn:
    """One message of a conversation; role is system, user, assistant or tool."""

    role: str
    content: str


@dataclass(frozen=True)
class Group:
    """A prompt and its responses, best first (for pairs: chosen, then rejected).

    Either all text is plain (str), or all is conversation (tuples of turns; the template is applied later).
    origin names the row for messages: "pairs.jsonl:17" (file and line, counted from 1) or "train[17]".
    labels: for unpaired data, whether each response is a desirable one. scores: what a judge gave to each response;
    only their differences mean anything (a pair with the margin m has the scores m and 0).
    ranked: a list, which may have any number of responses.
    """

    origin: str
    prompt: str | tuple[Turn, ...]
    responses: tuple[str | tuple[Turn, ...], ...]
    labels: tuple[bool, ...] | None = None
    scores: tuple[float, ...] | None = None
    ranked: bool = False

    @property
    def kind(self) -> Kind:
        if self.ranked:
            return "lists"
        if self.labels is not None:
            return "unpaired"
        return "demonstrations" if len(self.responses) == 1 else "pairs"


@dataclass(frozen=True)
class Dropped:
    """A row that is left out. `reason` is one of few phrases, so that reasons can be counted."""

    origin: str
    reason: str


class LeaveOutError(Exception):
    """Raised inside the data room for a row to leave out; its text is the reason. Ends as a `Dropped`."""


Text = str | tuple[Turn, ...]


class Content(NamedTuple):
    """What a row holds. Scores: of each response, in their order; None where the row has none."""

    prompt: Text
    responses: tuple[Text, ...]
    labels: tuple[bool, ...] | None = None
    scores: tuple[float, ...] | None = None
    ranked: bool = False


ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "tool": "tool",
}


@dataclass(frozen=True)
class Format:
    """columns: what it needs ("a|b": either). fits: tells it, by a row, from others with the same columns."""

    name: str
    columns: tuple[str, ...]
    fits: Callable[[Row], bool]
    convert: Callable[[Row], Content]

    def missing(self, row: Row) -> list[str]:
        return [column for column in self.columns if not any(name in row for name in column.split("|"))]


def read_groups(
    source: str, split: str | None, format: str, on_format: Callable[[str], None] | None = None
) -> Iterator[Group | Dropped]:
    """Every row of `source` as a group, in its order, or as what was dropped and why.

    format: a name of FORMATS, or "auto": found from the columns of the first row in which none of them is null.
    on_format is told the name. Raises DataError for an
    unknown set of columns, for a row that does not have the form of the first one, and for a source without
    rows; ConfigError for an unknown format name.
    """
    chosen = None if format == "auto" else _named_format(format)
    empty = True
    for origin, row in read_rows(source, split):
        empty = False
        if chosen is None:
            if nulls := [name for name in COLUMNS if name in row and _is_null(row[name])]:
                yield Dropped(origin, f"`{nulls[0]}` is null")
                continue
            chosen = detect_format(row, source)
        if on_format is not None:
            on_format(chosen.name)
        if missing := chosen.missing(row):
            raise DataError(
                f"{origin}: no column {_quoted(missing)}, which format {chosen.name} needs; "
                f"the row has {_quoted(row) or 'no columns'}"
            )
        try:
            content = chosen.convert(row)
        except LeaveOutError as reason:
            yield Dropped(origin, str(reason))
        except _MalformedError as error:
            raise DataError(f"{origin}: {error} (format {chosen.name})") from error
        else:
            yield Group(origin, *content)
    if empty:
        raise DataError(f"{source}: the data set is empty; it needs at least one row")


def detect_format(row: Row, source: str) -> Format:
    """The first format of the table that fits the row."""
    for candidate in FORMATS:
        if not candidate.missing(row) and candidate.fits(row):
            return candidate
    known = "; ".join(f"{known.name} ({', '.join(known.columns)})" for known in FORMATS)
    given = ", ".join(f"{name} ({kind(value)})" for name, value in row.items()) or "none"
    raise DataError(f"{source}: no known format has these columns: {given}. Known formats: {known}")


def _named_format(name: str) -> Format:
    by_name = {candidate.name: candidate for candidate in FORMATS}
    if name not in by_name:
        near = get_close_matches(name, by_name, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(f"data.format: unknown format `{name}`; {hint}allowed: auto, {', '.join(by_name)}")
    return by_name[name]


# Values of a row ------------------------------------------------------------------------------------------


class _MalformedError(Exception):
    """A row that does not have the form that its format says."""


def _present(row: Row, column: str) -> str:
    """The first of the alternatives "a|b" that the row has."""
    return next(name for name in column.split("|") if name in row)


def _value(row: Row, column: str) -> Any:
    """The value of the column; null leaves the row out."""
    name = _present(row, column)
    if _is_null(row[name]):
        raise LeaveOutError(f"`{name}` is null")
    return row[name]


def _is_null(value: Any) -> bool:
    """None, or the NaN that stands for it in a column of a Parquet file or a data frame."""
    return value is None or (isinstance(value, float) and value != value)


def _written(text: str) -> str:
    """The text, unless no file could hold it: JSON can escape half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise LeaveOutError("text that is not valid Unicode (half of a surrogate pair)") from None
    return text


def _text(row: Row, column: str) -> str:
    column = _present(row, column)
    value = _value(row, column)
    if not isinstance(value, str):
        raise _MalformedError(f"`{column}` must be text, found {kind(value)}")
    return _written(value)


def _turns(row: Row, column: str) -> tuple[Turn, ...]:
    """A list of {role, content} or {from, value}; one such object counts as a list of one."""
    column = _present(row, column)
    value = _value(row, column)
    items = [value] if isinstance(value, dict) else value
    if not isinstance(items, list):
        raise _MalformedError(f"`{column}` must be a list of {{role, content}}, found {kind(value)}")
    if row.get("tools") not in (None, "", "[]", "null", [], {}):
        raise LeaveOutError("the row has tools, which megadpo does not support")
    return tuple(_turn(item, column) for item in items)


def _turn(item: Any, column: str) -> Turn:
    if not isinstance(item, dict):
        raise _MalformedError(f"a turn of `{column}` must be {{role, content}}, found {kind(item)}")
    role = item.get("role", item.get("from"))
    content = item.get("content", item.get("value"))
    if role not in ROLES:
        raise _MalformedError(f"a turn of `{column}` has role {role!r}; allowed: {', '.join(ROLES)}")
    if item.get("tool_calls"):
        raise LeaveOutError("a turn has tool calls, which megadpo does not support")
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        content = "".join(str(part.get("text") or "") for part in content)
    if not isinstance(content, str):
        raise LeaveOutError(f"a turn has no text ({kind(content)})")
    return Turn(ROLES[role], _written(content))


def _answer(turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    """Only one assistant turn can be scored: all else is text that the model did not write."""
    if len(turns) != 1 or turns[0].role != "assistant":
        raise LeaveOutError("a response is not exactly one assistant turn")
    return turns


def _conversation(prompt: tuple[Turn, ...], *responses: tuple[Turn, ...]) -> Content:
    if not prompt:
        raise LeaveOutError("the conversation has no turn before the response")
    return Content(prompt, tuple(_answer(response) for response in responses))


def _diverging(first: tuple[Turn, ...], second: tuple[Turn, ...]) -> Content:
    """Two whole conversations: the turns they share are the prompt."""
    shared = 0
    while shared < min(len(first), len(second)) - 1 and first[shared] == second[shared]:
        shared += 1
    return _conversation(first[:shared], first[shared:], second[shared:])


# One function per format ----------------------------------------------------------------------------------


def _standard(row: Row) -> Content:
    return Content(_text(row, "prompt"), (_text(row, "chosen"), _text(row, "rejected")))


def _standard_implicit(row: Row) -> Content:
    """The longest common prefix is the prompt, taken back to a word boundary so that no word is torn."""
    chosen, rejected = _text(row, "chosen"), _text(row, "rejected")
    differ = (i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b)
    common = chosen[: next(differ, min(len(chosen), len(rejected)))]
    cut = max(0, *(common.rfind(space) for space in " \n\t"))
    return Content(chosen[:cut], (chosen[cut:], rejected[cut:]))


def _conversational(row: Row) -> Content:
    return _conversation(_turns(row, "prompt"), _turns(row, "chosen"), _turns(row, "rejected"))


def _conversational_implicit(row: Row) -> Content:
    return _diverging(_turns(row, "chosen"), _turns(row, "rejected"))


def _ultrafeedback(row: Row) -> Content:
    """`prompt` repeats the user turn of the lists; where they hold only the answers, it is the user turn."""
    chosen, rejected = _turns(row, "chosen"), _turns(row, "rejected")
    if len(chosen) == len(rejected) == 1:
        return _conversation((Turn("user", _text(row, "prompt")),), chosen, rejected)
    return _diverging(chosen, rejected)


def _orca(row: Row) -> Content:
    question = Turn("user", _text(row, "question"))
    system = row.get("system")
    prompt = (Turn("system", system), question) if isinstance(system, str) and system.strip() else (question,)
    chosen, rejected = _text(row, "chosen|chatgpt"), _text(row, "rejected|llama2-13b-chat")
    return _conversation(prompt, (Turn("assistant", chosen),), (Turn("assistant", rejected),))


_SPEAKER = re.compile(r"\n\n(Human|Assistant):")


def _transcript(text: str) -> tuple[Turn, ...]:
    before, *parts = _SPEAKER.split("\n\n" + text.lstrip("\n"))
    if before.strip() or not parts:
        raise LeaveOutError("not a Human/Assistant transcript")
    roles = {"Human": "user", "Assistant": "assistant"}
    return tuple(Turn(roles[who], said.strip()) for who, said in zip(parts[::2], parts[1::2], strict=True))


def _hh_rlhf(row: Row) -> Content:
    return _diverging(_transcript(_text(row, "chosen")), _transcript(_text(row, "rejected")))


def _sharegpt(row: Row) -> Content:
    prompt = _turns(row, "conversations")
    system = row.get("system")
    if isinstance(system, str) and system.strip() and (not prompt or prompt[0].role != "system"):
        prompt = (Turn("system", system), *prompt)
    return _conversation(prompt, _turns(row, "chosen"), _turns(row, "rejected"))


def _prompt_completion(row: Row) -> Content:
    if isinstance(_value(row, "prompt"), str):
        return Content(_text(row, "prompt"), (_text(row, "completion"),))
    return _conversation(_turns(row, "prompt"), _turns(row, "completion"))


def _messages(row: Row) -> Content:
    turns = _turns(row, "messages|conversations")
    return _conversation(turns[:-1], turns[-1:])


def _plain_text(row: Row) -> Content:
    return Content("", (_text(row, "text"),))


def _unpaired(read: Callable[[Row], Content]) -> Callable[[Row], Content]:
    """The same row with its verdict."""
    return lambda row: read(row)._replace(labels=(_label(row),))


def _label(row: Row) -> bool:
    value = _value(row, "label|kto_tag")
    if value not in (True, False):  # 1 and 0 equal them
        raise _MalformedError(f"`label` must be true (desirable) or false, found {value!r}")
    return bool(value)


def _scored(read: Callable[[Row], Content]) -> Callable[[Row], Content]:
    """A pair with its margin, or else the scores of its two responses, where the row has them."""

    def convert(row: Row) -> Content:
        content = read(row)
        if not _is_null(row.get("margin")):
            return content._replace(scores=(_number(row["margin"], "margin"), 0.0))
        for names in PAIR_SCORES:
            if all(not _is_null(row.get(name)) for name in names):
                return content._replace(scores=tuple(_number(row[name], name) for name in names))
        return content

    return convert


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < float("inf"):
        raise _MalformedError(f"`{name}` must be a finite number, found {value!r}")
    return float(value)


def _ranked(row: Row) -> Content:
    """The completions of a prompt, best first: by score, or as they stand where none has one."""
    prompt: Text
    if isinstance(row.get("prompt"), str):  # an empty one, too
        prompt = _text(row, "prompt")
    else:
        prompt = _turns(row, "prompt") if "prompt" in row else (Turn("user", _text(row, "instruction")),)
    items = _value(row, "completions|responses")
    if not isinstance(items, list):
        raise _MalformedError(f"`completions` must be a list, found {kind(items)}")
    apart = row.get("scores")
    if apart is not None and (not isinstance(apart, list) or len(apart) != len(items)):
        raise _MalformedError(f"`scores` must be a list of {len(items)} numbers, one per completion")
    responses = [completion(item, isinstance(prompt, str)) for item in items]
    scores = [_score(item) for item in items] if apart is None else list(apart)
    if len(items) < 2:
        raise LeaveOutError("a list with fewer than two responses")
    if all(score is None for score in scores):
        return Content(prompt, tuple(responses), ranked=True)
    if any(_is_null(score) for score in scores):
        raise LeaveOutError("a completion has no score")
    numbers = [_number(score, "score") for score in scores]
    order = sorted(range(len(items)), key=lambda i: -numbers[i])  # stable: ties keep their order
    return Content(prompt, tuple(responses[i] for i in order), scores=tuple(numbers[i] for i in order), ranked=True)


def completion(item: Any, plain: bool) -> Text:
    """The text of one item of a list; plain: not a conversation."""
    if isinstance(item, dict):
        item = next((item[name] for name in COMPLETION_TEXT if name in item), None)
    if isinstance(item, list):
        return _answer(tuple(_turn(turn, "completions") for turn in item))
    if not isinstance(item, str):
        raise _MalformedError(
            f"a completion must be text or have one of {_quoted(COMPLETION_TEXT)}, found {kind(item)}"
        )
    return _written(item) if plain else (Turn("assistant", _written(item)),)


def _score(item: Any) -> Any:
    """UltraFeedback's overall_score has mistakes (a 1 written as 10), so the mean of its four aspects comes first."""
    if not isinstance(item, dict):
        return None
    return next((item[name] for name in COMPLETION_SCORE if not _is_null(item.get(name))), None)


COMPLETION_TEXT = ("response", "completion", "content", "text")
COMPLETION_SCORE = ("score", "fine-grained_score", "overall_score")
PAIR_SCORES = (
    ("chosen_score", "rejected_score"),
    ("score_chosen", "score_rejected"),
    ("chosen_rating", "rejected_rating"),
    ("chosen-rating", "rejected-rating"),
)
"""Columns that hold the scores of a pair, beside `margin`."""


def _kinds(**expected: type) -> Callable[[Row], bool]:
    return lambda row: all(isinstance(row[name], wanted) for name, wanted in expected.items())


def _without_prompt(fits: Callable[[Row], bool]) -> Callable[[Row], bool]:
    """A prompt is taken out of the responses only where there is no column for it."""
    return lambda row: "prompt" not in row and fits(row)


def _demonstration(row: Row) -> bool:
    """A row with a verdict is not a demonstration: half of such a set shows what not to say."""
    return "label" not in row and "kto_tag" not in row


def _is_transcript(row: Row) -> bool:
    return _kinds(chosen=str, rejected=str)(row) and _SPEAKER.match("\n\n" + row["chosen"].lstrip("\n")) is not None


def _anything(row: Row) -> bool:
    return True


FORMATS = (
    Format("sharegpt", ("conversations", "chosen", "rejected"), _anything, _scored(_sharegpt)),
    Format("trl_conversational", ("prompt", "chosen", "rejected"), _kinds(prompt=list), _scored(_conversational)),
    Format("ultrafeedback_binarized", ("prompt", "chosen", "rejected"), _kinds(chosen=list), _scored(_ultrafeedback)),
    Format(
        "trl_standard",
        ("prompt", "chosen", "rejected"),
        _kinds(prompt=str, chosen=str, rejected=str),
        _scored(_standard),
    ),
    Format(
        "orca_dpo_pairs",
        ("question", "chosen|chatgpt", "rejected|llama2-13b-chat"),
        _kinds(question=str),
        _scored(_orca),
    ),
    Format(
        "trl_conversational_implicit",
        ("chosen", "rejected"),
        _without_prompt(_kinds(chosen=list, rejected=list)),
        _scored(_conversational_implicit),
    ),
    Format("hh_rlhf", ("chosen", "rejected"), _without_prompt(_is_transcript), _scored(_hh_rlhf)),
    Format(
        "trl_standard_implicit",
        ("chosen", "rejected"),
        _without_prompt(_kinds(chosen=str, rejected=str)),
        _scored(_standard_implicit),
    ),
    Format("prompt_completion", ("prompt", "completion"), _demonstration, _prompt_completion),
    Format("messages", ("messages",), _demonstration, _messages),
    Format("text", ("text",), _demonstration, _plain_text),
    Format("trl_unpaired", ("prompt", "completion", "label|kto_tag"), _anything, _unpaired(_prompt_completion)),
    Format("messages_unpaired", ("messages|conversations", "label|kto_tag"), _anything, _unpaired(_messages)),
    Format("ranked", ("prompt", "completions|responses"), _anything, _ranked),
    Format("ultrafeedback", ("instruction", "completions"), _anything, _ranked),
)


def _quoted(names: Any) -> str:
    return ", ".join(f"`{name}`" for name in names)


COLUMNS = tuple(dict.fromkeys(name for known in FORMATS for column in known.columns for name in column.split("|")))
"""Every column that some format needs."""
