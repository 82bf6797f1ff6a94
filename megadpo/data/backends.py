"""The two kinds of tokenizer that a model can come with, behind one set of functions."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megadpo.errors import TokenizerError


@dataclass(frozen=True)
class Backend:
    """What the two kinds of tokenizer have in common. kind: the class that reads it.

    encode: text to ids, without BOS or EOS; special tokens written in the text become their ids.
    piece: id to the spelling in the vocabulary. find: the id of a text that is one token, or None.
    specials: text of every special token and its id. names: bos_token, eos_token ... as templates know them.
    bos_id is None where the tokenizer does not put a BOS in front of text by itself.
    """

    encode: Callable[[str], list[int]]
    piece: Callable[[int], str]
    find: Callable[[str], int | None]
    specials: Mapping[str, int]
    names: Mapping[str, str]
    bos_id: int | None
    eos_id: int
    unk_id: int | None
    vocab_size: int
    kind: str


def load_hugging_face(folder: Path) -> Backend:
    from transformers import AutoTokenizer  # two seconds that a sentencepiece model does not need

    try:
        loaded: Any = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    except Exception as error:  # transformers has no common class for what can be wrong with a folder
        message = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise TokenizerError(f"{folder}: the tokenizer cannot be loaded ({message}); fetch its files again") from error
    if loaded.eos_token_id is None:
        raise TokenizerError(
            f"{folder}: the tokenizer has no EOS, so a response could not end; name `eos_token` in "
            "tokenizer_config.json"
        )

    loaded.model_max_length = 10**30  # or transformers warns of texts that max_length has not cut yet

    def encode(text: str) -> list[int]:
        return list(loaded.encode(text, add_special_tokens=False))

    def find(text: str) -> int | None:
        return vocabulary.get(text)

    vocabulary: dict[str, int] = loaded.get_vocab()
    added = {str(token): int(number) for number, token in loaded.added_tokens_decoder.items() if token.special}
    named = {text: vocabulary[text] for text in loaded.all_special_tokens if text in vocabulary}
    bos = loaded.bos_token_id
    adds_bos = bos is not None and loaded.encode("x")[:1] == [bos] and encode("x")[:1] != [bos]
    return Backend(
        encode=encode,
        piece=lambda number: str(loaded.convert_ids_to_tokens(number)),
        find=find,
        specials=added | named,
        names={name: text for name, text in loaded.special_tokens_map.items() if isinstance(text, str)},
        bos_id=bos if adds_bos else None,
        eos_id=int(loaded.eos_token_id),
        unk_id=loaded.unk_token_id,
        vocab_size=max(len(loaded), max(vocabulary.values()) + 1),
        kind=type(loaded).__name__,
    )


def load_sentencepiece(path: Path) -> Backend:
    """The model itself, and not what AutoTokenizer makes of a folder that holds nothing else: that loses the
    space at the beginning and the BOS (seen with transformers 5.23)."""
    from sentencepiece import SentencePieceProcessor

    try:
        model = path.read_bytes()
        at_start = SentencePieceProcessor(model_proto=model)
        # Serialised messages in a row are merged; this one is normalizer_spec.add_dummy_prefix = false.
        inside = SentencePieceProcessor(model_proto=model + b"\x1a\x02\x18\x00")
    except (OSError, RuntimeError) as error:
        raise TokenizerError(f"{path}: not a sentencepiece model ({error}); fetch it again") from error
    bos, eos, unk = at_start.bos_id(), at_start.eos_id(), at_start.unk_id()
    if eos < 0:
        raise TokenizerError(f"{path}: the sentencepiece model has no EOS, so a response could not end")
    size = at_start.vocab_size()
    specials = {at_start.id_to_piece(i): i for i in range(size) if at_start.is_control(i)}
    pattern = re.compile(f"({any_of(specials).pattern})")

    def encode(text: str) -> list[int]:
        """sentencepiece itself never reads a control symbol from text, but templates write them."""
        ids: list[int] = []
        for number, part in enumerate(pattern.split(text)):
            if number % 2:
                ids.append(specials[part])
            elif part:
                ids += (inside if ids else at_start).encode(part)
        return ids

    def find(text: str) -> int | None:
        number = at_start.piece_to_id(text)
        return None if number == unk else int(number)

    ids_by_name = {"bos_token": bos, "eos_token": eos, "unk_token": unk, "pad_token": at_start.pad_id()}
    return Backend(
        encode=encode,
        piece=at_start.id_to_piece,
        find=find,
        specials=specials,
        names={name: at_start.id_to_piece(number) for name, number in ids_by_name.items() if number >= 0},
        bos_id=bos if bos >= 0 else None,
        eos_id=eos,
        unk_id=unk,
        vocab_size=size,
        kind="SentencePieceProcessor",
    )


def any_of(texts: Mapping[str, int]) -> re.Pattern[str]:
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
