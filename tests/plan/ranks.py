"""Small models on many grids, on real gloo ranks and on fake ones."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from megadpo.config import Config, DataConfig, ModelConfig, OptimizerConfig, ParallelConfig, ReferenceConfig
from megadpo.convert.shape import Experts, LatentAttention, ModelShape, Norms
from megadpo.data.batch import PackedBatch
from megadpo.model.experts import ExpertChoice
from megadpo.objectives import DPO, Objective
from megadpo.parallel.context import grid
from megadpo.plan.counts import Held, build, held_by
from megadpo.plan.dry_run import record
from megadpo.plan.fake_world import even_choice, replaced
from megadpo.plan.numbers import RankNumbers

LLAMA = ModelShape(
    family="llama",
    num_layers=4,
    hidden_size=32,
    ffn_hidden_size=48,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=8,
    vocab_size=67,
    max_position_embeddings=256,
    layernorm_epsilon=1e-5,
    rotary_base=10000.0,
    rope_scaling=None,
    tied=False,
)
"""67 tokens: with 2 tensor-parallel ranks the vocabulary is padded."""
TIED = replace(LLAMA, tied=True)
UNEVEN = replace(LLAMA, num_layers=5)
BIASED = replace(LLAMA, qkv_bias=True, proj_bias=True, mlp_bias=True)
OLMO = replace(LLAMA, norms=Norms(before=False, after=True, queries_keys="projection"))
HEADS = replace(LLAMA, norms=Norms(queries_keys="head"))
REWARD = replace(LLAMA, head="new scalar")
MIXED = replace(
    LLAMA,
    experts=Experts(
        count=4, per_token=2, ffn_hidden_size=24, layers=(False, True, True, True), shared_ffn_hidden_size=16
    ),
)
WIDE = replace(
    LLAMA,
    num_layers=6,
    hidden_size=256,
    ffn_hidden_size=704,
    num_attention_heads=8,
    kv_channels=32,
    vocab_size=512,
)
"""Wide enough that working memory is more than small change."""
LATENT = replace(
    LLAMA,
    num_query_groups=4,
    kv_channels=10,
    latent=LatentAttention(query_rank=20, key_value_rank=16, query_key_width=12, rotary_width=16, value_width=10),
)


RESIDENT = ReferenceConfig(mode="resident")
HELD_IN_FP8 = ReferenceConfig(mode="resident", fp8_weights=True)
SWAPPED = ReferenceConfig(mode="swapped")


@dataclass(frozen=True)
class Case:
    name: str
    shape: ModelShape
    parallel: ParallelConfig
    ranks: int
    dtype: str = "bfloat16"
    recompute: str = "none"
    reference: ReferenceConfig = ReferenceConfig()  # noqa: RUF009  frozen
    objective: Objective = DPO()  # noqa: RUF009  frozen
    fp8: str | None = None
    """Recipe."""
    fp8_weights: bool = False
    """fp8_param_gather."""

    @property
    def model(self) -> ModelConfig:
        plain = ModelConfig("nowhere", dtype=self.dtype, recompute=self.recompute)
        if self.fp8 is None:
            return plain
        return replace(plain, fp8_format="hybrid", fp8_recipe=self.fp8, fp8_param_gather=self.fp8_weights)

    @property
    def config(self) -> Config:
        return Config(
            run_dir="nowhere",
            model=self.model,
            data=DataConfig(("nowhere",)),
            objective=self.objective,
            reference=self.reference,
            parallel=self.parallel,
            optimizer=OptimizerConfig(weight_decay=0.1),
        )


def held_for_real(device: torch.device, cases: Iterable[Case]) -> list[Held]:
    """In each of the ranks."""
    found = []
    for case in cases:
        with grid(case.parallel, device, seed=0) as context:
            found.append(held_by(build(case.shape, case.config, context)))
    return found


def recorded_for_real(device: torch.device, cases: list[Case], batches: list[list[PackedBatch]]) -> list[RankNumbers]:
    """The second step in each of the ranks, on random weights. A router chooses as the planner assumes."""
    found = []
    for case, step in zip(cases, batches, strict=True):
        even = replaced(ExpertChoice, "routing", even_choice(ExpertChoice.routing))
        with even, grid(case.parallel, device, seed=0) as context:
            torch.manual_seed(context.rank)
            numbers = record(case.shape, case.config, context, step, fill=lambda p: p.normal_(std=0.02), before=1)
            found.append(numbers)
    return found
