"""The store gives back what was put in, wherever it stands, and notices what is damaged or foreign."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from megadpo.data.report import PrepareReport
from megadpo.data.store import GroupStore, StoreWriter, group_key
from megadpo.data.tokenize import TokenizedGroup
from megadpo.errors import StorageError

REPORT = PrepareReport(
    rows_read=9,
    groups=7,
    dropped={"too odd": 4, "too even": 1},
    examples={
        "too odd": ["a:1", "a:3", "a:5"],
        "too even": ["a:2"],
        "cut to length": ["a:7", "a:8"],
        "cut to the token budget": ["a:8"],
    },
    truncated=2,
    responses_cut=1,
    over_budget=1,
    boundary_splits=3,
    headers_scored=0,
    template="ChatML",
    formats=["trl_standard"],
    seconds=1.25,
)


def ids(*numbers: int) -> np.ndarray:
    return np.array(numbers, dtype=np.int32)


def ragged(count: int, seed: int = 0) -> list[TokenizedGroup]:
    """Groups with 1 to 4 responses; the last has the longest response of all."""
    rng = np.random.default_rng(seed)
    groups = [
        TokenizedGroup(
            f"row[{number}]",
            rng.integers(0, 2**31 - 1, rng.integers(1, 9)).astype(np.int32),
            tuple(rng.integers(0, 99, rng.integers(1, 30)).astype(np.int32) for _ in range(int(rng.integers(1, 5)))),
        )
        for number in range(count - 1)
    ]
    return [*groups, TokenizedGroup("last", ids(0), (ids(0), np.arange(77, dtype=np.int32)))]


def write(folder: Path, groups: list[TokenizedGroup], batch: int = 3) -> GroupStore:
    folder.mkdir()
    with StoreWriter(folder, vocab_size=512) as writer:
        for start in range(0, len(groups), batch):
            writer.add(groups[start : start + batch])
        writer.finish(REPORT)
    return GroupStore.open(folder)


@pytest.mark.parametrize("batch", [1, 3, 100])
def test_round_trip(batch: int, tmp_path: Path) -> None:
    """Trap 9: also the last token of the longest response."""
    groups = ragged(7)
    store = write(tmp_path / "s", groups, batch)
    assert len(store) == 7
    for number, want in enumerate(groups):
        got = store.group(number)
        assert got.origin == want.origin
        assert got.prompt_ids.dtype == np.int32
        assert got.prompt_ids.tolist() == want.prompt_ids.tolist()
        assert [response.tolist() for response in got.response_ids] == [r.tolist() for r in want.response_ids]
    responses = [response for group in groups for response in group.response_ids]
    assert store.prompt_lengths.tolist() == [len(group.prompt_ids) for group in groups]
    assert store.response_lengths.tolist() == [len(response) for response in responses]
    assert np.diff(store.offsets).tolist() == [len(group.response_ids) for group in groups]
    assert store.offsets[0] == 0
    dtypes = (store.prompt_lengths.dtype, store.response_lengths.dtype, store.offsets.dtype)
    assert dtypes == (np.int32, np.int32, np.int64)
    assert (store.vocab_size, store.report) == (512, REPORT)
    with pytest.raises(IndexError):
        store.group(7)
    with pytest.raises(IndexError):
        store.group(-1)


def test_ids_are_mapped_not_copied(tmp_path: Path) -> None:
    store = write(tmp_path / "s", ragged(7))
    first, again = store.group(4), store.group(4)
    assert not first.prompt_ids.flags.owndata
    assert not first.prompt_ids.flags.writeable
    assert np.shares_memory(first.response_ids[0], again.response_ids[0])


def test_digest_is_of_the_tokens_alone(tmp_path: Path) -> None:
    groups = ragged(7)
    base = write(tmp_path / "base", groups)
    renamed = [TokenizedGroup("elsewhere", g.prompt_ids, g.response_ids) for g in groups]
    assert write(tmp_path / "renamed", renamed, batch=2).digest == base.digest
    assert write(tmp_path / "order", groups[::-1]).digest != base.digest
    assert write(tmp_path / "fewer", groups[:-1]).digest != base.digest


def test_trap_41_keys_follow_content(tmp_path: Path) -> None:
    groups = ragged(7)
    store = write(tmp_path / "s", groups)
    order = [3, 0, 6, 1, 5, 2, 4]
    shuffled = write(tmp_path / "t", [groups[number] for number in order])
    assert [shuffled.key(at) for at in range(7)] == [store.key(number) for number in order]
    assert len({store.key(number) for number in range(7)}) == 7


def test_key_tells_the_boundary_apart() -> None:
    """The same tokens in a row, split otherwise, are another group."""
    spellings = [
        TokenizedGroup("x", ids(1, 2), (ids(3), ids(4))),
        TokenizedGroup("x", ids(1), (ids(2, 3), ids(4))),
        TokenizedGroup("x", ids(1, 2), (ids(3, 4),)),
        TokenizedGroup("x", ids(1, 2), (ids(4), ids(3))),
    ]
    assert len({group_key(group) for group in spellings}) == 4


# Reference columns -----------------------------------------------------------------------------------------


def column(store: GroupStore, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=len(store.response_lengths)).astype(np.float64)


def test_reference_round_trip(tmp_path: Path) -> None:
    store = write(tmp_path / "s", ragged(7))
    assert store.reference("abc") is None
    first, second = column(store, 1), column(store, 2)
    store.write_reference("abc", first)
    store.write_reference("def", second)
    again = GroupStore.open(tmp_path / "s")
    for digest, want in (("abc", first), ("def", second)):
        got = again.reference(digest)
        assert got is not None
        assert got.dtype == np.float64
        assert got.tobytes() == want.tobytes()
    store.write_reference("abc", second)
    replaced = store.reference("abc")
    assert replaced is not None
    assert replaced.tobytes() == second.tobytes()
    assert sorted(path.name for path in (tmp_path / "s").iterdir()) == [
        "groups.arrow",
        "reference-abc.arrow",
        "reference-def.arrow",
        "store.json",
    ]


def test_reference_of_other_tokens_is_refused(tmp_path: Path) -> None:
    """Trap 41: a column belongs to these tokens in this order."""
    groups = ragged(7)
    store, other = write(tmp_path / "s", groups), write(tmp_path / "t", groups[::-1])
    store.write_reference("abc", column(store))
    os.rename(tmp_path / "s" / "reference-abc.arrow", tmp_path / "t" / "reference-abc.arrow")
    with pytest.raises(StorageError, match="of other data or of another model"):
        other.reference("abc")


def test_damaged_reference_is_noticed(tmp_path: Path) -> None:
    """A flipped bit, wherever it is, and a file cut short."""
    store = write(tmp_path / "s", ragged(7))
    values = column(store)
    store.write_reference("abc", values)
    path = tmp_path / "s" / "reference-abc.arrow"
    whole = path.read_bytes()
    at = whole.index(values.tobytes())
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    with pytest.raises(StorageError, match=r"reference-abc\.arrow: the reference column is damaged"):
        store.reference("abc")
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(StorageError, match="not a readable reference column"):
        store.reference("abc")


def test_wrong_columns_are_defects(tmp_path: Path) -> None:
    store = write(tmp_path / "s", ragged(7))
    with pytest.raises(ValueError, match="float64"):
        store.write_reference("abc", column(store)[:-1])
    with pytest.raises(ValueError, match="float64"):
        store.write_reference("abc", column(store).astype(np.float32))
    with pytest.raises(ValueError, match="digest"):
        store.write_reference("../abc", column(store))


def test_reference_write_that_fails_leaves_the_old_column(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = write(tmp_path / "s", ragged(7))
    values = column(store)
    store.write_reference("abc", values)

    def full(file: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"cannot be written; the disk is full: free some space"):
        store.write_reference("abc", column(store, 2))
    kept = store.reference("abc")
    assert kept is not None
    assert kept.tobytes() == values.tobytes()
    assert len(list((tmp_path / "s").iterdir())) == 3


# Damaged stores --------------------------------------------------------------------------------------------


def test_damaged_store_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "s", ragged(7))
    header = (tmp_path / "s" / "store.json").read_text()
    data = (tmp_path / "s" / "groups.arrow").read_bytes()
    (tmp_path / "s" / "groups.arrow").write_bytes(data[:-100])
    with pytest.raises(StorageError, match=rf"{len(data) - 100} bytes, but {len(data)} were written"):
        GroupStore.open(tmp_path / "s")
    (tmp_path / "s" / "groups.arrow").write_bytes(b"x" * len(data))
    with pytest.raises(StorageError, match="not a prepared data set"):
        GroupStore.open(tmp_path / "s")
    (tmp_path / "s" / "groups.arrow").write_bytes(data)
    (tmp_path / "s" / "store.json").write_text(json.dumps(json.loads(header) | {"layout": 999}))
    with pytest.raises(StorageError, match="layout 999"):
        GroupStore.open(tmp_path / "s")
    (tmp_path / "s" / "store.json").write_text(header[:40])
    with pytest.raises(StorageError, match="not a prepared data set"):
        GroupStore.open(tmp_path / "s")
    with pytest.raises(StorageError, match="not a prepared data set"):
        GroupStore.open(tmp_path / "nowhere")


def test_report_lines() -> None:
    lines = REPORT.lines()
    assert lines[0] == "9 rows read as trl_standard, 7 groups kept, in 1.2 s"
    assert "4 dropped: too odd (a:1, a:3, a:5, ...)" in lines
    assert "1 dropped: too even (a:2)" in lines
    assert "2 groups cut to length, 1 of them at the end of a response (a:7, a:8)" in lines
    assert "1 of them cut to batch.micro_batch_tokens, the others to data.max_length (a:8)" in lines
    assert any(line.startswith("3 responses tokenised apart") for line in lines)
    assert "chat template: ChatML" in lines
