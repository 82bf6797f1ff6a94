"""The model's logits on a text, here and in transformers.

    python tools/logits.py --model HF_DIR --data pairs.jsonl [--tokens 512]

Takes the text of the prompts and chosen answers, cut at so many tokens, and prints the largest difference over all
positions and the whole vocabulary, in float32. Exit code 1 where it is over --limit (1e-4).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from megadpo.observe.quiet import quiet


def words(value: str | list[dict[str, str]]) -> str:
    """Plain text, or what the turns of a conversation say."""
    return value if isinstance(value, str) else " ".join(turn["content"] for turn in value)


def ours(folder: Path, ids: Sequence[int]) -> torch.Tensor:
    """float32 [tokens, vocabulary] through Megatron-Core, in this process alone."""
    from megadpo.config import ParallelConfig
    from megadpo.convert.families import read_shape
    from megadpo.convert.importer import load_hf
    from megadpo.model.build import build_chunks
    from megadpo.model.logits import text_logits
    from megadpo.parallel.context import grid, join_world

    with tempfile.TemporaryDirectory() as meeting:
        device = join_world(0, 1, 0, f"file://{meeting}/rendezvous")
        with grid(ParallelConfig(), device, 0) as context:
            shape = read_shape(folder)
            chunks = build_chunks(shape, ParallelConfig(), context, "float32")
            load_hf(chunks, shape, folder)
            found = text_logits(chunks[0], ids, context).cpu()
        torch.distributed.destroy_process_group()
    return found


def theirs(folder: Path, ids: Sequence[int]) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(torch.tensor([list(ids)])).logits[0]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", required=True, type=Path, help="Hugging Face folder")
    parser.add_argument("--data", required=True, type=Path, help="JSON lines with columns prompt and chosen")
    parser.add_argument("--tokens", type=int, default=512, help="length of the text")
    parser.add_argument("--limit", type=float, default=1e-4)
    args = parser.parse_args(argv)
    from megadpo.data.tokenizer import load_tokenizer

    rows = [json.loads(line) for line in args.data.read_text().splitlines()]
    text = "\n".join(words(row["prompt"]) + words(row["chosen"]) for row in rows)
    with quiet():
        ids = load_tokenizer(str(args.model), None).encode(text, add_bos=True)[: args.tokens]
        difference = float((ours(args.model, ids) - theirs(args.model, ids)).abs().max())
    print(
        f"logits on {len(ids)} tokens: largest difference from transformers {difference:.1e} (limit {args.limit:.0e})"
    )
    return 0 if difference <= args.limit else 1


if __name__ == "__main__":
    sys.exit(main())
