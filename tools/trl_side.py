"""Train TRL's DPOTrainer in float32 on the CPU, on token ids that are given, in the order that is given.

The other half of `tools/parity.py`; also usable alone. Needs the extra `trl` (pip install -e .[trl]).

Input: JSON lines, one object a pair: {"prompt_ids": [...], "chosen_ids": [...], "rejected_ids": [...]}.
Output: JSON lines, one object a step: step and METRICS, by TRL's names. With --eval-groups a last object has
the held-out metrics, whose names begin with eval_. All are means over pairs; log-probabilities are in nats.

What TRL 1.16 does, as its source says and the checks below hold:
- `grad_norm` is the norm before clipping. Rewards and log-probabilities are means over micro-batches of
  micro-batch means: the mean over pairs only where micro-batches are equally large, which is enforced here.
- Its dataset preparation always tokenises text. The subclass below hands the ids through instead.
- label_smoothing has no effect on its `sigmoid` loss (since its #3906), so this tool has no such option.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PAIR_KEYS = ("prompt_ids", "chosen_ids", "rejected_ids")
METRICS = (
    "loss",
    "grad_norm",
    "learning_rate",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
)


@dataclass(frozen=True)
class TrlRun:
    """What TRL is asked to do. Batches count pairs; steps are updates; an epoch is one pass in file order."""

    model: str
    steps: int
    batch: int = 8
    micro_batch: int | None = None
    """Pairs in one forward pass; the whole batch where not given."""
    learning_rate: float = 1e-4
    schedule: str = "constant"
    """constant, linear or cosine, without warm-up, over `steps`."""
    beta: float = 0.1
    max_grad_norm: float = 1.0
    seed: int = 0
    shuffle: bool = False
    precompute_reference: bool = False
    """The reference's log-probabilities in one pass before training instead of at every step."""
    on_gpu: bool = False
    autocast: bool = False
    """Products in bfloat16; weights, gradients and Adam's state stay float32."""
    liger: bool = False
    """Liger's kernels, the fused DPO loss among them."""
    recompute: bool = False
    """Gradient checkpointing."""

    def problems(self, pairs: int) -> list[str]:
        """What makes the run meaningless with so many pairs, one line each."""
        found = []
        if self.batch % (self.micro_batch or self.batch):
            found.append(f"--micro-batch {self.micro_batch} does not divide --batch {self.batch}")
        if self.micro_batch not in (None, self.batch) and self.steps * self.batch > pairs - pairs % self.batch:
            found.append(
                f"{self.steps} steps of {self.batch} do not fit whole into {pairs} pairs: with --micro-batch "
                "TRL's means would weigh the pairs of a cut batch otherwise; give more pairs or fewer steps"
            )
        return found


def read_pairs(path: Path) -> list[dict[str, list[int]]]:
    """The pairs of a JSON-lines file; ValueError names the line that lacks one of PAIR_KEYS."""
    pairs = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        row = json.loads(line)
        if any(not row.get(key) for key in PAIR_KEYS):
            raise ValueError(f"{path}:{number}: each line needs non-empty {', '.join(PAIR_KEYS)}")
        pairs.append({key: row[key] for key in PAIR_KEYS})
    return pairs


def batch_sequences(batch: dict[str, Any]) -> list[tuple[list[int], list[int]]]:
    """(prompt ids, response ids) of every row of a batch of TRL's collator, padding removed."""
    rows = []
    for ids, attended, scored in zip(
        batch["input_ids"].tolist(),
        batch["attention_mask"].tolist(),
        batch["completion_mask"].tolist(),
        strict=True,
    ):
        start, end = scored.index(1), sum(attended)
        if attended != [1] * end + [0] * (len(ids) - end) or scored[start:end] != [1] * (end - start):
            raise AssertionError("TRL's collator left a hole in a sequence")
        if sum(scored) != end - start:
            raise AssertionError("TRL's collator scores padding")
        rows.append((ids[:start], ids[start:end]))
    return rows


def check_batch(batch: dict[str, Any], given: Sequence[dict[str, list[int]]]) -> None:
    """AssertionError unless the collated batch is exactly the given pairs: chosen first, then rejected."""
    want = [(pair["prompt_ids"], pair[key]) for key in ("chosen_ids", "rejected_ids") for pair in given]
    if batch_sequences(batch) != want:
        raise AssertionError("TRL's batch is not the pairs that were given: ids added, cut or in another order")


