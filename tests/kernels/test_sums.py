"""Sums of responses against float64, alone and of a head's log-probabilities, and the tables of block sizes."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import tune_kernels
from cases import Inputs, Place, inputs, truth
from distributed import run_ranks
from megadpo_kernels import VocabShard, configs, linear_logprob, response_sums, triton_problem
from megadpo_kernels.configs import KernelConfig, choose
from tune_kernels import candidates, merged, write_table


@pytest.mark.parametrize("lengths", [[3, 0, 1, 130, 64, 0], [1000], [0], []], ids=str)
def test_sums_and_gradients(lean: Place, lengths: list[int]) -> None:
    """Empty responses and those of one token included. Up to 16 thousand nats, where float32 has steps of 1e-3."""
    generator = torch.Generator().manual_seed(0)
    values = -11 - 5 * torch.rand(sum(lengths), generator=generator)
    upstream = torch.randn(len(lengths), generator=generator)
    x = values.to(lean.device).requires_grad_()
    tokens = torch.tensor(lengths, dtype=torch.int64, device=lean.device)
    sums = response_sums(x, tokens, lean.backend)
    sums.backward(upstream.to(lean.device))
    assert sums.dtype == torch.float64
    want = torch.tensor([float(part.double().sum()) for part in values.detach().split(lengths)], dtype=torch.float64)
    assert sums.shape == want.shape
    assert (sums.detach().cpu() - want).abs().le(1e-9).all()
    assert x.grad.dtype == torch.float32
    assert torch.equal(x.grad.cpu(), upstream.repeat_interleave(torch.tensor(lengths, dtype=torch.int64)))


def test_neighbours_do_not_change_a_sum(lean: Place) -> None:
    values = torch.randn(300, generator=torch.Generator().manual_seed(0)).to(lean.device)
    alone = response_sums(values[37:167], torch.tensor([130], device=lean.device), lean.backend)
    among = response_sums(values, torch.tensor([37, 130, 133], device=lean.device), lean.backend)
    assert torch.equal(alone[0], among[1])


@pytest.mark.parametrize(
    ("lengths", "words"),
    [([4, 4], "add up to 8"), ([6, 6], "add up to 12"), ([-1, 11], "need 0 or more"), ([5.0, 5.0], "torch.float32")],
)
def test_lengths_that_are_not_the_tokens(lean: Place, lengths: list, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        response_sums(torch.ones(10), torch.tensor(lengths), lean.backend)


SUM = 1e-4
"""Nats per response of up to a thousand tokens: of the head and the sum together."""
RESPONSES = [1000, 0, 300, 1]


def head(vocab: int) -> tuple[Inputs, torch.Tensor]:
    """Rows whose log-probabilities add up to thousands of nats, and the responses' true sums."""
    given = inputs(sum(RESPONSES), 64, vocab)
    return given, torch.stack([part.sum() for part in truth(given).logprob_N.split(RESPONSES)])


def test_sums_of_a_head(place: Place) -> None:
    """From hidden states to sums. A small vocabulary where Triton is interpreted, for time."""
    given, want = head(100 if (place.device.type, place.backend) == ("cpu", "triton") else 8000)
    there = given.to(place.device, torch.float32)
    shard = VocabShard(0, len(given.weight_VD), None)
    logprob = linear_logprob(there.hidden_ND, there.weight_VD, there.targets_N, shard, backend=place.backend)
    sums = response_sums(logprob, torch.tensor(RESPONSES, device=place.device), place.backend)
    assert (sums.cpu() - want).abs().max() <= SUM


def sums_split(device: torch.device) -> torch.Tensor:
    group = dist.group.WORLD
    given, _ = head(8000)
    part = given.weight_VD.chunk(group.size())[group.rank()]
    shard = VocabShard(group.rank() * len(part), 8000, group)
    logprob = linear_logprob(given.hidden_ND, part, given.targets_N, shard, backend="chunked")
    return response_sums(logprob, torch.tensor(RESPONSES))


def test_sums_of_a_split_head() -> None:
    first, second = run_ranks(2, sums_split)
    assert torch.equal(first, second)
    assert (first - head(8000)[1]).abs().max() <= SUM


TABLE = (
    KernelConfig("slope", "any", 2**31 - 1, 4096, 8),
    KernelConfig("slope", "any", 1000, 512, 4),
    KernelConfig("slope", "sm_90", 20000, 2048, 4),
    KernelConfig("slope", "sm_90", 2**31 - 1, 1024, 4, "float16"),
    KernelConfig("other", "sm_90", 20000, 64, 1),
)


@pytest.mark.parametrize(
    ("arch", "length", "dtype", "block"),
    [
        ("sm_80", 500, "bfloat16", 512),
        ("sm_80", 5000, "float16", 4096),
        ("sm_90", 500, "bfloat16", 2048),
        ("sm_90", 20000, "float32", 2048),
        ("sm_90", 20001, "float32", 4096),
        ("sm_90", 500, "float16", 1024),
    ],
)
def test_the_architecture_comes_first_then_the_dtype_then_the_tightest_row(
    arch: str, length: int, dtype: str, block: int
) -> None:
    assert choose(TABLE, "slope", arch, length, dtype).block == block


def test_the_shipped_table_has_a_row_for_everything() -> None:
    rows = configs.shipped()
    assert len(rows) == len(json.loads(Path(configs.TABLE).read_text()))
    for kernel in {row.kernel for row in rows}:
        assert choose(rows, kernel, "sm_75", 2**31 - 1, "bfloat16").arch == "any"


def test_tuning_adds_rows_that_are_read_back(tmp_path: Path) -> None:
    better = KernelConfig("slope", "sm_90", 20000, 1024, 4)
    table = merged(TABLE, [better])
    assert len(table) == len(TABLE)
    write_table(tmp_path / "table.json", table)
    back = tuple(KernelConfig(**row) for row in json.loads((tmp_path / "table.json").read_text()))
    assert choose(back, "slope", "sm_90", 500, "bfloat16") == better
    assert choose(back, "slope", "sm_90", 500, "float16").block == 1024
    assert choose(back, "slope", "sm_80", 500, "bfloat16").block == 512
    assert all(8 <= row.block // (32 * row.warps) <= 32 for row in candidates("slope", "sm_90", 100))


@pytest.mark.skipif(triton_problem(torch.device("cpu")) is not None, reason="Triton cannot run here")
def test_tuning_compares_every_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU all candidates run with the interpreter's block; what is tried here is the comparison."""
    from megadpo_kernels import rows_triton

    device = torch.device("cpu")
    monkeypatch.setattr(configs, "shipped", configs.shipped)  # restored: tuning replaces it
    monkeypatch.setattr(configs, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(tune_kernels, "best", lambda options, run, device: (next(iter(options)), 1.0))
    monkeypatch.setattr(tune_kernels, "BLOCKS", (1024,))
    found = tune_kernels.tune(70, 5, device)
    assert [(row.kernel, row.dtype) for row in found] == [
        ("row_stats", "any"), ("slope", "bfloat16"), ("slope", "float16"), ("slope", "float32"),
    ]  # fmt: skip
    right = rows_triton.slope
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        wrong = lambda *given, dtype=dtype: right(*given) * (1.02 if given[-1] == dtype else 1)  # noqa: E731
        monkeypatch.setattr(rows_triton, "slope", wrong)
        with pytest.raises(AssertionError):
            tune_kernels.tune(70, 5, device)
