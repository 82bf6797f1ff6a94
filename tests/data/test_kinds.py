"""Kinds of data and their conversions: explicit, counted, and refused with the name of what would do."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vocabularies import byte_level, save

from megadpo.config import Config, DataConfig, ModelConfig
from megadpo.data.batch import pack
from megadpo.data.kinds import CONVERSIONS, NO_GAP, SAME_SCORE, Wanted, converted, wanted
from megadpo.data.prepare import prepare
from megadpo.data.records import Dropped, Group
from megadpo.errors import DataError
from megadpo.objectives import DPO, Mix
from megadpo.objectives.margins import ODPO

LIST = Group("row", "q", ("a", "b", "c", "d"), scores=(9.0, 5.0, 5.0, 1.0), ranked=True)
PAIR = Group("row", "q", ("good", "bad"), scores=(3.0, 1.0))
LABELLED = Group("row", "q", ("good",), labels=(True,))


def made(group: Group, convert: str, seed: int = 0) -> list[Any]:
    return converted(group, Wanted(CONVERSIONS[convert].target, convert=convert, seed=seed))


def texts(groups: list[Any]) -> list[Any]:
    return [(group.responses, group.scores) for group in groups]


def test_the_run_file_knows_all_of_them() -> None:
    (literal, none) = get_args(get_type_hints(DataConfig)["convert"])
    assert set(get_args(literal)) == set(CONVERSIONS)
    assert none is type(None)


def test_pairs() -> None:
    good, bad = made(PAIR, "pairs_to_unpaired")
    assert (good.responses, good.labels, good.origin, good.scores) == (("good",), (True,), "row/chosen", (3.0,))
    assert (bad.responses, bad.labels, bad.kind, bad.prompt) == (("bad",), (False,), "unpaired", "q")
    assert texts(made(PAIR, "pairs_to_demonstrations")) == [(("good",), (3.0,))]


def test_lists() -> None:
    assert texts(made(LIST, "lists_to_pairs_best_worst")) == [(("a", "d"), (9.0, 1.0))]
    every = made(LIST, "lists_to_pairs_all")
    # b and c have the same score: no pair
    assert [group.responses for group in every] == [("a", "b"), ("a", "c"), ("a", "d"), ("b", "d"), ("c", "d")]
    assert {group.kind for group in every} == {"pairs"}
    assert every[3].origin == "row/1>3"
    assert texts(made(LIST, "lists_to_demonstrations")) == [(("a",), (9.0,))]
    in_order = replace(LIST, scores=None)
    assert len(made(in_order, "lists_to_pairs_all")) == 6
    tied = replace(LIST, scores=(2.0,) * 4)
    for name in ("lists_to_pairs_best_worst", "lists_to_pairs_best_random", "lists_to_pairs_all"):
        assert made(tied, name) == [Dropped("row", SAME_SCORE)]


def test_a_list_of_equal_scores_is_left_out() -> None:
    """As by the conversions: its order is that of the file. A pair that is labelled stays one for losses over pairs."""
    tied = replace(LIST, scores=(2.0,) * 4)
    assert converted(tied, Wanted("lists")) == [Dropped("row", SAME_SCORE)]
    assert converted(replace(PAIR, scores=(1.0, 1.0)), Wanted("lists")) == [Dropped("row", SAME_SCORE)]
    for group in (LIST, replace(tied, scores=None), replace(PAIR, scores=None)):
        assert converted(group, Wanted("lists")) == [group]
    same = replace(PAIR, scores=(1.0, 1.0))
    assert converted(same, Wanted("pairs")) == [same]


def test_best_against_random_is_chance_that_can_be_had_again() -> None:
    """A function of seed and text, not of the row's place; never against one that is as good."""
    rows = [replace(LIST, prompt=f"q{number}") for number in range(600)]
    first = [made(row, "lists_to_pairs_best_random")[0].responses for row in rows]
    assert first == [made(replace(r, origin="x"), "lists_to_pairs_best_random")[0].responses for r in rows]
    counts = Counter(first)
    assert set(counts) == {("a", "b"), ("a", "c"), ("a", "d")}
    assert min(counts.values()) > 150  # 200 are expected of each, with a standard deviation of 12
    other = [made(row, "lists_to_pairs_best_random", seed=1)[0].responses for row in rows]
    assert 0.2 < np.mean([a != b for a, b in zip(first, other, strict=True)]) < 0.9
    best_tied = replace(LIST, scores=(9.0, 9.0, 9.0, 1.0))
    assert {made(replace(best_tied, prompt=str(n)), "lists_to_pairs_best_random")[0].responses for n in range(20)} == {
        ("a", "d")
    }


