"""Which kind of data an objective needs, and the conversions from one kind into another.

Nothing is converted unless data.convert names the conversion: half the meaning of a data set is its kind.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megadpo.data.records import Dropped, Group, LeaveOutError, Turn
from megadpo.errors import DataError

if TYPE_CHECKING:  # they bring torch with them, which tokenising processes do not need
    from megadpo.config import Config
    from megadpo.objectives.kinds import Kind

NO_SCORE = "has no score, and the objective needs scores"
SAME_SCORE = "all responses have the same score"
NO_GAP = (
    "the chosen response has no higher score than the rejected one, and the objective takes the logarithm of the gap"
)
UNDESIRABLE = "an undesirable response is no demonstration"

WORDS: dict[Kind, str] = {
    "demonstrations": "demonstrations (one response)",
    "unpaired": "unpaired data (one response with a label)",
    "pairs": "pairs (chosen and rejected)",
    "lists": "ranked lists",
}


@dataclass(frozen=True)
class Wanted:
    """What an objective and the data section want of every group.

    kind: None where any will do. scores: every response must have one. gap: the chosen one the
    higher. loss_on: see DataConfig. body: formatting tokens
    are marked. scalar: streams are a reward model's. convert: a name of CONVERSIONS, or None. seed: of random choices.
    """

    kind: Kind | None
    scores: bool = False
    gap: bool = False
    loss_on: str = "answer"
    body: bool = False
    scalar: bool = False
    convert: str | None = None
    seed: int = 0

    def decides(self) -> dict[str, object]:
        """What of it decides which groups come out."""
        chance = self.convert is not None and CONVERSIONS[self.convert].chance
        return {**vars(self), "seed": self.seed if chance else None}


def wanted(config: Config) -> Wanted:
    """What the run file's objective wants of its data."""
    from megadpo.objectives.kinds import kind_of

    objective, data = config.objective, config.data
    return Wanted(
        kind=kind_of(objective),
        scores="scores_S" in objective.needs,
        gap=objective.needs_gap,
        loss_on=data.loss_on,
        body="body_N" in objective.needs,
        scalar=objective.head == "scalar",
        convert=data.convert,
        seed=config.seed,
    )


def fits(kind: Kind, to: Kind | None) -> bool:
    """Whether groups of a kind can be used as they are. A pair is a ranked list of two."""
    return to is None or kind == to or (kind, to) == ("pairs", "lists")


def converted(group: Group, wanted: Wanted) -> list[Group | Dropped]:
    """The group as groups of the wanted kind; itself where it is one.

    Raises DataError where it is of another kind, and names the conversion that would do.
    """
    conversion = None if wanted.convert is None else CONVERSIONS[wanted.convert]
    groups: list[Group] | None = None
    if conversion is not None and group.kind == conversion.source:
        try:
            groups = conversion.apply(group, wanted.seed)
        except LeaveOutError as reason:
            return [Dropped(group.origin, str(reason))]
    elif fits(group.kind, wanted.kind):
        groups = [group]
    if groups is None or not all(fits(made.kind, wanted.kind) for made in groups):
        assert wanted.kind is not None
        raise DataError(mismatch(group, wanted.kind))
    if wanted.scores and group.scores is None:
        return [Dropped(group.origin, NO_SCORE)]
    reasons = [(made, _says_nothing(made, wanted)) for made in groups]
    return [made if reason is None else Dropped(made.origin, reason) for made, reason in reasons]


def _says_nothing(group: Group, wanted: Wanted) -> str | None:
    """Why the objective has nothing to learn from the group, or None."""
    if wanted.kind == "lists" and group.scores is not None and len(set(group.scores)) == 1:
        return SAME_SCORE
    if wanted.gap and group.scores is not None and not group.scores[0] > group.scores[1]:
        return NO_GAP
    return None


def mismatch(group: Group, kind: Kind) -> str:
    """What to say of a group of another kind than the objective's."""
    would_do = [name for name, c in CONVERSIONS.items() if (c.source, c.target) == (group.kind, kind)]
    advice = f"set data.convert to {' or '.join(would_do)}, or give" if would_do else "give"
    return (
        f"{group.origin}: the data are {WORDS[group.kind]}, but the objective needs {WORDS[kind]}; {advice} other data "
        "or another objective.loss_type"
    )


