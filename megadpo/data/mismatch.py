"""KTO's mismatched responses: every response of a global batch behind the prompt of another group of that batch.

Their mean log-ratio estimates how far the policy has gone from the reference (KTO's z). What stands here is a function
of data, seed and place in the run alone, so it is the same for any grid, micro-batch size and number of processes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from megadpo.data.store import GroupStore, ReferenceColumns
from megadpo.data.tokenize import TokenizedGroup
from megadpo.errors import DataError


class MismatchedStore(ReferenceColumns):
    """A view of a store with one response per group: group r is the response of one group behind the prompt of another.

    The part of GroupStore that streams, batches and scoring use. A prompt and a response that come together longer than
    any group of the store lose tokens after the prompt's first one.
    """

    def __init__(self, store: GroupStore, prompts_R: npt.NDArray[np.int64], responses_R: npt.NDArray[np.int64]) -> None:
        self._store, self._prompts, self._responses = store, prompts_R, responses_R
        self.folder = store.folder
        pairing = np.stack([prompts_R, responses_R]).astype("<i8").tobytes()
        self.digest: str = hashlib.sha256(store.digest.encode() + pairing).hexdigest()
        self._longest = int((store.prompt_lengths + store.response_lengths).max(initial=0))
        self.response_lengths = store.response_lengths[responses_R]
        self.scored_lengths = store.scored_lengths[responses_R]
        room_R = np.maximum(self._longest - self.response_lengths, 1)
        self.prompt_lengths = np.minimum(store.prompt_lengths[prompts_R], room_R).astype(np.int32)
        self.offsets = np.arange(len(prompts_R) + 1, dtype=np.int64)
        self.labels_S = self.scores_S = None
        self.bodies = False

    def __len__(self) -> int:
        return len(self._prompts)

    @property
    def changed(self) -> bool:
        return self._store.changed

    def group(self, number: int) -> TokenizedGroup:
        prompt, answer = self._store.group(self._prompts[number]), self._store.group(self._responses[number])
        ids, room = prompt.prompt_ids, int(self.prompt_lengths[number])
        if room < len(ids):
            ids = np.concatenate([ids[:1], ids[len(ids) - (room - 1) :]]) if room > 1 else ids[-1:]
        return TokenizedGroup(
            origin=f"{prompt.origin} with the response of {answer.origin}",
            prompt_ids=ids,
            response_ids=answer.response_ids,
            marks=answer.marks,
        )


def mismatched(store: GroupStore, groups_R: npt.NDArray[np.int64], batch: int, seed: int) -> MismatchedStore:
    """The mismatched responses of a run: group r is the one that stands for the run's r-th group.

    groups_R: numbers in the store, in the order in which the run takes them, `batch` at a time; the last batch may be
    smaller. Within a batch every response and every prompt stands once, and none behind its own prompt. Raises
    DataError where a batch has no such pairing.
    """
    if (np.diff(store.offsets) != 1).any():
        raise ValueError("mismatched responses need groups with one response each")
    prompts_R = np.zeros_like(groups_R)
    classes_G = _prompt_classes(store)
    for start, part in _batches(groups_R, batch):
        classes = classes_G[part]
        if 2 * np.bincount(classes).max() > len(part):
            raise DataError(_no_pairing(store, part, classes, 1 + start // batch))
        prompts_R[start : start + len(part)] = part[derangement(classes, np.random.default_rng([seed, start]))]
    return MismatchedStore(store, prompts_R, groups_R)


def derangement(classes_B: npt.NDArray[np.int64], rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """int64 [B]: a permutation that takes no element to one of its own class, which may hold at most half of them.

    In an order in which the classes stand one after the other, going on by the size of the largest class leaves every
    class. Classes, and the members of each, are in random order.
    """
    size = len(classes_B)
    shuffled = rng.permutation(size)
    rank_of_class = rng.permutation(int(classes_B.max()) + 1)
    order = shuffled[np.argsort(rank_of_class[classes_B[shuffled]], kind="stable")]
    result = np.empty(size, dtype=np.int64)
    result[order] = np.roll(order, -int(np.bincount(classes_B).max()))
    return result


def _batches(groups_R: npt.NDArray[np.int64], batch: int) -> Iterator[tuple[int, npt.NDArray[np.int64]]]:
    for start in range(0, len(groups_R), batch):
        yield start, groups_R[start : start + batch]


def _prompt_classes(store: GroupStore) -> npt.NDArray[np.int64]:
    """int64 [G]: equal for equal prompts. Pairs made into unpaired data have each prompt twice."""
    known: dict[bytes, int] = {}
    return np.array(
        [known.setdefault(store.group(g).prompt_ids.tobytes(), len(known)) for g in range(len(store))], dtype=np.int64
    )


def _no_pairing(store: GroupStore, part: npt.NDArray[np.int64], classes: npt.NDArray[np.int64], step: int) -> str:
    what_to_do = "change batch.global_batch_size, train.max_steps or train.num_train_epochs"
    why = "the objective's KL is measured on responses behind other prompts of the same batch"
    if len(part) == 1:
        return f"step {step} has a batch of 1 group, and {why}: at least 2 are needed; {what_to_do}"
    count = int(np.bincount(classes).max())
    first = store.group(part[int((classes == np.bincount(classes).argmax()).argmax())]).origin
    if len(part) < len(store) and (np.diff(part) == 1).all():  # in the file's order
        what_to_do += ", or set train.shuffle: true"
    return (
        f"step {step}: {count} of its {len(part)} groups have the prompt of {first}, and {why}: at most half of them "
        f"may have the same; {what_to_do}"
    )