def test_unpaired() -> None:
    assert made(LABELLED, "unpaired_to_demonstrations")[0].kind == "demonstrations"
    [left_out] = made(replace(LABELLED, labels=(False,)), "unpaired_to_demonstrations")
    assert "no demonstration" in left_out.reason


@pytest.mark.parametrize("group", [LIST, PAIR, LABELLED, replace(LABELLED, labels=None)])
@pytest.mark.parametrize("kind", ["demonstrations", "unpaired", "pairs", "lists"])
def test_nothing_is_converted_unasked(group: Group, kind: Any) -> None:
    if group.kind == kind or (group.kind, kind) == ("pairs", "lists"):
        assert converted(group, Wanted(kind)) == [group]
        return
    with pytest.raises(DataError, match=r"^row: the data are .*, but the objective needs") as caught:
        converted(group, Wanted(kind))
    would_do = [name for name, c in CONVERSIONS.items() if (c.source, c.target) == (group.kind, kind)]
    assert all(name in str(caught.value) for name in would_do)
    assert ("data.convert" in str(caught.value)) == bool(would_do)


def test_a_conversion_leaves_the_right_kind_alone() -> None:
    """So that data of both kinds can be mixed."""
    assert converted(LABELLED, Wanted("unpaired", convert="pairs_to_unpaired")) == [LABELLED]
    with pytest.raises(DataError, match="ranked lists"):
        converted(LIST, Wanted("unpaired", convert="pairs_to_unpaired"))


def test_scores_that_are_needed() -> None:
    assert converted(PAIR, Wanted("pairs", scores=True)) == [PAIR]
    [left_out] = converted(replace(PAIR, scores=None), Wanted("pairs", scores=True))
    assert isinstance(left_out, Dropped)


def test_a_gap_that_is_needed() -> None:
    """By a loss over its logarithm: pairs that have none are left out when the data are read, and counted."""
    assert converted(PAIR, Wanted("pairs", scores=True, gap=True)) == [PAIR]
    for scores in ((1.0, 1.0), (1.0, 3.0)):
        pair = replace(PAIR, scores=scores)
        assert converted(pair, Wanted("pairs", scores=True, gap=True)) == [Dropped("row", NO_GAP)]
        assert converted(pair, Wanted("pairs", scores=True)) == [pair]
    run_file = Config("run", ModelConfig("model"), DataConfig(("pairs.jsonl",)))
    for objective, needed in (
        (ODPO(), True),
        (ODPO(offset="linear"), False),
        (ODPO(alpha=0.0), False),
        (Mix((DPO(), ODPO())), True),
        (DPO(), False),
    ):
        assert wanted(replace(run_file, objective=objective)).gap == needed


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save(byte_level(), tmp_path_factory.mktemp("model")))


def config(tmp_path: Path, rows: list[dict[str, Any]], **settings: Any) -> DataConfig:
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataConfig(train=(str(source),), cache_dir=str(tmp_path / "cache"), num_proc=1, **settings)


