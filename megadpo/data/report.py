"""What became of the rows of a data set: counted, and the first few of each kind named."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from megadpo.data.records import Dropped, Group
from megadpo.data.tokenize import Tokenized

EXAMPLES = 3
"""Rows that are named for each reason."""
CUT = "cut to length"
CUT_TO_BUDGET = "cut to the token budget"


@dataclass(frozen=True)
class PrepareReport:
    """What became of the rows. dropped: reason -> groups. examples: reason (or CUT, CUT_TO_BUDGET) -> the first few
    origins.

    truncated: groups cut to a limit. responses_cut: those of them in which a response lost its end. over_budget: those
    of them that were cut to batch.micro_batch_tokens.
    boundary_splits, headers_scored: see tokenize.Tokenized. converted: rows of another kind, into so many made groups.
    desirable: groups with that label, None where there are no labels. scored: groups whose responses have scores; tied:
    those in which two have the same; against: pairs whose rejected response has the higher one.
    template: where the chat template came from, or
    "none". formats: names of the record formats, in the order they were met.
    """

    rows_read: int
    groups: int
    dropped: dict[str, int]
    examples: dict[str, list[str]]
    truncated: int
    responses_cut: int
    over_budget: int
    boundary_splits: int
    headers_scored: int
    template: str
    formats: list[str]
    seconds: float
    converted: int = 0
    made: int = 0
    desirable: int | None = None
    scored: int = 0
    tied: int = 0
    against: int = 0

    def lines(self) -> list[str]:
        """For the log: one line for what was kept, and one for each thing that the user may want to know."""
        formats = " and ".join(self.formats)
        lines = [f"{self.rows_read} rows read as {formats}, {self.groups} groups kept, in {self.seconds:.1f} s"]
        if self.converted:
            lines.append(f"{self.converted} rows converted into {self.made} groups (data.convert)")
        if self.desirable is not None:
            lines.append(f"{self.desirable} groups labelled desirable, {self.groups - self.desirable} undesirable")
        if self.scored:
            lines.append(
                f"{self.scored} groups with scores: {self.tied} of them have ties, in {self.against} pairs the "
                "rejected response has the higher score"
            )
        if self.template != "none":
            lines.append(f"chat template: {self.template}")
        for reason, count in sorted(self.dropped.items(), key=lambda item: -item[1]):
            lines.append(f"{count} dropped: {reason} ({self._named(reason, count)})")
        if self.truncated:
            lines.append(
                f"{self.truncated} groups cut to length, {self.responses_cut} of them at the end of a response "
                f"({self._named(CUT, self.truncated)})"
            )
        if self.over_budget:
            lines.append(
                f"{self.over_budget} of them cut to batch.micro_batch_tokens, the others to data.max_length "
                f"({self._named(CUT_TO_BUDGET, self.over_budget)})"
            )
        if self.boundary_splits:
            lines.append(
                f"{self.boundary_splits} responses tokenised apart from their prompt, as one token would "
                "have held text of both"
            )
        if self.headers_scored:
            lines.append(
                f"{self.headers_scored} groups in which the assistant's header counts as response, as the "
                "chat template writes another one for generation"
            )
        return lines

    def _named(self, reason: str, count: int) -> str:
        named = self.examples[reason]
        return ", ".join(named) + (", ..." if count > len(named) else "")


class Tally:
    """Counts what became of the rows."""

    def __init__(self) -> None:
        self.rows = 0
        """Read so far; several processes are fed ahead of what is done."""
        self.done = 0
        """Groups, kept or dropped."""
        self._counts: Counter[str] = Counter()
        self._dropped: Counter[str] = Counter()
        self._examples: dict[str, list[str]] = {}
        self._formats: dict[str, None] = {}

    def note_format(self, name: str) -> None:
        self._formats[name] = None

    def note_row(self, row: Group | Dropped, groups: Sequence[Group | Dropped]) -> None:
        """A row was read, and became these groups."""
        self.rows += 1
        if isinstance(row, Group) and groups != [row]:
            made = sum(isinstance(item, Group) for item in groups)
            self._counts["converted"] += bool(made)
            self._counts["made"] += made

    def add(self, outcome: Tokenized | Dropped) -> None:
        self.done += 1
        if isinstance(outcome, Dropped):
            self._dropped[outcome.reason] += 1
            self._name(outcome.reason, outcome.origin)
            return
        self._counts["groups"] += 1
        self._counts["truncated"] += outcome.prompt_cut or outcome.responses_cut
        self._counts["responses_cut"] += outcome.responses_cut
        self._counts["over_budget"] += outcome.for_budget
        if outcome.prompt_cut or outcome.responses_cut:
            self._name(CUT, outcome.group.origin)
        if outcome.for_budget:
            self._name(CUT_TO_BUDGET, outcome.group.origin)
        self._counts["boundary_splits"] += outcome.boundary_splits
        self._counts["headers_scored"] += outcome.header_scored
        self._counts["conversations"] += outcome.from_template
        group = outcome.group
        if group.labels is not None:
            self._counts["labelled"] += 1
            self._counts["desirable"] += group.labels[0]
        if group.scores is not None:
            self._counts["scored"] += 1
            self._counts["tied"] += len(set(group.scores)) < len(group.scores)
            self._counts["against"] += len(group.scores) == 2 and group.scores[0] < group.scores[1]

    def _name(self, reason: str, origin: str) -> None:
        named = self._examples.setdefault(reason, [])
        if len(named) < EXAMPLES:
            named.append(origin)

    def report(self, template: str, seconds: float) -> PrepareReport:
        return PrepareReport(
            rows_read=self.rows,
            groups=self._counts["groups"],
            dropped=dict(self._dropped),
            examples=self._examples,
            truncated=self._counts["truncated"],
            responses_cut=self._counts["responses_cut"],
            over_budget=self._counts["over_budget"],
            boundary_splits=self._counts["boundary_splits"],
            headers_scored=self._counts["headers_scored"],
            template=template if self._counts["conversations"] else "none",
            formats=list(self._formats),
            seconds=seconds,
            converted=self._counts["converted"],
            made=self._counts["made"],
            desirable=self._counts["desirable"] if self._counts["labelled"] else None,
            scored=self._counts["scored"],
            tied=self._counts["tied"],
            against=self._counts["against"],
        )
