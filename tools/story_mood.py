"""Do the stories get happier? Samples stories from two models and counts happy minus sad words.

    python tools/story_mood.py --before MODEL_DIR --after EXPORT_DIR --data ../shared/data/stories_pairs_eval.jsonl

Both models continue the same prompts with the same random numbers. Prints the mean score of each, the mean difference
prompt by prompt and its standard error. Exit code 1 where the difference is not over two standard errors.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

HAPPY = {
    "happy", "joy", "joyful", "smile", "smiled", "smiling", "smiles", "laugh", "laughed", "laughing", "love", "loved",
    "loves", "fun", "excited", "friend", "friends", "hug", "hugged", "glad", "proud", "play", "played", "playing",
    "nice", "kind", "good", "great", "beautiful", "wonderful", "best", "enjoyed", "thankful", "cheerful",
}  # fmt: skip
SAD = {
    "sad", "cry", "cried", "crying", "scared", "afraid", "angry", "mad", "lost", "hurt", "bad", "broke", "broken",
    "alone", "lonely", "worried", "upset", "sorry", "mean", "tears", "fell", "unhappy", "pain", "hate", "died", "dark",
}  # fmt: skip


def mood(text: str) -> int:
    """Happy words minus sad words."""
    words = re.findall(r"[a-z]+", text.lower())
    return sum(word in HAPPY for word in words) - sum(word in SAD for word in words)


def moods(folder: Path, prompts: Sequence[str], samples: int, tokens: int) -> list[float]:
    """Mean mood over `samples` sampled stories of at most `tokens` new tokens, for each prompt."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    scores = []
    for seed, prompt in enumerate(prompts):
        ids = torch.tensor([tokenizer(prompt)["input_ids"]] * samples)
        torch.manual_seed(seed)
        stories = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            max_new_tokens=tokens,
            pad_token_id=tokenizer.eos_token_id,
        )
        texts = tokenizer.batch_decode(stories[:, ids.shape[1] :], skip_special_tokens=True)
        scores.append(statistics.mean(mood(text) for text in texts))
    return scores


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--before", required=True, type=Path, help="Hugging Face folder")
    parser.add_argument("--after", required=True, type=Path, help="Hugging Face folder")
    parser.add_argument("--data", required=True, type=Path, help="JSON lines with a column prompt")
    parser.add_argument("--samples", type=int, default=8, help="stories per prompt")
    parser.add_argument("--tokens", type=int, default=96, help="most new tokens of a story")
    args = parser.parse_args(argv)
    rows = [json.loads(line) for line in args.data.read_text().splitlines()]
    prompts = list(dict.fromkeys(row["prompt"] for row in rows))
    before, after = (moods(folder, prompts, args.samples, args.tokens) for folder in (args.before, args.after))
    differences = [b - a for a, b in zip(before, after, strict=True)]
    gain = statistics.mean(differences)
    error = statistics.stdev(differences) / len(differences) ** 0.5
    print(f"{len(prompts)} prompts, {args.samples} stories each of at most {args.tokens} tokens; happy minus sad words")
    print(f"before {statistics.mean(before):.2f}   after {statistics.mean(after):.2f}   gain {gain:.2f} +- {error:.2f}")
    return 0 if gain > 2 * error else 1


if __name__ == "__main__":
    sys.exit(main())