def test_from_file_to_batch(tmp_path: Path, model: str) -> None:
    """Labels and scores stay with their responses; conversions are counted."""
    pair = {"prompt": "One and one is", "chosen": " two.", "rejected": " three."}
    rows = [pair | {"chosen_score": 5, "rejected_score": 2}, pair | {"margin": -1}, pair, pair | {"rejected": " two."}]
    data = config(tmp_path, rows)
    store = prepare(data.train, data, model, Wanted("pairs"))
    assert store.scores_S is not None
    np.testing.assert_array_equal(store.scores_S, [5, 2, -1, 0, np.nan, np.nan])
    assert store.labels_S is None
    assert [store.group(g).scores for g in range(3)] == [(5.0, 2.0), (-1.0, 0.0), None]
    assert "2 groups with scores: 0 of them have ties, in 1 pairs the rejected" in "\n".join(store.report.lines())
    batch = pack(store, [1, 0], 80, None)
    assert batch.scores_S is not None
    assert batch.scores_S.tolist() == [-1, 0, 5, 2]
    assert batch.labels_S is batch.body_N is None
    needed = prepare(data.train, data, model, Wanted("pairs", scores=True))
    assert (len(needed), needed.report.dropped["has no score, and the objective needs scores"]) == (2, 2)
    unpaired = prepare(data.train, data, model, Wanted("unpaired", convert="pairs_to_unpaired"))
    assert unpaired.labels_S is not None
    assert unpaired.labels_S.tolist() == [True, False] * 4
    assert (unpaired.report.rows_read, unpaired.report.groups) == (4, 8)
    said = "\n".join(unpaired.report.lines())
    assert "4 rows converted into 8 groups (data.convert)" in said
    assert "4 groups labelled desirable, 4 undesirable" in said
    batch = pack(unpaired, [1, 2], 80, None)
    assert batch.labels_S is not None
    assert batch.labels_S.tolist() == [False, True]


def test_digest_covers_labels_and_scores(tmp_path: Path, model: str) -> None:
    """They decide the loss as much as the tokens do."""
    row = {"prompt": "One and one is", "completion": " two."}
    digests = set()
    for label in (True, False):
        data = config(tmp_path, [row | {"label": label}])
        digests.add(prepare(data.train, data, model, Wanted("unpaired")).digest)
    pair = {"prompt": "One and one is", "chosen": " two.", "rejected": " three."}
    for extra in ({}, {"margin": 1}, {"margin": 2}):
        data = config(tmp_path, [pair | extra])
        digests.add(prepare(data.train, data, model, Wanted("pairs")).digest)
    assert len(digests) == 5


def test_real_unpaired(tmp_path: Path, shared: Path) -> None:
    data = DataConfig((str(shared / "data" / "kto_en_demo.json"),), cache_dir=str(tmp_path), num_proc=1, max_length=256)
    store = prepare(data.train, data, str(shared / "models" / "stories260k"), Wanted("unpaired"))
    assert store.report.rows_read == 300
    assert store.labels_S is not None
    assert int(store.labels_S.sum()) == store.report.desirable
    assert len(store.labels_S) == len(store) == store.report.groups


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=2, max_size=6), st.integers(0, 9))
def test_pairs_of_a_list(scores: list[int], seed: int) -> None:
    """Whatever the scores: a pair's chosen response is strictly better, and `all` has every such pair once."""
    scores = sorted(scores, reverse=True)
    names = tuple("abcdef"[: len(scores)])
    group = Group("row", "q", names, scores=tuple(map(float, scores)), ranked=True)
    strict = sum(a > b for k, a in enumerate(scores) for b in scores[k + 1 :])
    for name, count in (("best_worst", 1), ("best_random", 1), ("all", strict)):
        pairs = made(group, f"lists_to_pairs_{name}", seed)
        if not strict:
            assert isinstance(pairs[0], Dropped)
            continue
        assert len({pair.responses for pair in pairs}) == len(pairs) == count
        assert all(pair.scores[0] > pair.scores[1] for pair in pairs)
        if name != "all":
            assert pairs[0].responses[0] == "a"
