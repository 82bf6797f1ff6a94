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
) -> Text:
    """The group in lines for a terminal: tokens parted by |, scored ones bold.

    ids: every token with its number.
    """
    names = branch_names(len(responses))
    parts = [("prompt", prompt, False)]
    parts += [(name, tokens, True) for name, tokens in zip(names, responses, strict=True)]
    text = Text(title + "\n")
    for name, tokens, scored in parts:
        text.append(f"{name}: {len(tokens)} tokens, {'scored' if scored else 'not scored'}\n")
        for number, token in enumerate(tokens):
            text.append("|" if number else "  ", style="dim")
            shown = piece(int(token)).replace("\n", "\\n").replace("\t", "\\t")
            text.append(f"{shown}:{token}" if ids else shown, style="bold green" if scored else "")
        text.append("\n")
    text.rstrip()
    return text
