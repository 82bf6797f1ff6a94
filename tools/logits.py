"""The model's logits on a text, here and in transformers.

    python tools/logits.py --model HF_DIR --data pairs.jsonl [--tokens 512]

Takes the text of the prompts and chosen answers, cut at so many tokens, and prints the largest difference over all
positions and the whole vocabulary, in float32. Exit code 1 where it is over --limit (1e-4).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from megadpo.observe.quiet import quiet


def words(value: str | list[dict[str, str]]) -> str:
    """Plain text, or what the turns of a conversation say."""
    return value if isinstance(value, str) else " ".join(turn["content"] for turn in value)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", required=True, type=Path, help="Hugging Face folder")
    parser.add_argument("--data", required=True, type=Path, help="JSON lines with columns prompt and chosen")
    parser.add_argument("--tokens", type=int, default=512, help="length of the text")
    parser.add_argument("--limit", type=float, default=1e-4)
    args = parser.parse_args(argv)
    from megadpo.convert.families import read_shape
    from megadpo.convert.verify import compare, transformers_logits
    from megadpo.data.tokenizer import load_tokenizer
    from megadpo.model.logits import folder_logits

    rows = [json.loads(line) for line in args.data.read_text().splitlines()]
    text = "\n".join(words(row["prompt"]) + words(row["chosen"]) for row in rows)
    with quiet():
        ids = load_tokenizer(str(args.model), None).encode(text, add_bos=True)[: args.tokens]
        where = [list(range(len(ids)))]
        [theirs] = transformers_logits(args.model, ids, where)
        [ours] = folder_logits(read_shape(args.model), args.model, ids, where)
        difference = compare(theirs, ours, where[0]).logit
    print(
        f"logits on {len(ids)} tokens: largest difference from transformers {difference:.1e} (limit {args.limit:.0e})"
    )
    return 0 if difference <= args.limit else 1


if __name__ == "__main__":
    sys.exit(main())