# Conversions ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Conversion:
    """From groups of one kind to groups of another. chance: whether the seed has a say."""

    source: Kind
    target: Kind
    apply: Callable[[Group, int], list[Group]]
    chance: bool = False


def _pairs_to_unpaired(group: Group, seed: int) -> list[Group]:
    """The chosen response becomes a desirable one, the rejected an undesirable one."""
    return [
        Group(f"{group.origin}/{name}", group.prompt, (response,), labels=(good,), scores=_take(group, (k,)))
        for k, (name, good, response) in enumerate(
            zip(("chosen", "rejected"), (True, False), group.responses, strict=True)
        )
    ]


def _first(group: Group, seed: int) -> list[Group]:
    """The best response alone, as something to imitate."""
    return [Group(group.origin, group.prompt, group.responses[:1], scores=_take(group, (0,)))]


def _desirable(group: Group, seed: int) -> list[Group]:
    if group.labels != (True,):
        raise LeaveOutError(UNDESIRABLE)
    return [Group(group.origin, group.prompt, group.responses, scores=group.scores)]


def _best_worst(group: Group, seed: int) -> list[Group]:
    return [_pair(group, 0, len(group.responses) - 1)]


def _best_random(group: Group, seed: int) -> list[Group]:
    """The best against any that is worse. The choice is a function of seed and text, wherever the row stands."""
    worse = [k for k in range(1, len(group.responses)) if _better(group, 0, k)]
    if not worse:
        raise LeaveOutError(SAME_SCORE)
    drawn = int.from_bytes(_text_hash(group, seed)[:8], "little")
    return [_pair(group, 0, worse[drawn % len(worse)])]


def _every_pair(group: Group, seed: int) -> list[Group]:
    """Every two of which one is better."""
    size = len(group.responses)
    found = [_pair(group, i, j) for i in range(size) for j in range(i + 1, size) if _better(group, i, j)]
    if not found:
        raise LeaveOutError(SAME_SCORE)
    return found


def _pair(group: Group, chosen: int, rejected: int) -> Group:
    """Two responses of a list; their numbers, from 0 for the best, are in the origin."""
    if not _better(group, chosen, rejected):
        raise LeaveOutError(SAME_SCORE)
    return Group(
        f"{group.origin}/{chosen}>{rejected}",
        group.prompt,
        (group.responses[chosen], group.responses[rejected]),
        scores=_take(group, (chosen, rejected)),
    )


def _better(group: Group, one: int, other: int) -> bool:
    """Without scores the order is the rank, and there are no ties."""
    return group.scores is None or group.scores[one] > group.scores[other]


def _take(group: Group, which: tuple[int, ...]) -> tuple[float, ...] | None:
    return None if group.scores is None else tuple(group.scores[k] for k in which)


def _text_hash(group: Group, seed: int) -> bytes:
    digest = hashlib.sha256(seed.to_bytes(8, "little"))
    for text in (group.prompt, *group.responses):
        turns = (Turn("", text),) if isinstance(text, str) else text
        for part in (part for turn in turns for part in (turn.role, turn.content)):
            data = part.encode()
            digest.update(len(data).to_bytes(8, "little") + data)
    return digest.digest()


CONVERSIONS = {
    "pairs_to_unpaired": Conversion("pairs", "unpaired", _pairs_to_unpaired),
    "pairs_to_demonstrations": Conversion("pairs", "demonstrations", _first),
    "unpaired_to_demonstrations": Conversion("unpaired", "demonstrations", _desirable),
    "lists_to_demonstrations": Conversion("lists", "demonstrations", _first),
    "lists_to_pairs_best_worst": Conversion("lists", "pairs", _best_worst),
    "lists_to_pairs_best_random": Conversion("lists", "pairs", _best_random, chance=True),
    "lists_to_pairs_all": Conversion("lists", "pairs", _every_pair),
}
"""By the names that data.convert takes."""
