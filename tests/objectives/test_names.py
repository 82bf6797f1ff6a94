"""One switch: every name that users know leads to the loss that it means, or to a line that says what to write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from megadpo.config.decode import load_config, to_yaml
from megadpo.config.schema import field_types
from megadpo.errors import ConfigError
from megadpo.objectives import DPO, OBJECTIVES, SFT, Mix
from megadpo.objectives.margins import RewardRPO
from megadpo.objectives.names import (
    ALIASES,
    AMBIGUOUS,
    SETTINGS_ELSEWHERE,
    SETTINGS_IN_PAPERS,
    as_settings,
    name_of,
    title,
)
from megadpo.objectives.pairwise import DPOWithNLL
from megadpo.objectives.reference_free import SimPO

MADE_FOR = {
    "TRL": "sigmoid hinge ipo exo_pair nca_pair robust bco_pair sppo_hard aot aot_unpaired apo_zero apo_down discopop "
    "sft sigmoid_norm kto apo_zero_unpaired simpo cpo orpo",
    "papers": "cdpo conservative_dpo robust_dpo pairwise_cringe pl_dpo reward_model",
    "LLaMA-Factory": "sigmoid hinge ipo orpo simpo rm sft kto",
    "NeMo": "dpo ipo rpo_bwd_kl rpo_fwd_kl rpo_sq",
    "ms-swift": "dpo orpo simpo kto cpo rm",
    "open-instruct": "dpo dpo_norm simpo wpo",
}  # fmt: skip


def read(tmp_path: Path, objective: Any, reference: str = "resident", backend: str = "auto") -> Any:
    path = tmp_path / "run.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "run_dir": "run",
                "model": {"path": "model", "logprob_backend": backend},
                "data": {"train": "pairs.jsonl"},
                "reference": {"mode": reference},
                "objective": objective,
            }
        )
    )
    return load_config(path, [])


@pytest.mark.parametrize("program", MADE_FOR)
def test_names_of_other_programs(program: str) -> None:
    for name in MADE_FOR[program].split():
        assert name in OBJECTIVES or name in ALIASES, name


def test_tables_fit_together() -> None:
    assert not set(OBJECTIVES) & set(ALIASES)
    assert not (set(OBJECTIVES) | set(ALIASES)) & set(AMBIGUOUS)
    for alias in ALIASES.values():
        OBJECTIVES[alias.loss_type](**alias.settings)


def test_an_alias_sets_what_its_name_says(tmp_path: Path) -> None:
    objective = RewardRPO(eta=2.0, distance="squared")
    assert read(tmp_path, {"loss_type": "rpo_sq", "eta": 2.0}).objective == objective
    assert as_settings(objective) == {"loss_type": "rpo_reward", "beta": 0.1, "eta": 2.0, "distance": "squared"}
    with pytest.raises(ConfigError, match="loss_type rpo_sq says squared; write loss_type: rpo_reward"):
        read(tmp_path, {"loss_type": "rpo_sq", "distance": "forward_kl"})
    assert read(tmp_path, {"loss_type": "irpo"}).objective == DPOWithNLL(normalise="response")


@pytest.mark.parametrize("name", ["cdpo", "conservative_dpo", "cDPO"])
def test_conservative_dpo_needs_its_smoothing(tmp_path: Path, name: str) -> None:
    """Without, the name would train plain DPO."""
    for settings in ({}, {"label_smoothing": 0}):
        with pytest.raises(
            ConfigError, match=rf"label_smoothing = 0: loss_type {name} is dpo with label_smoothing over"
        ):
            read(tmp_path, {"loss_type": name} | settings)
    assert read(tmp_path, {"loss_type": name, "label_smoothing": 0.1}).objective == DPO(0.1, 0.1)


@pytest.mark.parametrize("name", AMBIGUOUS)
def test_a_name_with_several_meanings_says_what_to_write(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="write ") as raised:
        read(tmp_path, {"loss_type": name})
    assert name in str(raised.value)
    assert any(other in str(raised.value) for other in OBJECTIVES)


@pytest.mark.parametrize("setting", SETTINGS_ELSEWHERE)
def test_a_setting_of_another_program_says_where_its_meaning_is(tmp_path: Path, setting: str) -> None:
    if setting in ("loss_type", "beta"):
        return
    with pytest.raises(ConfigError) as raised:
        read(tmp_path, {"loss_type": "dpo", setting: 1.0})
    assert f"objective.{setting}: dpo has no such setting" in str(raised.value)
    assert SETTINGS_ELSEWHERE[setting].split()[0] in str(raised.value)


def test_a_setting_that_its_paper_calls_otherwise(tmp_path: Path) -> None:
    """Where the same word means another setting for another objective."""
    for loss_type, settings in SETTINGS_IN_PAPERS.items():
        for setting, here in settings.items():
            assert here.split(",")[0] in field_types(OBJECTIVES[loss_type])
            with pytest.raises(ConfigError, match=f"objective.{setting}: .*here that is objective.{here}"):
                read(tmp_path, {"loss_type": loss_type, setting: 1.0})
    with pytest.raises(ConfigError, match=r"kto_chosen_weight: .* here that is objective\.desirable_weight"):
        read(tmp_path, {"loss_type": "kto", "kto_chosen_weight": 1.0})


def test_a_list_of_names_is_a_mix(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as raised:
        read(tmp_path, {"loss_type": ["sigmoid", "sft"]})
    assert "for several objectives write loss_type: mix, parts: [{loss_type: sigmoid}, {loss_type: sft}]" in str(
        raised.value
    )


def test_a_list_of_one_name_is_that_name(tmp_path: Path) -> None:
    """As TRL writes its default."""
    assert read(tmp_path, {"loss_type": ["sigmoid"]}).objective == DPO()


def test_no_objective_takes_a_setting_that_it_has_not(tmp_path: Path) -> None:
    """The trap of a loss_type or a setting that is read and never used."""
    for name in OBJECTIVES:
        with pytest.raises(ConfigError, match=r"no_such_setting: .* has no such setting"):
            read(tmp_path, {"loss_type": name, "no_such_setting": 1.0})


def test_a_mix(tmp_path: Path) -> None:
    parts = [{"loss_type": "sigmoid", "beta": 0.3}, {"loss_type": "sft"}]
    config = read(tmp_path, {"loss_type": "mix", "parts": parts, "weights": [1, 0.2]})
    assert config.objective == Mix((DPO(0.3), SFT()), (1.0, 0.2))
    assert config.objective.responses == 2
    again = tmp_path / "again.yaml"
    again.write_text(to_yaml(config))
    assert load_config(again, []) == config


@pytest.mark.parametrize(
    ("mix", "line"),
    [
        ({"parts": []}, "must name at least one"),
        ({"parts": [{"loss_type": "dpo"}], "weights": [1, 2]}, "has 2 numbers for 1 parts"),
        ({"parts": [{"loss_type": "dpo"}, {"loss_type": "plackett_luce"}]}, "groups of different sizes"),
        ({"parts": [{"loss_type": "dpo"}, {"loss_type": "reward"}]}, "does not mix"),
        ({"parts": [{"loss_type": "mix", "parts": [{"loss_type": "dpo"}]}]}, "a mix in a mix"),
        (
            {"parts": [{"loss_type": "kto"}, {"loss_type": "sft"}]},
            "sft beside KTO would raise the likelihood of undesi",
        ),
        ({"parts": [{"loss_type": "dpo", "beta": -1.0}]}, "beta = -1.0: must be over 0"),
        ({"parts": [{"loss_type": "dpo", "gamma": 1.0}]}, "dpo has no such setting"),
        (
            {"parts": [{"loss_type": "dpo"}], "weights": [0]},
            "weights = [0.0]: must be at least 0, and one of them over 0",
        ),
        ({"parts": [{"loss_type": "dpo"}, {"loss_type": "sft"}], "weights": [-1, 2]}, "must be at least 0, and one of"),
        ({"parts": {"loss_type": "dpo"}}, "must be a list of sections"),
        ({"parts": [{"loss_type": "dpo"}], "weights": "1"}, "must be a list of numbers"),
        ({}, "objective.parts: missing"),
    ],
)
def test_a_wrong_mix(tmp_path: Path, mix: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError, match="objective") as raised:
        read(tmp_path, {"loss_type": "mix"} | mix)
    assert line in str(raised.value)


def test_what_the_head_cannot_give_is_refused(tmp_path: Path) -> None:
    """At start, by name: never trained as something else."""
    for name in ("wpo", "tdpo1", "tdpo2", "cringe"):
        assert name_of(read(tmp_path, {"loss_type": name}).objective) == name
    with pytest.raises(ConfigError, match=r"reference\.mode = precomputed.*set reference\.mode: resident"):
        read(tmp_path, {"loss_type": "tdpo1"}, reference="precomputed")
    with pytest.raises(ConfigError, match=r"logprob_backend = triton.*tdpo2 needs; must be auto, chunked or reference"):
        read(tmp_path, {"loss_type": "tdpo2"}, backend="triton")
    with pytest.raises(ConfigError, match=r"top_k = 0: must be at least 1"):
        read(tmp_path, {"loss_type": "cringe", "top_k": 0})
    two = [{"loss_type": "cringe", "top_k": k} for k in (3, 4)]
    with pytest.raises(ConfigError, match="give them the same top_k"):
        read(tmp_path, {"loss_type": "mix", "parts": two})


def test_tokens_of_the_reference_need_it_beside_the_policy(tmp_path: Path) -> None:
    assert read(tmp_path, {"loss_type": "ld_dpo"}).objective.needs_reference
    with pytest.raises(ConfigError, match=r"set reference\.mode: resident"):
        read(tmp_path, {"loss_type": "ld_dpo"}, reference="precomputed")


def test_the_log_says_what_it_is() -> None:
    assert title(DPO(0.2)).startswith(
        "dpo (elsewhere: sigmoid, cdpo, conservative_dpo): Direct preference optimisation"
    )
    assert "beta 0.2" in title(DPO(0.2))
    assert title(Mix((SimPO(), SFT()), (1.0, 0.5))).startswith("mix of 1 x [simpo: Simple preference")


def test_rules_hold_for_the_defaults_and_say_what_is_wrong() -> None:
    for name, kind in OBJECTIVES.items():
        if kind is Mix:
            continue
        objective = kind()
        assert name_of(objective) == name
        assert objective.problems() == []
        if hasattr(objective, "beta"):
            [problem] = kind(beta=0.0).problems()
            assert problem.startswith("objective.beta = 0.0: must be over 0")
