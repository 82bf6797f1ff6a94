"""What others published beside what the planner says of the same model, GPUs, grid and rows. Nothing here was measured
by us, and no constant was changed to make the two agree.

python tools/plan_published.py [--write]      (--write: tools/results/plan_published.md)
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megadpo.config import Config
from megadpo.config.decode import load_config
from megadpo.observe.gpus import GIB, GPUS
from megadpo.observe.quiet import quiet
from megadpo.plan.grids import Candidate, Space
from megadpo.plan.profile import rank_numbers
from megadpo.plan.search import Search, usable
from megadpo.plan.time import Estimate
from megadpo.plan.workload import Assumed, assumed
from megadpo.train.inputs import read_shapes

RESULTS = Path(__file__).parent / "results"


def llama(hidden: int, ffn: int, layers: int, heads: int, groups: int, vocab: int, **more: Any) -> dict[str, Any]:
    """config.json of a Llama: published hyper-parameters."""
    base = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "rms_norm_eps": 1e-5, "hidden_act": "silu"}
    sizes = {"hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers, "vocab_size": vocab}
    sizes |= {"num_attention_heads": heads, "num_key_value_heads": groups, "max_position_embeddings": 131072}
    rest = {"rope_theta": 500000.0, "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": False}
    return {**base, **sizes, **rest, **more}


OLMO2 = {"architectures": ["Olmo2ForCausalLM"], "model_type": "olmo2", "rms_norm_eps": 1e-6, "mlp_bias": None}
QWEN3 = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 128, "mlp_bias": None}
MODELS = {
    "OLMo2-7B": llama(4096, 11008, 32, 32, 32, 100352, **OLMO2),
    "Llama-3.1-8B": llama(4096, 14336, 32, 32, 8, 128256),
    "Llama-3-70B": llama(8192, 28672, 80, 64, 8, 128256),
    "Llama-3.2-1B": llama(2048, 8192, 16, 32, 8, 128256, tie_word_embeddings=True),
    "Llama-2-7B": llama(4096, 11008, 32, 32, 32, 32000),
    "Llama-2-13B": llama(5120, 13824, 40, 40, 40, 32000),
    "Llama-2-70B": llama(8192, 28672, 80, 64, 8, 32000),
    "Qwen3-4B": llama(2560, 9728, 36, 32, 8, 151936, tie_word_embeddings=True, **QWEN3),
}
OPEN_INSTRUCT = "open-instruct pull request 1466"
NEMO_RL = "NeMo-RL, tests/test_suites/llm"
BRIDGE = "Megatron-Bridge, docs/performance-summary.md, 25.11"
NEMO = "NeMo user guide 24.12, performance summary"


@dataclass(frozen=True)
class Case:
    """One published figure, and the nearest that megadpo can be asked for."""

    source: str
    what: str
    published: str
    model: str
    gpu: str
    gpus: int
    grid: tuple[int, int, int | None]
    """tensor, pipeline, chunks."""
    batch: int
    """Groups per update."""
    sequence: int
    """Tokens of one response (the prompt is one token of it): rows = responses x (sequence - 1)."""
    tokens: int
    """Rows of a micro-batch."""
    why: str
    """It differs."""
    responses: int = 2
    recompute: str = "none"
    reference: str = "precomputed"
    fp8: bool = False
    shown: str = "speed"
    """speed, seconds or memory: what the published figure is about."""
    rate: float | None = None
    """Published tokens per second and GPU, where there are any."""


SLOWER = (
    "every layer is computed again here, all but a tenth of the activations there; theirs is FSDP, whose weights are "
    "gathered for every pass over two nodes, and its head holds the logits of all rows; it reports 6.19 s a step from "
    "2.5 to 22.5 % MFU, whatever the fill. Sequences are as long as allowed here, theirs are packed and shorter"
)
GATE = (
    "an upper limit of a test, not a result; here every sequence is as long as allowed, there they are HelpSteer3's "
    "(shorter), padded, with the logits of all rows; a resident reference in both"
)
SAME_ENGINE = (
    "the same engine with Transformer Engine; tensor-parallel communication overlapped (Userbuffers) and CUDA graphs "
    "there, neither counted here; clocks under load and stragglers are in the published figure and not in the estimate"
)
CASES = (
    Case(
        OPEN_INSTRUCT, "DPO, 16k packed, 16-way FSDP, bs 32", "22.5 % MFU, 5282 tok/s/GPU, 6.19 s", "OLMo2-7B",
        "h100-80gb", 16, (1, 1, None), 16, 16385, 32768, SLOWER, recompute="full", rate=5282,
    ),
    Case(
        "open-instruct pull request 1467", "the same with TP2", "16.9 % MFU, 3926 tok/s/GPU, 3.88 s", "OLMo2-7B",
        "h100-80gb", 16, (2, 1, None), 8, 16385, 32768, SLOWER, recompute="full", rate=3926,
    ),
    Case(
        NEMO_RL, "8B DPO, TP2 PP2, 2048, 256 pairs", "< 6.7 s/step", "Llama-3.1-8B", "h100-80gb", 32, (2, 2, None), 256,
        2049, 4096, GATE, reference="resident", shown="seconds",
    ),
    Case(
        NEMO_RL, "8B DPO, TP4, 8192, 256 pairs", "< 11.5 s/step", "Llama-3.1-8B", "h100-80gb", 32, (4, 1, None), 256,
        8193, 16384, GATE, reference="resident", shown="seconds",
    ),
    Case(
        NEMO_RL, "1B DPO, 8 GPUs, 128 pairs of up to 1024", "< 1.3 s/step", "Llama-3.2-1B", "h100-80gb", 8,
        (1, 1, None), 128, 1025, 2048, GATE + "; the maximal length of this recipe is taken to be 1024",
        reference="resident", shown="seconds",
    ),
    Case(
        "ms-swift, examples/megatron/rlhf/dpo", "Qwen3-4B DPO, packed 8k, TP4", "4 x 28 GiB", "Qwen3-4B", "a100-80gb",
        4, (4, 1, None), 4, 4097, 8192, "the GPU is not stated, so its 3.4 s/it cannot be compared; logits of all rows "
        "there; their recompute is not known, none here", reference="resident", shown="memory",
    ),
    Case(
        BRIDGE, "8B pre-training, FP8 current scaling, FSDP", "14451 tok/s/GPU", "Llama-3.1-8B", "h100-80gb", 8,
        (1, 1, None), 128, 8193, 8192, SAME_ENGINE, responses=1, fp8=True, rate=14451,
    ),
    Case(
        BRIDGE, "8B pre-training, FP8 current scaling", "30624 tok/s/GPU", "Llama-3.1-8B", "b200", 8, (1, 1, None), 128,
        8193, 16384, SAME_ENGINE, responses=1, fp8=True, rate=30624,
    ),
    Case(
        BRIDGE, "70B pre-training, FP8 current scaling, TP4 PP8 VP5", "1602 tok/s/GPU", "Llama-3-70B", "h100-80gb", 64,
        (4, 8, 5), 128, 8193, 8192, SAME_ENGINE, responses=1, fp8=True, rate=1602,
    ),
    Case(
        NEMO, "7B pre-training, FP8", "16934 tok/s/GPU", "Llama-2-7B", "h100-80gb", 8, (1, 1, None), 128, 4097, 4096,
        SAME_ENGINE, responses=1, fp8=True, rate=16934,
    ),
    Case(
        NEMO, "70B pre-training, FP8, TP4 PP4 VP20", "1728 tok/s/GPU", "Llama-2-70B", "h100-80gb", 64, (4, 4, 20), 128,
        4097, 4096, SAME_ENGINE, responses=1, fp8=True, rate=1728,
    ),
)  # fmt: skip


def config_of(case: Case, folder: Path) -> Config:
    """A run file for the case; its model folder has a config.json and nothing else."""
    model = folder / case.model
    model.mkdir(exist_ok=True)
    config = {name: value for name, value in MODELS[case.model].items() if value is not None}
    (model / "config.json").write_text(json.dumps(config))
    settings = {
        "run_dir": str(folder / "run"),
        "model": {"path": str(model)} | ({"fp8_format": "hybrid"} if case.fp8 else {}),
        "data": {"train": "none.jsonl", "max_length": case.sequence},
        "objective": {"loss_type": "dpo" if case.responses == 2 else "sft"},
        "parallel": {"overlap_grad_reduce": True, "overlap_param_gather": True},
        "batch": {"global_batch_size": case.batch, "share_prompt": False},
    }
    run_file = folder / "run.yaml"
    run_file.write_text(yaml.safe_dump(settings))
    return load_config(run_file, [])


def row(case: Case, folder: Path) -> str:
    config = config_of(case, folder)
    data = Assumed(1_000_000, case.responses, prompt=1, response=case.sequence - 1, spread=0)
    shapes = read_shapes(config, 1)
    lengths = assumed(data, case.sequence, share=False, shape=shapes.policy)
    space = Space(config, shapes, GPUS[case.gpu], case.gpus, lengths.longest)
    tensor, pipeline, chunks = case.grid
    replicas = case.gpus // tensor // pipeline
    candidate = Candidate(
        tensor, pipeline, chunks, replicas, 1, tensor > 1, case.tokens, case.recompute, case.reference
    )
    search = Search(space, lengths, rank_numbers)
    how, done = search.estimate(candidate), search.work(candidate)
    held = search.fullest(candidate).memory.total
    memory = held / GIB
    grid = f"TP{tensor} PP{pipeline}{f' VP{chunks}' if chunks else ''} DP{replicas}"
    said = f"{how.update:.2f} s, {how.tokens_per_second_per_gpu:.0f} tok/s/GPU, {100 * how.mfu:.1f} % MFU"
    main = {"speed": said, "seconds": said, "memory": f"{memory:.0f} GiB ({said} on {case.gpu})"}[case.shown]
    setup = f"{case.gpus} x {case.gpu}, {grid}, {done.micro_batches} x {case.tokens} rows, recompute {case.recompute}"
    setup += f", {memory:.0f} GiB" + ("" if held <= usable(space.gpu) else ": **does not fit**")
    ours = "-" if case.rate is None else f"{100 * published_mfu(case.rate, how):.1f} %"
    return f"| {case.source} | {case.what} | {case.published} | {ours} | {main} | {setup} | {case.why} |"


def published_mfu(rate: float, how: Estimate) -> float:
    """Of a published speed (tokens per second and GPU) by the formula of the estimate: speed x FLOPs of a token / peak.
    FLOPs of a token over the peak is the estimate's MFU over its own speed."""
    return rate * how.mfu / how.tokens_per_second_per_gpu


