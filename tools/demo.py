"""The main job at its smallest: a Hugging Face model in, supervised training, DPO, a Hugging Face model out.

    make demo            or   python tools/demo.py [key=value ...]

Makes its data, tokenizer and untrained model from a seed (tools/make_demo.py), runs `megadpo train` on
launch/recipes/demo-sft.yaml and then on launch/recipes/demo.yaml, and asks the exported models, with
transformers alone: which of two answers they prefer on held-out questions, and what they answer. Everything
is under runs/demo and made anew each time. Further key=value settings go to both runs. Exit code not 0 where
a run fails, where the held-out preference accuracy does not rise, or where transformers cannot load it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from make_demo import Sizes, make, style_of
from rich.console import Console
from rich.table import Table
from safetensors import SafetensorError

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "runs" / "demo"
RECIPES = ROOT / "launch" / "recipes"
SEED = 0
TEMPERATURE = 0.7
SHOWN = 2


class DemoError(Exception):
    """The demo did not show what it is there to show."""


@dataclass(frozen=True)
class Loaded:
    """An exported folder as transformers sees it."""

    model: Any
    tokenizer: Any


@dataclass(frozen=True)
class Shown:
    """What one model does on the held-out questions.

    accuracy: share of pairs whose chosen answer has the higher log-probability. answers: one sampled answer
    per question. cheerful: share of cheerful ones among them.
    """

    accuracy: float
    answers: tuple[str, ...]
    cheerful: float


def grid_settings(gpus: int) -> list[str]:
    """The recipes ask for four ranks, TP 2 x PP 2, which a CPU always gives; one to three GPUs get fewer."""
    if gpus in (1, 2, 3):
        return [
            f"parallel.tensor_model_parallel_size={min(gpus, 2)}",
            "parallel.pipeline_model_parallel_size=1",
        ]
    return []


def train(recipe: str, settings: Sequence[str]) -> None:
    """`megadpo train` as the user would run it; raises DemoError where it fails."""
    command = [str(Path(sys.executable).with_name("megadpo")), "train", str(RECIPES / recipe), *settings]
    code = subprocess.run(command, cwd=ROOT).returncode
    if code:
        raise DemoError(f"{recipe}: megadpo train ended with exit code {code}")


def load(folder: Path) -> Loaded:
    """The folder through transformers alone; DemoError where it does not fit or its logits are not finite."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise DemoError(f"{folder}: transformers cannot load the export: {error}") from error
    if wrong := {kind: sorted(map(str, names)) for kind, names in report.items() if names}:
        raise DemoError(f"{folder}: transformers loads the export with a complaint: {wrong}")
    loaded = Loaded(model.eval(), tokenizer)
    ids = prompt_ids(loaded, [{"role": "user", "content": "Tell me about a red cat."}])
    with torch.no_grad():
        logits = loaded.model(torch.tensor([ids])).logits
    if not logits.isfinite().all():
        raise DemoError(f"{folder}: the exported model gives logits that are not finite")
    return loaded


def prompt_ids(loaded: Loaded, turns: list[dict[str, str]]) -> list[int]:
    """Ids of a conversation up to where the model's answer begins."""
    text = loaded.tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    return list(loaded.tokenizer(text, add_special_tokens=False)["input_ids"])


