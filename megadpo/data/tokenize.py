"""From a group of text to token ids: template, boundary, BOS and EOS, length.

What holds for every group that comes out:
* the prompt has at least one token, and it is the same for all responses;
* where the tokenizer uses BOS, it stands once at the start, whether or not the text writes it;
* a response ends with exactly one EOS and nothing after it, unless its end was cut off. In a conversation
  the EOS is the first special token that the template writes behind the answer (<|im_end|>, <|eot_id|>, </s>
  ...), since that is where generation will stop; where it writes none, and in plain text, it is the
  tokenizer's EOS;
* no token holds text of both the prompt and a response.
A group that cannot have this is dropped with a reason.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megadpo.data.records import Dropped, Group, LeaveOutError, Turn
from megadpo.data.tokenizer import Tokenizer

RULES = 4
"""Version of reading and tokenising, part of the name of every cached store: raise it when ids can change."""

IDENTICAL = "all responses are identical"
IDENTICAL_CUT = "all responses are identical once cut to length"
TOO_LONG = "longer than data.max_length"
OVER_BUDGET = "takes more rows of the stream than batch.micro_batch_tokens"
EOS_INSIDE = "a response has an end-of-sequence token before its end"
BOS_INSIDE = "a response has a beginning-of-sequence token"
SPECIAL_INSIDE = "a turn has a special token of the tokenizer written out in its text"
NOT_CONTINUED = "the chat template writes the prompt otherwise once a response follows"
NOT_VERBATIM = "the chat template does not write the response as it is"
NO_BOUNDARY = "prompt and response cannot be told apart in tokens"
NOTHING_SCORED = "no token to train on is left once cut to length"

SCORED, BODY = 1, 2
"""Bits of a token's mark: its log-probability counts; it is what the turn says, not the form of the turn."""


@dataclass(frozen=True)
class Limit:
    """How long a group may be, and what becomes of one that is longer.

    max_length: most tokens of prompt + one response, at least 2. truncation_mode: see DataConfig. rows: most rows that
    the whole group may take in a packed stream, if there is such a bound; share: whether its prompt stands there once
    or once per response. scalar: the stream is a reward model's, see data/batch.py.
    """

    max_length: int
    truncation_mode: str
    rows: int | None = None
    share: bool = True
    scalar: bool = False


@dataclass(frozen=True)
class Marking:
    """What besides ids is wanted of tokens. loss_on: see DataConfig. body: formatting tokens are told from others."""

    loss_on: str = "answer"
    body: bool = False


@dataclass(frozen=True, eq=False)
class TokenizedGroup:
    """prompt_ids: int32 [at least 1]. response_ids: one int32 [at least 1] per response, best first.

    labels, scores: of each response, see records.Group. marks: one uint8 array per response, SCORED and BODY bits of
    its tokens; None: every token counts, and which is formatting is not known.
    """

    origin: str
    prompt_ids: npt.NDArray[np.int32]
    response_ids: tuple[npt.NDArray[np.int32], ...]
    labels: tuple[bool, ...] | None = None
    scores: tuple[float, ...] | None = None
    marks: tuple[npt.NDArray[np.uint8], ...] | None = None


@dataclass(frozen=True)
class Tokenized:
    """A group and what had to be done to it.

    boundary_splits: responses whose first token would have been shared with the prompt. prompt_cut,
    responses_cut: lost tokens to a limit; for_budget: to the one of rows. header_scored: the template's generation
    prompt is not how it writes an answer, so the responses begin with the header of the assistant's turn.
    from_template: a conversation.
    """

    group: TokenizedGroup
    boundary_splits: int
    prompt_cut: bool
    responses_cut: bool
    for_budget: bool
    header_scored: bool
    from_template: bool


@dataclass(frozen=True)
class _Texts:
    """What is to be tokenised. ends: tokens that end a response. headers: of each response, what the template writes
    before it."""

    prompt: str
    responses: tuple[str, ...]
    ends: Mapping[str, int]
    header_scored: bool
    headers: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Whole:
    """A group in ids, before it is cut. marks: of each response's tokens, where something depends on them."""

    prompt: list[int]
    responses: list[list[int]]
    marks: list[list[int]] | None
    splits: int
    header_scored: bool


