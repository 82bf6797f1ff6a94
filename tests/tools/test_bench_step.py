"""The step benchmark: what it times is the same work on every side, and its figures are what they are called."""

import re

import bench_step
import numpy as np
import pytest
import step_figures
import step_sides
import step_turns
import torch
from step_turns import Side
from tiny import random_groups

from megadpo.data.batch import pack, stream_tokens

TINY = ["--batch", "2", "--repeats", "1", "--hidden", "32", "--ffn", "48", "--layers", "1", "--vocab", "300"]
TINY += ["--threads", "1"]


def test_padded_rows_hold_the_same_responses() -> None:
    store = random_groups(6)
    [one, two] = step_sides.padded(store, np.array([4, 0, 2, 5]), 3, np.arange(12, dtype=np.float32))
    assert (one.groups, two.groups) == ((4, 0, 2), (5,))
    assert one.reference_S.tolist() == [8, 9, 0, 1, 4, 5]
    plain = pack(store, [4, 0, 2], int(stream_tokens(store, False)[[4, 0, 2]].sum()), None, share=False)
    longest = max(s.end - s.start for s in plain.segments)
    assert len(one.tokens_T) == 6 * longest
    assert {s.end - s.start for s in one.segments} == {longest}
    assert all((s.prefix_start, s.prefix_end) == (s.start, s.start) for s in one.segments)
    for segment, filled in zip(plain.segments, one.segments, strict=True):
        length = segment.end - segment.start
        for name in ("tokens_T", "positions_T"):
            got, want = getattr(one, name), getattr(plain, name)
            assert torch.equal(got[filled.start : filled.start + length], want[segment.start : segment.end])
        assert one.tokens_T[filled.start + length : filled.end].eq(0).all()
    assert torch.equal(one.targets_N, plain.targets_N)
    for name in ("tokens_T", "positions_T"):  # the rows that predict are the same rows
        assert torch.equal(getattr(one, name)[one.rows_N], getattr(plain, name)[plain.rows_N])


def side(name: str, *taken: float, loss: float = 0.5) -> Side:
    steps = [{"seconds": t, "processor": 2 * t, "rows": 10.0, "loss": loss} for t in taken]
    return Side(name, [], steps, list(steps), {"peak": 100.0})


def test_ratios_are_taken_turn_by_turn() -> None:
    """The median of the ratios, not the ratio of the medians; first turns do not count."""
    slow, fast = side("packed", 99, 4, 12, 6), side("shared", 1, 2, 3, 6)
    assert step_figures.ratio([2, 3, 6], [4, 12, 6]) == "2.00 (1.00 - 4.00)"
    assert "| shared over packed | 2.00 (1.00 - 4.00) | 2.00 (1.00 - 4.00) |" in step_figures.compare_table(
        [slow, fast], 1
    )
    assert "| packed | 1.333 | 6.00 (4.00 - 12.00) | 12.00 | 10 | 100 |" in step_figures.side_table([slow], 8, 1)


def test_the_reference_is_counted_on_both_sides_or_on_neither() -> None:
    ours = side("shared", 1, 1)
    ours.references = [{"seconds": 1.0, "processor": 1.0}] * 2
    text = step_figures.against_table(ours, side("trl", 8, 8), side("trl-precomputed", 3, 3), 4, 1)
    assert "| reference counted | 2.000 | 0.500 | 4.00 (4.00 - 4.00) | 5.33 (5.33 - 5.33) |" in text
    assert "| reference not counted | 4.000 | 1.333 | 3.00 (3.00 - 3.00) | 3.00 (3.00 - 3.00) |" in text


def test_a_side_is_as_slow_as_its_slowest_process() -> None:
    record = {"seconds": 1.0, "processor": 1.0, "rows": 5.0, "loss": 0.25}
    both = step_turns.together([record, record | {"seconds": 3.0}])
    assert both == {"seconds": 3.0, "processor": 2.0, "rows": 10.0, "loss": 0.25}


def test_other_losses_are_other_work() -> None:
    with pytest.raises(step_turns.SideFailedError, match="do not train the same thing"):
        step_figures.same_losses([side("a", 1, 1), side("b", 1, 1, loss=0.502)])


def test_layouts_side_by_side(capsys: pytest.CaptureFixture[str]) -> None:
    """From the command line to the table; the losses agree to rounding."""
    arguments = [*TINY, "--prompt", "40", "--response", "20", "--max-length", "90"]
    assert bench_step.main(["--compare", "padded,shared", *arguments]) == 0
    out = capsys.readouterr().out
    rows = {name: int(count) for name, count in re.findall(r"^\| (\w+) \|.*\| (\d+) \| \d+ \|$", out, re.MULTILINE)}
    assert rows["padded"] > rows["shared"] > 0
    assert float(re.search(r"at most (\S+) apart", out)[1]) < 1e-5
    assert "shared over padded" in out


@pytest.mark.slow
def test_against_trl(shared, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("trl")
    data = str(shared / "data" / "stories_pairs_train.jsonl")
    assert bench_step.main(["--against", "trl", "--data", data, "--max-length", "256", "--ranks", "1", *TINY]) == 0
    out = capsys.readouterr().out
    assert "| reference counted |" in out
    assert float(re.search(r"at most (\S+) apart", out)[1]) < 1e-3


def test_a_mistake_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_step.main(["--compare", "padded,stacked"]) == 2
    assert capsys.readouterr().err == (
        "bench_step: --compare padded,stacked: stacked is not one of padded, packed, shared, trl, "
        "trl-precomputed, trl-liger\n"
    )
