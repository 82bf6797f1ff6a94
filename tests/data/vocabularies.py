"""Small tokenizers of every family, trained on a few lines."""

import io
from collections.abc import Callable, Sequence
from pathlib import Path

import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

LINES = (
    "The little cat sat on the mat and looked at the big red ball.",
    "What is the answer? The answer is 42, and that is all.",
    "One day, a girl named Lily went to the park with her mom.",
    "def f(x):\n    return x + 1\n\nprint(f(41))",
    "I'm sure that you're right; it's theirs, isn't it?",
    "Grüße aus Köln, wo die Straße nass ist.",
    "user assistant system im_start im_end INST USER ASSISTANT <think> </think> [/INST]",
    "Be brief. Be kind. Who is Lily? A chat. Today: 26 Jul 2024 Obey All right SYS <|im| ### 0123456789",
) * 4
SPECIALS = ("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")


def save(
    tokenizer: Tokenizer,
    folder: Path,
    *,
    bos: str | None = None,
    eos: str = "</s>",
    unk: str | None = None,
    pad: str | None = None,
    template: str | None = None,
    adds_bos: bool = False,
) -> Path:
    """As a Hugging Face folder. adds_bos: the tokenizer puts the BOS in front of text by itself."""
    if adds_bos:
        from tokenizers.processors import TemplateProcessing

        tokenizer.post_processor = TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, unk_token=unk, pad_token=pad
    )
    if template is not None:
        fast.chat_template = template
    fast.save_pretrained(str(folder))
    return folder


def byte_level(specials: Sequence[str] = ("</s>",), add_prefix_space: bool = False, size: int = 600) -> Tokenizer:
    """GPT-2's kind. Special tokens get the first ids, in their order."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(specials),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(LINES, trainer)
    return tokenizer


def metaspace_bpe(legacy: bool, size: int = 300) -> Tokenizer:
    """Llama 2's kind: one run of characters, spaces as \u2581, no pre-tokeniser that would stop merges.

    legacy: the leading space is put in front of every piece of text between special tokens, and a newline is
    an unknown character.
    """
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    if legacy:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=list(SPECIALS), show_progress=False)
    lines = [line for text in LINES for line in text.split("\n")] if legacy else LINES
    tokenizer.train_from_iterator(lines, trainer)
    return tokenizer


def unigram(size: int = 200) -> Tokenizer:
    """T5's kind."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    trainer = trainers.UnigramTrainer(
        vocab_size=size, special_tokens=list(SPECIALS), unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(LINES, trainer)
    return tokenizer


def word_level() -> Tokenizer:
    """One token per word; whitespace is lost, and a word that it does not know hides all of its text."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(LINES, trainers.WordLevelTrainer(special_tokens=list(SPECIALS), show_progress=False))
    return tokenizer


def sentencepiece_model(path: Path, **options: object) -> Path:
    """A bare .model file."""
    model = io.BytesIO()
    settings = {
        "model_type": "bpe",
        "vocab_size": 400,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "hard_vocab_limit": False,
        "minloglevel": 2,
    } | options
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in LINES for line in text.split("\n")),
        model_writer=model,
        **settings,
    )
    path.write_bytes(model.getvalue())
    return path


def control_token(text: str) -> AddedToken:
    return AddedToken(text, special=True, normalized=False)


FAMILIES: dict[str, Callable[[Path], Path]] = {
    "byte_level": lambda folder: save(byte_level(), folder),
    "byte_level_prefix_space": lambda folder: save(byte_level(add_prefix_space=True), folder),
    "metaspace_bpe": lambda folder: save(metaspace_bpe(legacy=False), folder, bos="<s>", unk="<unk>", adds_bos=True),
    "metaspace_bpe_legacy": lambda folder: save(
        metaspace_bpe(legacy=True), folder, bos="<s>", unk="<unk>", adds_bos=True
    ),
    "unigram": lambda folder: save(unigram(), folder, unk="<unk>"),
    "word_level": lambda folder: save(word_level(), folder, unk="<unk>"),
    "sentencepiece_bpe": lambda folder: sentencepiece_model(folder / "m.model"),
    "sentencepiece_unigram": lambda folder: sentencepiece_model(
        folder / "m.model",
        model_type="unigram",
        vocab_size=120,
        byte_fallback=False,
        normalization_rule_name="nmt_nfkc",
        remove_extra_whitespaces=True,
    ),
}
