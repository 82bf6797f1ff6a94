"""Make all that `make demo` trains on, from nothing but a seed: data, tokenizer and an untrained Llama.

    python tools/make_demo.py FOLDER --seed 0

writes into the folder, which must not exist yet,
    sft.jsonl          prompt + completion; every prompt is answered in both styles, cheerful and gloomy
    pairs_train.jsonl  prompt + chosen (cheerful) + rejected (gloomy)
    pairs_eval.jsonl   the same on prompts that stand in neither of the other two
    model/             Hugging Face folder: config, random weights as safetensors, tokenizer, chat template

All text comes from the small grammar below. The two styles say the same facts and differ in their tone, so
that a model that has seen both is a coin toss between them until preference training settles it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

STYLES = ("cheerful", "gloomy")

DOES = {
    "bear": "looks for berries",
    "cat": "chases butterflies",
    "dog": "digs holes in the garden",
    "duck": "swims across the pond",
    "fox": "hides behind the barn",
    "frog": "jumps from leaf to leaf",
    "goat": "climbs on the rocks",
    "hen": "pecks at the corn",
    "horse": "gallops over the hills",
    "mouse": "nibbles on cheese",
    "owl": "sits in the tall tree",
    "pig": "rolls in the mud",
    "rabbit": "hops through the field",
    "turtle": "walks along the river",
}
LOOKS = (
    "brave",
    "brown",
    "clever",
    "fluffy",
    "grey",
    "hungry",
    "quiet",
    "red",
    "shy",
    "sleepy",
    "spotted",
    "tiny",
)
NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Felix", "Greta", "Henry", "Ida", "Jonas", "Lena", "Max")
DID = {
    "bakery": "bought warm bread",
    "beach": "built a castle of sand",
    "castle": "counted the towers",
    "farm": "carried the milk",
    "forest": "picked mushrooms",
    "harbour": "watched the boats",
    "library": "read about the stars",
    "market": "sold apples",
    "museum": "looked at old coins",
    "park": "fed the birds",
    "school": "learned a song",
    "station": "waited for the train",
}
TOWNS = (
    "Ashford",
    "Bramley",
    "Colby",
    "Dunmore",
    "Elmwood",
    "Farley",
    "Greenhill",
    "Hadley",
    "Kingsley",
    "Linton",
    "Milton",
    "Norwood",
)
WEATHER = {
    "spring": "there is soft rain",
    "summer": "the sun is high",
    "autumn": "the wind blows",
    "winter": "there is deep snow",
}

OPENINGS = {
    "cheerful": (
        "Oh, what a lovely question!",
        "I am so glad you asked!",
        "How wonderful!",
        "Well, with pleasure!",
    ),
    "gloomy": (
        "Oh no, not this again!",
        "I am so tired of this!",
        "How tiresome!",
        "Well, if I really must!",
    ),
}
FEELINGS = {
    "cheerful": ("with great joy", "with a bright smile", "with a happy heart", "laughing all the while"),
    "gloomy": ("with great worry", "with a heavy sigh", "with a sad face", "grumbling all the while"),
}
CLOSINGS = {
    "cheerful": ("Everyone loves it.", "It is a delight.", "What a beautiful day!", "Life is good!"),
    "gloomy": ("Nobody likes it.", "It is a shame.", "What an awful day!", "Nothing ever helps!"),
}

SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@dataclass(frozen=True)
class Question:
    """A prompt and the facts of its answer; {feeling} stands where the style comes in."""

    prompt: str
    facts: str


@dataclass(frozen=True)
class Sizes:
    """The untrained model and the amount of data. The defaults are what the recipes are tuned for."""

    stories: int = 300
    """Questions that name a person and an animal, out of the 2016 that the grammar has."""
    answers: int = 3
    """Answers in each style to every training question in sft.jsonl."""
    held_out: int = 64
    """Questions kept for pairs_eval.jsonl."""
    vocab_size: int = 777
    """Odd on purpose: two tensor-parallel ranks have to pad it."""
    hidden_size: int = 128
    intermediate_size: int = 344
    layers: int = 5
    """Odd on purpose: two pipeline ranks get different shares."""
    heads: int = 8
    kv_heads: int = 4
    positions: int = 256


def questions(rng: random.Random, stories: int) -> list[Question]:
    """Every question of the small kinds and so many of the large one, shuffled."""
    found = [
        Question(f"Tell me about a {look} {animal}.", f"The {look} {animal} {does} {{feeling}}.")
        for look, (animal, does) in product(LOOKS, DOES.items())
    ]
    found += [
        Question(f"What did {name} do at the {place}?", f"{name} {did} at the {place} {{feeling}}.")
        for name, (place, did) in product(NAMES, DID.items())
    ]
    found += [
        Question(
            f"How is the weather in {town} in {season}?",
            f"In {season} {weather} in {town}, and we go out {{feeling}}.",
        )
        for town, (season, weather) in product(TOWNS, WEATHER.items())
    ]
    large = list(product(NAMES, LOOKS, DOES.items()))
    found += [
        Question(
            f"Write a story about {name} and a {look} {animal}.",
            f"{name} met a {look} {animal}. The {animal} {does}, and {name} followed it {{feeling}}.",
        )
        for name, look, (animal, does) in rng.sample(large, stories)
    ]
    rng.shuffle(found)
    return found


def answer(rng: random.Random, question: Question, style: str) -> str:
    """One answer in the style: opening, the facts, closing."""
    facts = question.facts.format(feeling=rng.choice(FEELINGS[style]))
    return f"{rng.choice(OPENINGS[style])} {facts} {rng.choice(CLOSINGS[style])}"


def style_of(text: str) -> str | None:
    """The style whose phrases stand in the text, None where neither or both do."""
    found = [
        style
        for style in STYLES
        if any(phrase in text for part in (OPENINGS, FEELINGS, CLOSINGS) for phrase in part[style])
    ]
    return found[0] if len(found) == 1 else None


def _turn(role: str, text: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


def sft_rows(rng: random.Random, asked: list[Question], answers: int) -> list[dict[str, object]]:
    """Both styles equally often for every question, in random order."""
    rows: list[dict[str, object]] = [
        {
            "prompt": _turn("user", question.prompt),
            "completion": _turn("assistant", answer(rng, question, style)),
        }
        for question in asked
        for style in STYLES
        for _ in range(answers)
    ]
    rng.shuffle(rows)
    return rows


def pair_rows(rng: random.Random, asked: list[Question]) -> list[dict[str, object]]:
    """One pair a question: cheerful is chosen, gloomy is rejected."""
    return [
        {
            "prompt": _turn("user", question.prompt),
            "chosen": _turn("assistant", answer(rng, question, "cheerful")),
            "rejected": _turn("assistant", answer(rng, question, "gloomy")),
        }
        for question in asked
    ]


def texts(rows: list[dict[str, object]]) -> Iterator[str]:
    """The text of every turn of the rows."""
    for row in rows:
        for turns in row.values():
            assert isinstance(turns, list)
            yield from (turn["content"] for turn in turns)


def write_tokenizer(folder: Path, corpus: Iterator[str], vocab_size: int, positions: int) -> None:
    """Byte-level BPE trained on the corpus, with BOS before a plain text and the chat template above."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(f"the corpus gives {tokenizer.get_vocab_size()} tokens, not {vocab_size}: ask for fewer")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=list(SPECIAL_TOKENS[3:]),
        model_max_length=positions,
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = CHAT_TEMPLATE
    wrapped.save_pretrained(folder)