def tokenize_group(
    group: Group, tokenizer: Tokenizer, limit: Limit, marking: Marking | None = None
) -> Tokenized | Dropped:
    """The group's ids, or why it cannot be used."""
    marking = marking or Marking()
    try:
        if marking.loss_on == "answer":
            whole = _answers(group, tokenizer, marking.body)
        else:
            whole = _conversation(group, tokenizer, marking.loss_on == "all_tokens")
        if len(whole.responses) > 1 and _all_equal(whole.responses):
            raise LeaveOutError(IDENTICAL)
        in_length = _cut(whole.prompt, whole.responses, limit, tokenizer.bos_id)
        prompt, responses = _cut_rows(*in_length, limit, tokenizer.bos_id)
        if len(responses) > 1 and _all_equal(responses):
            raise LeaveOutError(IDENTICAL_CUT)
        marks = None if whole.marks is None else _cut_marks(whole.marks, responses)
    except LeaveOutError as reason:
        return Dropped(group.origin, str(reason))
    return Tokenized(
        group=TokenizedGroup(
            group.origin,
            _array(prompt),
            tuple(_array(ids) for ids in responses),
            group.labels,
            group.scores,
            marks,
        ),
        boundary_splits=whole.splits,
        prompt_cut=len(prompt) < len(whole.prompt),
        responses_cut=any(len(ids) < len(full) for ids, full in zip(responses, whole.responses, strict=True)),
        for_budget=(prompt, responses) != in_length,
        header_scored=whole.header_scored,
        from_template=not isinstance(group.prompt, str),
    )


def _answers(group: Group, tokenizer: Tokenizer, body: bool) -> _Whole:
    """Prompt and answers, all of whose tokens are scored."""
    texts = _texts(group, tokenizer)
    prompt = tokenizer.encode(texts.prompt, add_bos=True)
    splits = [_response_ids(tokenizer, texts, prompt, text) for text in texts.responses]
    responses = [ids for ids, _ in splits]
    marks = None
    if body:
        headers = texts.headers or ("",) * len(responses)
        marks = [_body_marks(tokenizer, *pair) for pair in zip(responses, headers, strict=True)]
    # With nothing before it the first token of a response is predicted from the end of another text.
    prompt = prompt or [tokenizer.eos_id]
    return _Whole(prompt, responses, marks, sum(apart for _, apart in splits), texts.header_scored)


def _body_marks(tokenizer: Tokenizer, response: list[int], header: str) -> list[int]:
    """All tokens are scored; those of the header, and the one that ends the turn, are not its body."""
    before = tokenizer.encode_apart(header) or []
    size = next((k for k, (a, b) in enumerate(zip(response, before, strict=False)) if a != b), len(before))
    return [SCORED if k < size or k == len(response) - 1 else SCORED | BODY for k in range(len(response))]


def _conversation(group: Group, tokenizer: Tokenizer, every_token: bool) -> _Whole:
    """A demonstration as one text of which the first token is the prompt: what the assistant says in every turn is
    scored, or every token."""
    pieces, ends, header_scored = _pieces(group, tokenizer)
    text, ids, marks, splits = pieces[0][0], tokenizer.encode(pieces[0][0], add_bos=True), list[int](), 0
    start = [] if ids else [tokenizer.eos_id]  # with nothing before it the first token would have no row
    marks += [SCORED if every_token else 0] * len(ids)
    for number, (piece, said) in enumerate(pieces[1:], start=2):
        new, apart = _continued(tokenizer, text, ids, piece)
        if said:
            new = _ended(tokenizer, new, ends, last=number == len(pieces))
        splits += said and apart
        text, ids = text + piece, ids + new
        marks += [SCORED if said or every_token else 0] * len(new)
    ids, marks = start + ids, [0] * len(start) + marks
    return _Whole(ids[:1], [ids[1:]], None if every_token else [marks[1:]], splits, header_scored)


