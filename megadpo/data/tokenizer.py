"""A tokenizer and its chat template: a Hugging Face folder, or a bare sentencepiece model."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from megadpo.data.backends import Backend, any_of, load_hugging_face, load_sentencepiece
from megadpo.data.template import ChatTemplate, chatml
from megadpo.errors import TokenizerError

IM_END = "<|im_end|>"
FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "tokenizer.model.v*",
    "spiece.model",
    "*.tiktoken",
    "tekken.json",
)
PREFIXES = ("\u2581", "\u0120")
"""How a piece that starts with a space is spelled: sentencepiece and byte-level BPE."""


@dataclass(frozen=True)
class Tokenizer:
    """chat_template: its text. template_source: where that came from. digest: sha256 of the tokenizer's files
    and of the template."""

    backend: Backend
    chat_template: str
    template_source: str
    digest: str

    @property
    def bos_id(self) -> int | None:
        """The id that must stand at the start of every sequence; None where the tokenizer uses none."""
        return self.backend.bos_id

    @property
    def eos_id(self) -> int:
        return self.backend.eos_id

    @property
    def unk_id(self) -> int | None:
        return self.backend.unk_id

    @property
    def eos_token(self) -> str:
        return self.backend.names["eos_token"]

    @property
    def vocab_size(self) -> int:
        """Highest id + 1."""
        return self.backend.vocab_size

    @cached_property
    def template(self) -> ChatTemplate:
        return ChatTemplate(self.chat_template, self.backend.names)

    @cached_property
    def special_pattern(self) -> re.Pattern[str]:
        """Matches any special token written out in text."""
        return any_of(self.backend.specials)

    @cached_property
    def turn_ends(self) -> Mapping[str, int]:
        """Tokens at which a turn of a conversation can end: every special token but the unknown one, which any
        text can give, and <|im_end|>, which some vocabularies have as an ordinary token."""
        im_end = self.backend.find(IM_END)
        known = {text: number for text, number in self.backend.specials.items() if number != self.unk_id}
        return known | ({} if im_end is None else {IM_END: im_end})

    def encode(self, text: str, add_bos: bool) -> list[int]:
        """Ids of `text`, never with an EOS that the text does not write. With add_bos and a tokenizer that
        uses BOS: exactly one at the start, also where the text writes its own."""
        ids = self.backend.encode(text)
        bos = self.bos_id
        if not add_bos or bos is None:
            return ids
        written = 0
        while written < len(ids) and ids[written] == bos:
            written += 1
        return [bos, *ids[written:]]

    def encode_apart(self, text: str) -> list[int] | None:
        """Ids of `text` as they are in the middle of a text, with no token shared with what stands before and
        without the space that sentencepiece puts at a beginning; None where that cannot be had."""
        for anchor, anchor_ids in self._anchors:
            ids = self.backend.encode(anchor + text)
            if ids[: len(anchor_ids)] == anchor_ids:
                return ids[len(anchor_ids) :]
        return None

    @cached_property
    def _anchors(self) -> tuple[tuple[str, list[int]], ...]:
        """Texts to encode `text` behind. One is of use if its own last token is known (an unknown token would
        swallow what follows) and no space slips in behind it."""
        candidates = ("", self.eos_token, "\n", ".", "a", "0")
        encoded = ((anchor, self.backend.encode(anchor)) for anchor in candidates)
        return tuple((anchor, ids) for anchor, ids in encoded if self._is_neutral(anchor, ids))

    def _is_neutral(self, anchor: str, anchor_ids: list[int]) -> bool:
        if anchor and (not anchor_ids or anchor_ids[-1] == self.unk_id):
            return False
        for probe in "xe7":
            ids = self.backend.encode(anchor + probe)
            after = ids[len(anchor_ids) : len(anchor_ids) + 1]
            follows = ids[: len(anchor_ids)] == anchor_ids and after
            if follows and self.backend.piece(after[0]).startswith(PREFIXES):
                return False
        return True


def load_tokenizer(path: str, chat_template: str | None) -> Tokenizer:
    """A Hugging Face folder, a folder that holds only a tokenizer.model, or a sentencepiece .model file.

    chat_template: a file with a Jinja template; where None, the folder's chat_template.jinja, else the one in
    tokenizer_config.json, else ChatML. Nothing from the folder is run as code. Raises TokenizerError.
    """
    place = Path(path).expanduser()
    folder = place.parent if place.is_file() else place
    files = tokenizer_files(place)
    names = {file.name for file in files}
    if place.is_file() or names == {"tokenizer.model"}:
        backend = load_sentencepiece(files[0])
        configured = None if place.is_file() else _configured_template(folder)
    else:
        backend = load_hugging_face(folder)
        configured = _configured_template(folder)
    if chat_template is not None:
        text, source = _read_text(Path(chat_template).expanduser()), chat_template
    elif configured is not None:
        text, source = configured
    else:
        text, source = chatml(backend.find(IM_END) is not None), "ChatML, as the model has no template"
    tokenizer = Tokenizer(backend, text, source, _digest(files, backend.kind, text))
    tokenizer.template  # noqa: B018  a template that does not compile is an error here, not at the first row
    return tokenizer


def padding_id(tokenizer: Tokenizer) -> int:
    """A token with which no response ends, for a program that looks for the last token that is not padding: the special
    token that says `pad`, else the unknown one, else the BOS. Raises TokenizerError where there is none."""
    backend = tokenizer.backend
    named = [number for text, number in backend.specials.items() if "pad" in text.lower()]
    bos = backend.specials.get(backend.names.get("bos_token", ""))
    choices = [number for number in (*named, backend.unk_id, bos) if number is not None and number != backend.eos_id]
    if not choices:
        raise TokenizerError(
            "the tokenizer has no special token that could serve as padding beside its EOS, so that transformers would "
            "take a reward one token too early; name a pad_token of its own in tokenizer_config.json"
        )
    return choices[0]


def check_vocabulary(tokenizer: Tokenizer, vocab_size_of_model: int) -> None:
    """Raises TokenizerError where an id of the tokenizer has no row in the model's embedding."""
    if tokenizer.vocab_size > vocab_size_of_model:
        raise TokenizerError(
            f"the tokenizer has ids up to {tokenizer.vocab_size - 1}, but the model's vocabulary has only "
            f"{vocab_size_of_model}; set data.tokenizer to the tokenizer that the model was trained with"
        )


