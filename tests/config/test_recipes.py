"""Every recipe reads as a run file, says where its numbers come from, and has the published ones."""

from pathlib import Path
from typing import Any

import pytest

from megadpo.config.decode import load_config
from megadpo.data.records import FORMATS
from megadpo.objectives.names import name_of

RECIPES = Path(__file__).resolve().parents[2] / "launch" / "recipes"
PUBLISHED: dict[str, dict[str, Any]] = {
    "zephyr-7b-sft": {"loss_type": "sft", "learning_rate": 2e-5, "batch": 128, "epochs": 1, "length": 2048},
    "zephyr-7b-dpo": {"loss_type": "dpo", "beta": 0.01, "learning_rate": 5e-7, "batch": 128, "length": 1024},
    "neuralchat-7b-dpo": {"loss_type": "dpo", "batch": 64, "length": 1024},
    "tulu3-8b-dpo-norm": {"loss_type": "dpo_norm", "beta": 5.0, "learning_rate": 5e-7, "batch": 128, "length": 2048},
    "llama3-dpo-nll": {"loss_type": "llama3", "beta": 0.1, "alpha": 0.2, "learning_rate": 1e-5},
    "simpo-llama3-8b": {"loss_type": "simpo", "beta": 2.0, "gamma": 1.0, "learning_rate": 6e-7, "length": 2048},
    "kto-llama3-8b": {"loss_type": "kto", "beta": 0.1, "learning_rate": 5e-6, "batch": 32, "length": 1024},
    "orpo-mistral-7b": {"loss_type": "orpo", "beta": 0.1, "learning_rate": 5e-6, "batch": 32, "epochs": 5},
    "reward-llama3-8b": {"loss_type": "reward", "centering": 0.01},
    "llama3-8b-dpo": {"loss_type": "dpo_norm", "beta": 5.0, "learning_rate": 5e-7, "batch": 128, "length": 2048},
    "llama3-70b-dpo": {"loss_type": "dpo_norm", "beta": 5.0, "learning_rate": 2e-7, "batch": 128, "length": 2048},
    "llama3-405b-dpo": {"loss_type": "dpo_norm", "beta": 5.0, "learning_rate": 2e-7, "batch": 256, "length": 2048},
}


@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPES.glob("*.yaml")))
def test_recipe(name: str) -> None:
    path = RECIPES / f"{name}.yaml"
    config = load_config(path, [])
    assert config.data.format in ("auto", *(known.name for known in FORMATS))
    if config.data.chat_template:
        assert (RECIPES.parents[1] / config.data.chat_template).is_file()
    if name.startswith("demo"):
        return
    comment = "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
    assert "# Source: " in comment or "No published recipe" in comment
    has = {
        "loss_type": name_of(config.objective),
        "learning_rate": config.optimizer.learning_rate,
        "batch": config.batch.global_batch_size,
        "epochs": config.train.num_train_epochs,
        "length": config.data.max_length,
        **vars(config.objective),
    }
    wanted = PUBLISHED[name]
    assert {key: has[key] for key in wanted} == wanted


def test_none_is_missing() -> None:
    assert PUBLISHED.keys() <= {path.stem for path in RECIPES.glob("*.yaml")}
