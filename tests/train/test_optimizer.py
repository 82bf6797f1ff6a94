"""The learning rate as a function of the step."""

import pytest

from megadpo.config import OptimizerConfig
from megadpo.train.optimizer import learning_rate


def rates(steps: int, **settings: object) -> list[float]:
    config = OptimizerConfig(learning_rate=1.0, **settings)
    return [learning_rate(config, step, steps) for step in range(steps)]


def test_warm_up_is_a_straight_line_that_begins_over_0() -> None:
    assert rates(8, warmup_steps=3, lr_scheduler_type="constant") == [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]


def test_decay() -> None:
    assert rates(4, warmup_steps=0, lr_scheduler_type="linear") == [1, 0.75, 0.5, 0.25]
    assert rates(4, warmup_steps=0, lr_scheduler_type="cosine") == pytest.approx([1, 0.853553, 0.5, 0.146447], abs=1e-6)
    assert rates(4, warmup_steps=0, lr_scheduler_type="linear", min_lr_ratio=0.2) == pytest.approx([1, 0.8, 0.6, 0.4])


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("steps", [1, 2, 3, 10, 100])
def test_no_update_is_without_effect(kind: str, steps: int) -> None:
    """A run of one step, with the default warm-up ratio, must train."""
    assert min(rates(steps, lr_scheduler_type=kind)) > 0
    assert max(rates(steps, lr_scheduler_type=kind)) <= 1


def test_ratio() -> None:
    assert rates(10, warmup_ratio=0.2, lr_scheduler_type="constant") == pytest.approx([1 / 3, 2 / 3] + [1] * 8)