def tokenizer_files(folder: Path) -> list[Path]:
    """What makes up the tokenizer of a folder, or the bare .model file that is given instead of one."""
    if folder.is_file():
        return [folder]
    if not folder.is_dir():
        raise TokenizerError(f"{folder}: no such folder or .model file; set data.tokenizer to one")
    files = sorted({file for pattern in FILES for file in folder.glob(pattern) if file.is_file()})
    if not files:
        raise TokenizerError(
            f"{folder}: no tokenizer here (tokenizer.json, tokenizer.model ...); set data.tokenizer to a "
            "folder that has one or to a sentencepiece .model file"
        )
    return files


def _configured_template(folder: Path) -> tuple[str, str] | None:
    """(text, file name). chat_template.jinja wins over tokenizer_config.json, as in transformers."""
    if (folder / "chat_template.jinja").is_file():
        return _read_text(folder / "chat_template.jinja"), "chat_template.jinja"
    config = folder / "tokenizer_config.json"
    if not config.is_file():
        return None
    try:
        template = json.loads(_read_text(config)).get("chat_template")
        named = {t["name"]: t["template"] for t in template} if isinstance(template, list) else {}
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise TokenizerError(f"{config}: not a tokenizer's configuration ({error}); fetch it again") from error
    if isinstance(template, list):
        if "default" not in named:
            raise TokenizerError(
                f"{config}: chat templates named {', '.join(named)}, none of them `default`; "
                "write the one to use into a file and set data.chat_template to it"
            )
        template = named["default"]
    return None if template is None else (str(template), "tokenizer_config.json")


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TokenizerError(f"{path}: cannot be read as text ({error})") from error


def _digest(files: list[Path], kind: str, template: str) -> str:
    """The kind counts, since config.json can have a say in which class reads the files."""
    digest = hashlib.sha256(f"{kind}\n".encode())
    for file in files:
        name = "tokenizer.model" if len(files) == 1 and file.suffix == ".model" else file.name
        digest.update(f"{name} {hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    digest.update(template.encode())
    return digest.hexdigest()