def _cut_marks(marks: list[list[int]], responses: list[list[int]]) -> tuple[npt.NDArray[np.uint8], ...]:
    """Responses only ever lose their ends."""
    kept = tuple(np.array(mark[: len(ids)], dtype=np.uint8) for mark, ids in zip(marks, responses, strict=True))
    if not all((mark & SCORED).any() for mark in kept):
        raise LeaveOutError(NOTHING_SCORED)
    return kept


# Text ------------------------------------------------------------------------------------------------------


def _texts(group: Group, tokenizer: Tokenizer) -> _Texts:
    if isinstance(group.prompt, str):
        ends = {tokenizer.eos_token: tokenizer.eos_id}
        responses = tuple(_until_end(str(response), ends) for response in group.responses)
        return _Texts(group.prompt, responses, ends, header_scored=False)
    turns = [response for response in group.responses if not isinstance(response, str)]
    return _rendered(group.prompt, turns, tokenizer)


def _rendered(prompt: tuple[Turn, ...], responses: list[tuple[Turn, ...]], tokenizer: Tokenizer) -> _Texts:
    """The template is applied to the whole conversation, never to a response alone: it may write a system
    prompt or a BOS wherever a conversation begins. What it writes for the prompt must be how the whole
    begins."""
    for turn in (turn for turns in (prompt, *responses) for turn in turns):
        if tokenizer.special_pattern.search(turn.content):
            raise LeaveOutError(SPECIAL_INSIDE)
    whole = [tokenizer.template.render((*prompt, *response), add_generation_prompt=False) for response in responses]
    for add_generation_prompt in (True, False):
        before = tokenizer.template.render(prompt, add_generation_prompt)
        if all(text.startswith(before) for text in whole):
            break
    else:
        raise LeaveOutError(NOT_CONTINUED)
    ends = tokenizer.turn_ends
    answers = tuple(_until_end(text[len(before) :], ends) for text in whole)
    for response, answer in zip(responses, answers, strict=True):
        if "".join(response[-1].content.split()) not in "".join(answer.split()):
            raise LeaveOutError(NOT_VERBATIM)
    headers = tuple(
        answer[: max(answer.find(response[-1].content.strip()), 0)]
        for response, answer in zip(responses, answers, strict=True)
    )
    return _Texts(before, answers, ends, not add_generation_prompt, headers)


def _pieces(group: Group, tokenizer: Tokenizer) -> tuple[list[tuple[str, bool]], Mapping[str, int], bool]:
    """A demonstration's text in pieces, each with whether the assistant says it; the tokens that end an answer;
    whether the header of a turn had to be counted as said."""
    if isinstance(group.prompt, str):
        texts = _texts(group, tokenizer)
        return [(texts.prompt, False), (texts.responses[0], True)], texts.ends, False
    turns = (*group.prompt, *(turn for turn in group.responses[0] if isinstance(turn, Turn)))
    whole = _rendered(group.prompt, [turns[len(group.prompt) :]], tokenizer)
    text, pieces, at = whole.prompt + whole.responses[0], [], 0
    for number, turn in enumerate(turns):
        if turn.role == "assistant":
            earlier = _rendered(turns[:number], [(turn,)], tokenizer)
            start, end = len(earlier.prompt), len(earlier.prompt + earlier.responses[0])
            if start < at or not text.startswith(earlier.prompt + earlier.responses[0]):
                raise LeaveOutError(NOT_CONTINUED)
            pieces += [(text[at:start], False), (text[start:end], True)]
            at = end
    return pieces, whole.ends, whole.header_scored


def _until_end(text: str, ends: Mapping[str, int]) -> str:
    """`text` up to the first of the end tokens at its end, white space aside: "Yes.</s>" of "Yes.</s>\\n"."""
    end = None
    rest = text.rstrip()
    while found := next((token for token in ends if rest.endswith(token)), None):
        end = len(rest)
        rest = rest[: -len(found)].rstrip()
    return text if end is None else text[:end]


# Ids -------------------------------------------------------------------------------------------------------


