"""What counts as parity."""

import math

import pytest
from compare_steps import SHOWN, Limits, compare

STEPS = 3


def records(changed: dict[str, float | None] | None = None) -> list[dict]:
    """Three steps; `changed` replaces values of step 2."""
    steps = [{"step": step, **{name: step / 10 for name in SHOWN}, "loss": 0.6} for step in (1, 2, 3)]
    steps[0]["loss"] = math.log(2)
    steps[1].update(changed or {})
    return steps


def faults(theirs: list[dict], ours: list[dict]) -> list[str]:
    return compare(theirs, ours, STEPS, Limits()).faults


def test_equal_records_have_no_fault() -> None:
    comparison = compare(records(), records(), STEPS, Limits())
    assert comparison.faults == []
    assert comparison.largest() == dict.fromkeys(SHOWN, 0.0)


@pytest.mark.parametrize(
    ("name", "within", "over"),
    [
        ("loss", 0.6 + 9e-5, 0.6 + 1.1e-4),
        ("logps/chosen", 0.2 - 9e-4, 0.2 - 1.1e-3),
        ("logps/rejected", 0.2 + 9e-4, 0.2 + 1.1e-3),
        ("rewards/margins", 0.2 - 9e-5, 0.2 - 1.1e-4),
        ("grad_norm", 0.2 * (1 + 9e-4), 0.2 * (1 + 1.1e-3)),
    ],
)
def test_a_difference_counts_from_its_limit_on(name: str, within: float, over: float) -> None:
    assert faults(records(), records({name: within})) == []
    found = faults(records(), records({name: over}))
    assert len(found) == 1
    assert found[0].startswith("step 2: ")


def test_accuracies_are_shown_without_a_limit() -> None:
    comparison = compare(records(), records({"rewards/accuracies": 0.7}), STEPS, Limits())
    assert comparison.faults == []
    assert comparison.largest()["rewards/accuracies"] == pytest.approx(0.5)


@pytest.mark.parametrize("value", [None, math.nan, math.inf])
@pytest.mark.parametrize("name", ["loss", "grad_norm", "logps/chosen", "rewards/accuracies"])
def test_what_is_not_a_finite_number_is_a_fault_on_either_side(name: str, value: float | None) -> None:
    for theirs, ours in ((records(), records({name: value})), (records({name: value}), records())):
        comparison = compare(theirs, ours, STEPS, Limits())
        assert len(comparison.faults) == 1
        assert "is not a number" in comparison.faults[0]
        assert math.isnan(comparison.largest()[name])


def test_a_missing_metric_is_a_fault() -> None:
    ours = records()
    del ours[2]["grad_norm"]
    assert faults(records(), ours) == ["step 3: grad_norm is not a number (None, TRL 0.3)"]


def test_a_missing_step_is_a_fault_on_either_side() -> None:
    assert faults(records(), records()[:2]) == ["step 3: no record of megadpo"]
    assert faults(records()[:2], records()) == ["step 3: no record of TRL"]
    assert faults([], []) != []


def test_held_out_records_are_not_steps() -> None:
    assert faults(records(), [*records(), {"step": 3, "eval_loss": 9.0}]) == []


def test_the_first_loss_is_ln_2() -> None:
    both = records()
    both[0]["loss"] += 2e-6
    assert [fault.split(":")[0] for fault in faults(both, both)] == ["TRL", "megadpo"]