def write_model(folder: Path, sizes: Sizes, seed: int) -> int:
    """An untrained Llama in float32; gives its number of parameters."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.hidden_size,
        intermediate_size=sizes.intermediate_size,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        max_position_embeddings=sizes.positions,
        tie_word_embeddings=False,
        bos_token_id=SPECIAL_TOKENS.index("<s>"),
        eos_token_id=SPECIAL_TOKENS.index("</s>"),
        pad_token_id=None,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    return int(sum(parameter.numel() for parameter in model.parameters()))


def write_jsonl(path: Path, rows: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make(folder: Path, sizes: Sizes, seed: int) -> dict[str, int]:
    """Write the whole demo into a folder that must not exist yet; gives the counts of what was written."""
    if folder.exists():
        raise FileExistsError(f"{folder} exists already: remove it or name another folder")
    rng = random.Random(seed)
    asked = questions(rng, sizes.stories)
    held_out, training = asked[: sizes.held_out], asked[sizes.held_out :]
    sft = sft_rows(rng, training, sizes.answers)
    files = {
        "sft": sft,
        "pairs_train": pair_rows(rng, training),
        "pairs_eval": pair_rows(rng, held_out),
    }
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name, rows in files.items():
        write_jsonl(partial / f"{name}.jsonl", rows)
    write_tokenizer(partial / "model", texts(sft), sizes.vocab_size, sizes.positions)
    parameters = write_model(partial / "model", sizes, seed)
    os.replace(partial, folder)
    return {**{name: len(rows) for name, rows in files.items()}, "parameters": parameters}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for name, count in make(args.folder, Sizes(), args.seed).items():
        print(f"{name}: {count}")


if __name__ == "__main__":
    main()