def _response_ids(tokenizer: Tokenizer, texts: _Texts, prompt: list[int], response: str) -> tuple[list[int], bool]:
    """(ids with their EOS, whether they had to be tokenised apart from the prompt).

    Usually the ids of prompt + response begin with the prompt's, and the rest is the response. Where a token
    would hold text of both, or an unknown token at the boundary could, the response is tokenised on its own.
    """
    ids, apart = _continued(tokenizer, texts.prompt, prompt, response)
    return _ended(tokenizer, ids, texts.ends, last=True), apart


def _continued(tokenizer: Tokenizer, text: str, text_ids: list[int], more: str) -> tuple[list[int], bool]:
    """(ids of `more` behind a text, whether they had to be had apart from it), see `_response_ids`."""
    joint = tokenizer.encode(text + more, add_bos=True)
    known_end = not text_ids or text_ids[-1] != tokenizer.unk_id
    if known_end and joint[: len(text_ids)] == text_ids:
        return joint[len(text_ids) :], False
    apart = tokenizer.encode_apart(more)
    if apart is None:
        raise LeaveOutError(NO_BOUNDARY)
    return apart, True


def _ended(tokenizer: Tokenizer, ids: list[int], ends: Mapping[str, int], last: bool) -> list[int]:
    """An answer's ids with the token that ends it, which is added to the last answer where the text writes none."""
    end_ids = set(ends.values())
    if last and (not ids or ids[-1] not in end_ids):
        ids = [*ids, tokenizer.eos_id]
    if tokenizer.eos_id in ids[:-1] or (ids and ids[-1] in end_ids and ids[-1] in ids[:-1]):
        raise LeaveOutError(EOS_INSIDE)
    if tokenizer.bos_id in ids[:-1]:
        raise LeaveOutError(BOS_INSIDE)
    return ids


def _cut(
    prompt: list[int], responses: list[list[int]], limit: Limit, bos_id: int | None
) -> tuple[list[int], list[list[int]]]:
    """The prompt loses as little as lets the longest response in, down to one token; a BOS stays. What is
    still too long loses its end."""
    longest = max(len(ids) for ids in responses)
    if len(prompt) + longest <= limit.max_length:
        return prompt, responses
    if limit.truncation_mode == "drop":
        raise LeaveOutError(TOO_LONG)
    prompt = _shorten(prompt, max(1, limit.max_length - longest), limit.truncation_mode, bos_id)
    return prompt, [ids[: limit.max_length - len(prompt)] for ids in responses]


def _cut_rows(
    prompt: list[int], responses: list[list[int]], limit: Limit, bos_id: int | None
) -> tuple[list[int], list[list[int]]]:
    """The same for the rows of the whole group: the prompt first, then the ends of the longest responses. The prompt's
    last token takes no row of its own (data/batch.py)."""
    copies, spare = 1 if limit.share else len(responses), 0 if limit.scalar else 1
    scored = sum(len(ids) for ids in responses)
    if limit.rows is None or copies * (len(prompt) - spare) + scored <= limit.rows:
        return prompt, responses
    if limit.truncation_mode == "drop" or len(responses) + copies * (1 - spare) > limit.rows:
        raise LeaveOutError(OVER_BUDGET)
    most_rows = max(1 - spare, (limit.rows - scored) // copies)
    prompt = _shorten(prompt, spare + most_rows, limit.truncation_mode, bos_id)
    room = limit.rows - copies * (len(prompt) - spare)
    most = max(len(ids) for ids in responses)
    while sum(min(len(ids), most) for ids in responses) > room:
        most -= 1
    return prompt, [ids[:most] for ids in responses]


def _shorten(prompt: list[int], room: int, truncation_mode: str, bos_id: int | None) -> list[int]:
    """At most `room` tokens (at least 1) of the prompt."""
    if len(prompt) <= room:
        return prompt
    if truncation_mode == "keep_start":
        return prompt[:room]
    start = prompt[:1] if prompt[0] == bos_id else []
    return start + prompt[len(prompt) - (room - len(start)) :]


def _all_equal(responses: Sequence[list[int]]) -> bool:
    return all(ids == responses[0] for ids in responses)


def _array(ids: list[int]) -> npt.NDArray[np.int32]:
    return np.array(ids, dtype=np.int32)
