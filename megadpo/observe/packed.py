"""A packed stream drawn for a terminal: which token belongs to whom, what is scored, what attends to what."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from rich.text import Text

COLOURS = ("cyan", "yellow", "magenta", "green", "blue", "red")
GAP = "  "


@dataclass(frozen=True)
class Part:
    """Rows [start, end) of a stream; they attend to the prefix (first row, end) and causally to each other."""

    group: int
    branch: str
    start: int
    end: int
    prefix: tuple[int, int]


def stream_text(
    parts: Sequence[Part],
    tokens: Sequence[int],
    positions: Sequence[int],
    targets: Mapping[int, int],
    piece: Callable[[int], str],
    width: int,
    ids: bool = False,
) -> Text:
    """The parts one after the other, each with a head line and its tokens in lines of at most `width` columns.

    A row is drawn as POSITION TOKEN, and TOKEN->PREDICTED in bold where it is scored. targets: row -> the token that it
    must predict. Groups differ in colour, and all that a colour says stands there in words too. ids: tokens with their
    numbers.
    """

    def word(token: int) -> str:
        shown = piece(token).replace("\n", "\\n").replace("\t", "\\t")
        return f"{shown}:{token}" if ids else shown

    text = Text()
    colours = {group: COLOURS[i % len(COLOURS)] for i, group in enumerate(dict.fromkeys(p.group for p in parts))}
    for part in parts:
        rows = range(part.start, part.end)
        scored = sum(row in targets for row in rows)
        colour = colours[part.group]
        text.append(f"group {part.group} {part.branch}", style=f"reverse {colour}")
        text.append(f"{GAP}{_span('row', rows)}{GAP}{_span('position', [positions[row] for row in rows])}")
        text.append(f"{GAP}{_attends(part)}{GAP}{scored} scored\n" if scored else f"{GAP}{_attends(part)}\n")
        cells = [
            f"{positions[row]} {word(tokens[row])}" + (f"->{word(targets[row])}" if row in targets else "")
            for row in rows
        ]
        column = 0
        for row, cell in zip(rows, cells, strict=True):
            if column + len(GAP) + len(cell) > width and column:
                text.append("\n")
                column = 0
            text.append(GAP)
            text.append(cell, style=f"bold {colour}" if row in targets else colour)
            column += len(GAP) + len(cell)
        text.append("\n")
    text.rstrip()
    return text


def _span(word: str, numbers: Sequence[int]) -> str:
    """row 4, rows 4-9."""
    return f"{word} {numbers[0]}" if len(numbers) == 1 else f"{word}s {numbers[0]}-{numbers[-1]}"


def _attends(part: Part) -> str:
    first, end = part.prefix
    if first == end:
        return "attends to its own rows"
    return f"attends to {_span('row', range(first, end))} and its own"
