"""Chat templates: Jinja that came with a model, so a stranger's code: run in a sandbox, with a clock."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

from megadpo.data.records import LeaveOutError, Turn
from megadpo.errors import TokenizerError

MAX_SECONDS = 5.0
MAX_CHARACTERS = 10_000_000
TODAY = datetime(2024, 7, 26)
"""The day that every template is told: what is made from a data set must not depend on the day it was made.
This one is what Llama 3.1's own template says where it is told no date."""

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + END_OF_TURN + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def chatml(has_im_end: bool) -> str:
    """The template for a model that has none. A turn ends with <|im_end|> where that is one token of the
    vocabulary; else with the tokenizer's EOS, so that there is one token at which generation can stop."""
    return CHATML.replace("END_OF_TURN", "'<|im_end|>'" if has_im_end else "eos_token")


class ChatTemplate:
    """A compiled template. `tokens`: names it may use besides the messages (bos_token, eos_token ...)."""

    def __init__(self, text: str, tokens: Mapping[str, str], max_seconds: float = MAX_SECONDS) -> None:
        self._environment = _Environment()
        self._tokens = dict(tokens)
        self._max_seconds = max_seconds
        try:
            tree = self._environment.parse(text)
            for loop in tree.find_all(nodes.For):
                loop.iter = nodes.Filter(loop.iter, "watched", [], [], None, None, lineno=loop.lineno)
            self._template = self._environment.from_string(tree)
        except jinja2.TemplateSyntaxError as error:
            raise TokenizerError(
                f"the chat template is not valid Jinja (line {error.lineno}: {error.message}); "
                "give another one with data.chat_template"
            ) from error

    def render(self, turns: Sequence[Turn], add_generation_prompt: bool) -> str:
        """The conversation as text. Raises LeaveOutError where the template refuses or fails, TokenizerError
        where it runs too long or writes too much."""
        messages = [{"role": turn.role, "content": turn.content} for turn in turns]
        self._environment.deadline = time.monotonic() + self._max_seconds
        pieces: list[str] = []
        written = 0
        try:
            for piece in self._template.generate(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._tokens,
            ):
                self._environment.check_time()
                written += len(piece)
                if written > MAX_CHARACTERS:
                    raise TokenizerError(
                        f"the chat template wrote over {MAX_CHARACTERS} characters for one conversation; "
                        "give another one with data.chat_template"
                    )
                pieces.append(piece)
        except TokenizerError:
            raise
        except jinja2.TemplateError as error:
            raise LeaveOutError(f"the chat template refuses the conversation ({_short(error)})") from error
        except Exception as error:  # a template is a program: it can fail in any way that Python can
            kind = type(error).__name__
            raise LeaveOutError(f"the chat template fails ({kind}: {_short(error)})") from error
        return "".join(pieces)


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox that transformers gives templates, and a clock: every loop and every call looks at it."""

    intercepted_binops = frozenset({"*", "**"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        self.deadline = 0.0
        self.filters["tojson"] = _to_json
        self.filters["watched"] = self._watched
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = TODAY.strftime
        del self.globals["lipsum"]  # random text

    def check_time(self) -> None:
        if time.monotonic() > self.deadline:
            raise TokenizerError(
                "the chat template did not end in time for one conversation; give another one with data.chat_template"
            )

    def _watched(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            self.check_time()
            yield item

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        __self.check_time()
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """`*` and `**` are how one expression can fill the memory."""
        if operator == "**" and abs(right) > 64:
            raise SecurityError("an exponent over 64")
        if operator == "*":
            for one, other in ((left, right), (right, left)):
                if hasattr(one, "__len__") and isinstance(other, int) and len(one) * other > MAX_CHARACTERS:
                    raise SecurityError(f"a repetition over {MAX_CHARACTERS} characters")
        return super().call_binop(context, operator, left, right)


class _Generation(Extension):
    """{% generation %} ... {% endgeneration %}: some templates mark what the model wrote. Changes nothing."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """JSON as it is: Jinja's own filter would escape <, > and & for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _short(error: BaseException) -> str:
    return (str(error).strip() or "no message").splitlines()[0][:100]
