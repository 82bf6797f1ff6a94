"""Whether a converted model computes what the Hugging Face model computes: logits of one text, at short and at long
positions, through transformers on one side and through Megatron-Core on the other.

Both sides compute in float32, from the same weights: where the conversion changed the dtype, transformers' weights are
rounded to it first. So one tolerance serves every dtype. (float32 logits of the two agree to about 1e-5; a wrong
epsilon, rotary base or norm moves them by more than 1e-3.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megadpo.convert.hf_files import HFFiles
from megadpo.convert.quantised import FIELD, open_folder
from megadpo.data.tokenizer import FILES, load_tokenizer
from megadpo.errors import MachineError, ModelError

TOLERANCE = 1e-4
TOKENS = 256
TEXT = """Once upon a time, in a village of 312 people, there lived an old clockmaker who had never been late.
"Why do you hurry?" asked the girl from the mill. He put down his glasses: "Because every minute that I lose is gone."
The café's naïve owner paid €3.50 for 2½ kg of Äpfel; 東京は今日も晴れです。 Привет, мир! مرحبا
def area(radius: float) -> float:
    return 3.14159 * radius ** 2  # square metres
Let f(x) = x^2 + 1. Then f'(x) = 2x, so f has its least value, 1, at x = 0. Q.E.D.
<b>Note:</b> results (see table 7, p. 41) were 12.5%, 0.04 and -1e-3; the others are "not available" [sic].
"""


@dataclass(frozen=True)
class Difference:
    """The largest difference between two models over one text."""

    logit: float
    """Of a raw logit."""
    nats: float
    """Of a log-probability."""
    position: int
    """Where the logit is."""
    token: int
    """The vocabulary's entry whose logit it is."""


def text_ids(folder: Path, vocab_size: int, count: int = TOKENS, text: str | None = None) -> list[int]:
    """`count` token ids of a text (TEXT where not given), repeated as often as it takes; of random tokens where the
    folder has no tokenizer."""
    if not any(file.is_file() for pattern in FILES for file in folder.glob(pattern)):
        return torch.randint(0, vocab_size, (count,), generator=torch.Generator().manual_seed(0)).tolist()
    ids = load_tokenizer(str(folder), None).encode(text or TEXT, add_bos=True)
    if not ids:
        raise ModelError(f"{folder}: its tokenizer makes no token of the text; give another text")
    return (ids * -(-count // len(ids)))[:count]


def positions(count: int, longest: int) -> list[list[int]]:
    """Where the text stands: at the beginning; and half at the beginning, half at the end of the `longest` positions
    that the model was made for, so that near and far tokens meet."""
    head = count // 2
    return [list(range(count)), [*range(head), *range(max(longest, count) - (count - head), max(longest, count))]]


@torch.no_grad()
def transformers_logits(
    folder: Path,
    ids: Sequence[int],
    where: Sequence[Sequence[int]],
    dtype: torch.dtype | None = None,
    files: HFFiles | None = None,
) -> list[Tensor]:
    """float32 [len(ids), vocabulary] for each list of positions, by transformers.

    dtype: what weights are rounded to first. files: where merged weights are read from, if any are. Quantised weights
    are decoded here: on a CPU transformers reads FP8 only where the blocks divide the matrix, and rounds to bfloat16.
    MachineError: transformers is missing; ModelError: it cannot load or compute the model. Code of the folder is never
    run.
    """
    files = files or open_folder(folder)
    model = _load(folder, None if type(files) is HFFiles else _tensors(files))
    if dtype is not None:
        for weight in model.parameters():
            weight.copy_(weight.to(dtype))
    tokens = torch.tensor([list(ids)])
    # The mask says that this is one text; gaps in the positions would otherwise be taken for borders between texts.
    mask = torch.ones_like(tokens)
    try:
        return [model(tokens, attention_mask=mask, position_ids=torch.tensor([list(at)])).logits[0] for at in where]
    except Exception as error:  # transformers raises all kinds
        raise ModelError(f"{folder}: transformers cannot compute it: {_line(error)}") from error


def _tensors(files: HFFiles) -> dict[str, Tensor]:
    return {name: files.slice(name)[tuple(slice(0, n) for n in files.stored(name).shape)] for name in files.where}


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _load(folder: Path, tensors: dict[str, Tensor] | None) -> Any:
    """tensors: instead of those of the folder's files."""
    try:
        import transformers
    except ImportError as error:
        raise MachineError("--verify needs transformers: pip install 'transformers>=5.3'") from error
    try:
        if tensors is None:
            model = transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, trust_remote_code=False, local_files_only=True
            )
        else:
            config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
            if hasattr(config, FIELD):
                delattr(config, FIELD)
            kind = getattr(transformers, config.architectures[0])
            model = kind.from_pretrained(None, config=config, state_dict=tensors, dtype=torch.float32)
    except Exception as error:  # transformers raises all kinds
        raise ModelError(f"{folder}: transformers cannot load it: {_line(error)}") from error
    return model.eval()


def compare(theirs: Tensor, ours: Tensor, where: Sequence[int]) -> Difference:
    """Two [tokens, vocabulary] arrays of logits; `where`: the tokens' positions. A NaN is an infinite difference."""
    if theirs.shape != ours.shape:
        raise ModelError(f"logits have shapes {tuple(theirs.shape)} and {tuple(ours.shape)}: another vocabulary")
    apart = (theirs - ours).abs().nan_to_num(nan=float("inf"))
    row, token = divmod(int(apart.argmax()), apart.shape[1])
    nats = (theirs.log_softmax(-1) - ours.log_softmax(-1)).abs().nan_to_num(nan=float("inf"))
    return Difference(float(apart.max()), float(nats.max()), where[row], token)