def answer_logp(loaded: Loaded, prompt: list[dict[str, str]], answer: list[dict[str, str]]) -> float:
    """Log-probability of the answer and its end-of-sequence token after the prompt, in nats."""
    asked = prompt_ids(loaded, prompt)
    text = loaded.tokenizer.apply_chat_template(prompt + answer, tokenize=False)
    ids = torch.tensor([loaded.tokenizer(text, add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        logp = loaded.model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
    return float(logp[len(asked) - 1 :].sum())


def answer(loaded: Loaded, prompt: list[dict[str, str]], seed: int) -> str:
    """One answer, sampled with a seed of its own so that both models draw the same random numbers."""
    ids = torch.tensor([prompt_ids(loaded, prompt)])
    torch.manual_seed(seed)
    out = loaded.model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=True,
        temperature=TEMPERATURE,
        max_new_tokens=80,
        pad_token_id=loaded.tokenizer.eos_token_id,
    )
    return str(loaded.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))


def show(loaded: Loaded, pairs: list[dict[str, Any]]) -> Shown:
    """Ask the model every held-out question."""
    hits = [
        answer_logp(loaded, pair["prompt"], pair["chosen"]) > answer_logp(loaded, pair["prompt"], pair["rejected"])
        for pair in pairs
    ]
    answers = tuple(answer(loaded, pair["prompt"], seed) for seed, pair in enumerate(pairs))
    cheerful = sum(style_of(text) == "cheerful" for text in answers) / len(answers)
    return Shown(sum(hits) / len(hits), answers, cheerful)


def verdict(before: Shown, after: Shown) -> None:
    """Raises DemoError where training did not raise the held-out preference accuracy."""
    if not after.accuracy > before.accuracy:
        raise DemoError(
            f"held-out preference accuracy did not rise: {before.accuracy:.0%} before, {after.accuracy:.0%} after"
        )


def examples(before: Shown) -> list[int]:
    """Questions to show: the first that the model answered gloomily before, or else the first."""
    gloomy = [number for number, text in enumerate(before.answers) if style_of(text) == "gloomy"]
    return (gloomy + [number for number in range(len(before.answers)) if number not in gloomy])[:SHOWN]


def story(console: Console, pairs: list[dict[str, Any]], before: Shown, after: Shown) -> None:
    table = Table(title=f"{len(pairs)} held-out questions", title_justify="left")
    for heading in ("", "before DPO", "after DPO"):
        table.add_column(heading, justify="left" if not heading else "right")
    table.add_row("preference accuracy", f"{before.accuracy:.0%}", f"{after.accuracy:.0%}")
    table.add_row(f"cheerful answers (temperature {TEMPERATURE})", f"{before.cheerful:.0%}", f"{after.cheerful:.0%}")
    console.print(table)
    console.print(f"{SHOWN} of them, first those that it answered gloomily before:")
    for number in examples(before):
        console.print(f"\n  [bold]{pairs[number]['prompt'][0]['content']}[/bold]")
        console.print(f"    before  {before.answers[number]}", highlight=False, markup=False, soft_wrap=True)
        console.print(f"    after   {after.answers[number]}", highlight=False, markup=False, soft_wrap=True)


def main(settings: Sequence[str]) -> int:
    from transformers.utils import logging

    logging.disable_progress_bar()
    started = time.monotonic()
    console = Console()
    settings = [*grid_settings(torch.cuda.device_count()), *settings]
    try:
        console.rule("1 of 4  make data, a tokenizer and an untrained Llama")
        shutil.rmtree(WORK, ignore_errors=True)
        counts = make(WORK / "made", Sizes(), SEED)
        pairs = [json.loads(line) for line in (WORK / "made" / "pairs_eval.jsonl").read_text().splitlines()]
        console.print(
            f"{counts['parameters']:,} parameters, {counts['sft']:,} demonstrations (half cheerful, half "
            f"gloomy), {counts['pairs_train']:,} pairs (cheerful over gloomy), {len(pairs)} more held out"
        )
        console.rule("2 of 4  supervised pass: teach it to answer, in both styles")
        train("demo-sft.yaml", settings)
        before = show(load(WORK / "sft" / "export"), pairs)
        console.rule("3 of 4  DPO: prefer the cheerful answer")
        train("demo.yaml", settings)
        console.rule("4 of 4  load the export with transformers and ask it")
        after = show(load(WORK / "dpo" / "export"), pairs)
        story(console, pairs, before, after)
        verdict(before, after)
    except DemoError as error:
        console.print(f"[red]demo failed:[/red] {error}", highlight=False)
        return 1
    seconds = time.monotonic() - started
    console.print(f"\n{os.path.relpath(WORK / 'dpo' / 'export')} is a Hugging Face folder. {seconds:.0f} s in all.")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
