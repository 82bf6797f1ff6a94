"""A group as the model sees it: its tokens, with those that are scored marked."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.text import Text

NAMES = {1: ("response",), 2: ("chosen", "rejected")}


def branch_names(responses: int) -> tuple[str, ...]:
    """What the responses of a group are called."""
    return NAMES.get(responses, tuple(f"response {number}" for number in range(1, responses + 1)))


def group_text(
    title: str,
    prompt: Sequence[int],
    responses: Sequence[Sequence[int]],
    piece: Callable[[int], str],
    ids: bool = False,
    scored: Sequence[Sequence[bool]] | None = None,
) -> Text:
    """The group in lines for a terminal: tokens parted by |, scored ones bold.

    ids: every token with its number. scored: which of each response's tokens are; all where not given.
    """
    names = branch_names(len(responses))
    every = [[True] * len(tokens) for tokens in responses] if scored is None else scored
    parts = [("prompt", prompt, [False] * len(prompt)), *zip(names, responses, every, strict=True)]
    text = Text(title + "\n")
    for name, tokens, marks in parts:
        how_many = "scored" if all(marks) else f"{sum(marks)} scored" if any(marks) else "not scored"
        text.append(f"{name}: {len(tokens)} tokens, {how_many}\n")
        for number, token in enumerate(tokens):
            text.append("|" if number else "  ", style="dim")
            shown = piece(int(token)).replace("\n", "\\n").replace("\t", "\\t")
            text.append(f"{shown}:{token}" if ids else shown, style="bold green" if marks[number] else "")
        text.append("\n")
    text.rstrip()
    return text