def report() -> str:
    with tempfile.TemporaryDirectory() as folder:
        rows = [row(case, Path(folder)) for case in CASES]
    return (
        "\n".join(
            [
                "# The planner beside published figures",
                "",
                "Written by `python tools/plan_published.py --write`. The published figures are their authors'; the",
                "estimates are the planner's for megadpo on the same model, GPUs, grid and rows, no padding. Neither",
                "was measured by us, and no constant (`megadpo/plan/constants.py`) was fitted to this table. MFU is 3",
                "forward passes over the peak of bfloat16, also in FP8; others count otherwise, so the fourth column",
                "has the published speed in our formula: tok/s/GPU x FLOPs of a token as taken here / peak; - where no",
                "speed was published. Compare that one with the estimate. GiB are megadpo's, which has no FSDP, FP8's",
                "by Transformer Engine's sources. What does not fit is a time and no run: it would not start there.",
                "",
                "| source | run | published | published, our MFU | estimated | taken as | why they differ |",
                "|---|---|---|---|---|---|---|",
                *rows,
            ]
        )
        + "\n"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--write", action="store_true", help="write tools/results/plan_published.md")
    options = parser.parse_args()
    with quiet():
        text = report()
    print(text)
    if options.write:
        (RESULTS / "plan_published.md").write_text(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
