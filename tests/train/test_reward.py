"""A reward model: the grid and the packing do not matter, it learns, and transformers gives the same scores."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distributed import run_ranks
from safetensors.torch import load_file, save_file
from tiny import MemoryStore, random_groups, write_llama

from megadpo.convert.families import read_shape, with_head
from megadpo.data.batch import Segment, pack, stream_tokens
from megadpo.data.packing import Budget
from megadpo.errors import ModelError
from megadpo.objectives import Sequences
from megadpo.objectives.reward_model import BradleyTerry, PlackettLuceReward
from megadpo.train.evaluate import BINS, _confidences, calibration
from train.engine import Case, assemble, run, worst

VOCAB = 67
NOISE = 1e-5


def as_reward_model(folder: Path) -> Path:
    """The same trunk with a scalar head of small random weights, as transformers would save it."""
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("lm_head.weight", None)
    tensors["score.weight"] = torch.randn(1, 32, generator=torch.Generator().manual_seed(3)) * 0.3
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "reward"}, "pad_token_id": 0}
    config |= {"label2id": {"reward": 0}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def lists(count: int) -> MemoryStore:
    """2 to 4 responses each."""
    groups = random_groups(count, vocab=VOCAB, responses=4).groups
    return MemoryStore([replace(g, response_ids=g.response_ids[: 2 + n % 3]) for n, g in enumerate(groups)])


def pairs(count: int) -> MemoryStore:
    groups = random_groups(count, vocab=VOCAB).groups
    return MemoryStore([replace(g, scores=(1 + n % 3, 0.5)) for n, g in enumerate(groups)])


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> list[Case]:
    tied = write_llama(tmp_path_factory.mktemp("tied"), layers=3, vocab=VOCAB, tied=True)
    known = as_reward_model(write_llama(tmp_path_factory.mktemp("known"), layers=3, vocab=VOCAB))
    shared: dict[str, Any] = {"learning_rate": 1e-2, "steps": 3, "evaluated": True, "budget": Budget(72)}
    return [
        Case(tied, pairs(18), objective=BradleyTerry(margin=True, centering=0.01), **shared),
        Case(known, lists(18), objective=PlackettLuceReward(), **shared),
    ]


@pytest.fixture(scope="module")
def single(cases: list[Case]) -> list[dict[str, Any]]:
    [results] = run_ranks(1, run, [replace(case, budget=Budget(500)) for case in cases])
    return [{**r, **{w: assemble([r], w, VOCAB) for w in ("gradients", "weights")}} for r in results]


def compare(results: list[list[dict[str, Any]]], index: int, want: dict[str, Any]) -> None:
    ranks = [rank[index] for rank in results]
    held = [*ranks[0]["sums"], ranks[0]["held_out"]]
    for got, expected in zip(held, [*want["sums"], want["held_out"]], strict=True):
        assert got.loss == pytest.approx(expected.loss, rel=NOISE)
        assert got.metrics == pytest.approx(expected.metrics, rel=5 * NOISE, abs=1e-5)
    assert ranks[0]["grad_norms"] == pytest.approx(want["grad_norms"], rel=NOISE)
    for what in ("gradients", "weights"):
        difference, name = worst(assemble(ranks, what, VOCAB), want[what])
        assert difference < 2 * NOISE, f"{what}: {name} differs by {difference:.1e}"


def test_it_begins_at_a_coin_and_learns(single: list[dict[str, Any]]) -> None:
    """A new head gives 0 to everything: -log sigmoid(0 - margin), and only the head has a gradient at first."""
    fresh, known = single
    margins = 0.5 + np.arange(18) % 3
    assert fresh["sums"][0].loss == pytest.approx(np.log1p(np.exp(margins[:8])).mean(), rel=1e-6)
    assert fresh["gradients"]["output_layer.weight"].norm() > 0
    assert fresh["gradients"]["embedding.word_embeddings.weight"].norm() == 0
    assert fresh["weights"]["output_layer.weight"].shape == (1, 32)
    assert all(g.norm() > 0 for g in known["gradients"].values())
    assert {"rewards/ece", "lengths/best", "rewards/accuracies"} <= known["held_out"].metrics.keys()
    assert "kl/token" not in known["held_out"].metrics


def test_one_rank(cases: list[Case], single: list[dict[str, Any]]) -> None:
    variants = [*cases, replace(cases[1], share=False, budget=Budget(110)), replace(cases[1], recompute="full")]
    results = run_ranks(1, run, variants)
    for index, want in enumerate([*single, single[1], single[1]]):
        compare(results, index, want)


def test_two_ranks(cases: list[Case], single: list[dict[str, Any]]) -> None:
    variants = [*cases, replace(cases[1], tensor=2), replace(cases[1], tensor=2, sequence=True)]
    results = run_ranks(2, run, variants)
    for index, want in enumerate([*single, single[1], single[1]]):
        compare(results, index, want)


def test_four_ranks(cases: list[Case], single: list[dict[str, Any]]) -> None:
    results = run_ranks(4, run, [replace(case, tensor=2, pipeline=2, sequence=True) for case in cases])
    for index, want in enumerate(single):
        compare(results, index, want)


def test_stream_reads_the_last_token() -> None:
    store = pairs(3)
    for share in (True, False):
        tokens = stream_tokens(store, share, scalar=True)  # type: ignore[arg-type]
        batch = pack(store, [0, 2], int(tokens[[0, 2]].sum()), None, share, scalar=True)  # type: ignore[arg-type]
        assert batch.used == len(batch.tokens_T)
        assert batch.scalar
        last = [int(r[-1]) for g in (0, 2) for r in store.group(g).response_ids]
        assert batch.tokens_T[batch.rows_N].tolist() == last
        assert batch.tokens_S.tolist() == [len(r) for g in (0, 2) for r in store.group(g).response_ids]
        ends = [len(store.group(g).prompt_ids) + len(r) - 1 for g in (0, 2) for r in store.group(g).response_ids]
        assert batch.positions_T[batch.rows_N].tolist() == ends
    assert pack(store, [0], 5, None, scalar=True).segments == (  # type: ignore[arg-type]
        Segment(0, 1, 0, 0),
        Segment(1, 2, 0, 1),
        Segment(2, 3, 0, 1),
    )


def test_heads_and_objectives_must_fit(cases: list[Case], tmp_path: Path) -> None:
    tied, known = read_shape(cases[0].folder), read_shape(cases[1].folder)
    assert (tied.head, known.head) == ("vocabulary", "scalar")
    assert with_head(tied, "scalar", "x").head == "new scalar"
    assert with_head(known, "scalar", "x") == known
    with pytest.raises(ModelError, match="is a reward model, and the objective needs a language model"):
        with_head(known, "logprob", "x")
    folder = as_reward_model(write_llama(tmp_path / "two", layers=1))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"id2label": {"0": "a", "1": "b"}}))
    with pytest.raises(ModelError, match="one label"):
        read_shape(folder)


def test_calibration() -> None:
    """By hand: in one bin 3 of 4 right at 0.9 each, in another 1 of 2 at 0.55; a perfect model has 0."""
    bins = torch.zeros(3, BINS, dtype=torch.float64)
    bins[:, 8] = torch.tensor([4, 3, 3.6])
    bins[:, 1] = torch.tensor([2, 1, 1.1])
    assert calibration(bins) == pytest.approx((0.6 + 0.1) / 6)
    bins[1] = bins[2]
    assert calibration(bins) == 0
    assert calibration(torch.zeros(3, BINS, dtype=torch.float64)) == 0


def test_equal_scores_are_neither_right_nor_wrong() -> None:
    rewards, scores = torch.tensor([1.0, 3.0, 2.0]), torch.tensor([4.0, 4.0, 1.0])
    part = Sequences(rewards, None, torch.ones(3, dtype=torch.int64), torch.tensor([0, 3]), scores_S=scores)
    count, right, _ = _confidences(part)
    assert (count.sum().item(), right.sum().item()) == (2, 1)
    assert _confidences(replace(part, scores_S=None))[0].sum().item() == 3