def train(
    run: TrlRun,
    pairs: list[dict[str, list[int]]],
    eval_pairs: list[dict[str, list[int]]] | None = None,
    weights: Path | None = None,
    callbacks: Sequence[Any] = (),
) -> list[dict[str, float]]:
    """One record per step (METRICS and `step`), then one of "eval_" metrics where eval_pairs are given.

    weights: folder that gets the trained model (float32), if any. callbacks: transformers' TrainerCallbacks.
    """
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    class GivenIds(DPOTrainer):
        """DPOTrainer without its own tokenising; checks every training batch against what was given."""

        def _prepare_dataset(self, dataset: Dataset, *_: object) -> Dataset:
            return dataset

    tokenizer = AutoTokenizer.from_pretrained(run.model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    plain = DataCollatorForPreference(pad_token_id=tokenizer.pad_token_id, max_length=None)
    micro = run.micro_batch or run.batch
    with tempfile.TemporaryDirectory() as scratch:
        trainer = GivenIds(
            model=AutoModelForCausalLM.from_pretrained(run.model, dtype=torch.float32),
            args=DPOConfig(
                output_dir=scratch,
                beta=run.beta,
                loss_type=["sigmoid"],
                precompute_ref_log_probs=run.precompute_reference,
                disable_dropout=True,
                max_length=None,
                max_steps=run.steps,
                per_device_train_batch_size=micro,
                # TRL averages the means of batches: only batches of one give the mean over pairs.
                per_device_eval_batch_size=1,
                gradient_accumulation_steps=run.batch // micro,
                learning_rate=run.learning_rate,
                lr_scheduler_type=run.schedule,
                warmup_steps=0,
                weight_decay=0.0,
                max_grad_norm=run.max_grad_norm,
                optim="adamw_torch",
                adam_beta1=0.9,
                adam_beta2=0.999,
                adam_epsilon=1e-8,
                train_sampling_strategy="random" if run.shuffle else "sequential",
                seed=run.seed,
                bf16=run.autocast,
                gradient_checkpointing=run.recompute,
                use_cpu=not run.on_gpu,
                use_liger_kernel=run.liger,
                dataloader_num_workers=0,
                logging_steps=1,
                logging_nan_inf_filter=False,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
            ),
            data_collator=plain if run.shuffle else _Checked(plain, pairs),
            train_dataset=Dataset.from_list(pairs),
            eval_dataset=Dataset.from_list(eval_pairs) if eval_pairs else None,
            processing_class=tokenizer,
            callbacks=list(callbacks),
        )
        trainer.train()
        records = [
            {"step": log["step"], **{name: log[name] for name in METRICS}}
            for log in trainer.state.log_history
            if "loss" in log
        ]
        if eval_pairs:
            trainer.data_collator = plain
            records.append({name: float(value) for name, value in trainer.evaluate().items()})
        if weights:
            trainer.model.save_pretrained(weights)
            tokenizer.save_pretrained(weights)
    return records


class _Checked:
    """A collator that knows which pairs come next and fails where it gets others."""

    def __init__(self, collator: Any, pairs: list[dict[str, list[int]]]) -> None:
        self.collator, self.pairs, self.seen = collator, pairs, 0

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = self.collator(examples)
        start = self.seen % len(self.pairs)
        check_batch(batch, self.pairs[start : start + len(examples)])
        self.seen += len(examples)
        return batch


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--groups", required=True, type=Path)
    parser.add_argument("--eval-groups", type=Path)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--steps", required=True, type=int)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--micro-batch", type=int)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--schedule", default="constant", choices=("constant", "linear", "cosine"))
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--max-grad-norm", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shuffle", action="store_true")
    args = parser.parse_args(argv)
    run = TrlRun(
        model=args.model,
        steps=args.steps,
        batch=args.batch,
        micro_batch=args.micro_batch,
        learning_rate=args.lr,
        schedule=args.schedule,
        beta=args.beta,
        max_grad_norm=args.max_grad_norm,
        seed=args.seed,
        shuffle=args.shuffle,
    )
    pairs = read_pairs(args.groups)
    if found := run.problems(len(pairs)):
        print("\n".join(found), file=sys.stderr)
        return 2
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    records = train(run, pairs, read_pairs(args.eval_groups) if args.eval_groups else None, args.weights)
    partial = args.out.with_name(args.out.name + ".partial")
    partial.write_text("".join(json.dumps(record) + "\n" for record in records))
    os.replace(partial, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
