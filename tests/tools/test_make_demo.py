"""The data, the tokenizer and the model that the project makes for itself."""

import filecmp
import json
from pathlib import Path

import pytest
from make_demo import SPECIAL_TOKENS, STYLES, Sizes, make, style_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from megadpo.config import DataConfig
from megadpo.data.kinds import Wanted
from megadpo.data.prepare import prepare

DATA = ("sft.jsonl", "pairs_train.jsonl", "pairs_eval.jsonl")
MODEL = ("model/config.json", "model/model.safetensors", "model/tokenizer.json", "model/chat_template.jinja")


def rows(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def questions(folder: Path, name: str) -> set[str]:
    return {row["prompt"][0]["content"] for row in rows(folder, name)}


def test_the_seed_decides_every_file(made: Path, tmp_path: Path) -> None:
    sizes = Sizes(hidden_size=32, intermediate_size=48, layers=2, heads=4, kv_heads=2)
    make(tmp_path / "again", sizes, seed=0)
    make(tmp_path / "other", sizes, seed=1)
    match, different, errors = filecmp.cmpfiles(made, tmp_path / "again", DATA + MODEL, shallow=False)
    assert (sorted(match), different, errors) == (sorted(DATA + MODEL), [], [])
    changed = ("sft.jsonl", "pairs_train.jsonl", "pairs_eval.jsonl", "model/model.safetensors")
    match, _, _ = filecmp.cmpfiles(made, tmp_path / "other", changed, shallow=False)
    assert match == []


def test_an_existing_folder_is_left_alone(made: Path) -> None:
    before = (made / "sft.jsonl").read_bytes()
    with pytest.raises(FileExistsError, match="exists already"):
        make(made, Sizes(), seed=1)
    assert (made / "sft.jsonl").read_bytes() == before


def test_no_held_out_question_is_trained_on(made: Path) -> None:
    held_out = questions(made, "pairs_eval.jsonl")
    assert len(held_out) == Sizes().held_out
    assert held_out.isdisjoint(questions(made, "sft.jsonl") | questions(made, "pairs_train.jsonl"))


def test_demonstrations_have_both_styles_equally_often(made: Path) -> None:
    styles: dict[str, list[str | None]] = {}
    for row in rows(made, "sft.jsonl"):
        styles.setdefault(row["prompt"][0]["content"], []).append(style_of(row["completion"][0]["content"]))
    for question, given in styles.items():
        assert sorted(map(str, given)) == sorted(STYLES * Sizes().answers), question


def test_pairs_prefer_cheerful_over_gloomy(made: Path) -> None:
    for name in ("pairs_train.jsonl", "pairs_eval.jsonl"):
        for row in rows(made, name):
            assert style_of(row["chosen"][0]["content"]) == "cheerful"
            assert style_of(row["rejected"][0]["content"]) == "gloomy"


def test_style_of_a_text_with_both_or_neither() -> None:
    assert style_of("How wonderful! Nobody likes it.") is None
    assert style_of("The cat sleeps.") is None


def test_the_tokenizer_gives_every_text_back(made: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(made / "model")
    texts = [row["prompt"][0]["content"] for row in rows(made, "sft.jsonl")]
    for text in [*texts[:100], "zebra 9 \u00e4\u20ac\n\ttabs  and  spaces"]:
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_the_model_fits_its_tokenizer_and_needs_padding(made: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(made / "model")
    model = AutoModelForCausalLM.from_pretrained(made / "model")
    assert len(tokenizer) == model.config.vocab_size == model.lm_head.weight.shape[0]
    assert model.config.vocab_size % 2 == 1
    assert Sizes().layers % 2 == 1
    assert tokenizer.convert_ids_to_tokens(list(range(len(SPECIAL_TOKENS)))) == list(SPECIAL_TOKENS)
    assert (model.config.bos_token_id, model.config.eos_token_id) == (
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
    )


@pytest.mark.parametrize(("name", "responses"), [("sft.jsonl", 1), ("pairs_train.jsonl", 2)])
def test_megadpo_reads_all_of_it(made: Path, tmp_path: Path, name: str, responses: int) -> None:
    data = DataConfig(train=(str(made / name),), max_length=256, cache_dir=str(tmp_path), num_proc=1)
    store = prepare(data.train, data, str(made / "model"), Wanted("pairs" if responses == 2 else "demonstrations"))
    assert len(store) == len(rows(made, name)) == store.report.rows_read
    assert (store.report.truncated, store.report.boundary_splits) == (0, 0)
    tokenizer = AutoTokenizer.from_pretrained(made / "model")
    group, row = store.group(0), rows(made, name)[0]
    answer = row["completion" if responses == 1 else "chosen"]
    whole = tokenizer.apply_chat_template(row["prompt"] + answer, tokenize=False)
    given = [*group.prompt_ids.tolist(), *group.response_ids[0].tolist()]
    assert given == tokenizer(whole, add_special_tokens=False)["input_ids"]


def test_the_files_are_small(made: Path) -> None:
    assert sum(path.stat().st_size for path in made.rglob("*") if path.is_file()) < 3_000_000
