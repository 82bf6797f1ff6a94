"""Inputs of the head and the float64 answer that every back end is held against."""

from dataclasses import dataclass

import torch
from megadpo_kernels import Backend, LogitOptions, VocabShard, linear_logprob, linear_logprob_entropy
from megadpo_kernels.shard import PLAIN

LOGPROB = 2e-5
"""Nats per token."""
GRADIENT = {torch.float32: 3e-6, torch.bfloat16: 4e-3, torch.float16: 4e-3}
"""|got - true| / |true|, Frobenius norms of a whole gradient, against float64 on the same (already rounded) inputs."""


@dataclass(frozen=True)
class Place:
    device: torch.device
    backend: Backend


@dataclass(frozen=True)
class Inputs:
    hidden_ND: torch.Tensor
    weight_VD: torch.Tensor
    targets_N: torch.Tensor
    upstream_N: torch.Tensor

    def to(self, device: torch.device, dtype: torch.dtype) -> "Inputs":
        return Inputs(
            self.hidden_ND.to(device, dtype),
            self.weight_VD.to(device, dtype),
            self.targets_N.to(device),
            self.upstream_N.to(device),
        )


@dataclass(frozen=True)
class Answer:
    logprob_N: torch.Tensor
    entropy_N: torch.Tensor | None
    hidden: torch.Tensor
    """Gradient to hidden."""
    weight: torch.Tensor


def inputs(rows: int, hidden: int, vocab: int, *, scale: float = 1.0, seed: int = 0) -> Inputs:
    """Logits of standard deviation `scale`."""
    generator = torch.Generator().manual_seed(seed)
    return Inputs(
        torch.randn(rows, hidden, generator=generator) * scale / hidden**0.5,
        torch.randn(vocab, hidden, generator=generator),
        torch.randint(0, vocab, (rows,), generator=generator),
        torch.randn(rows, generator=generator),
    )


def truth(given: Inputs, options: LogitOptions = PLAIN, entropy: bool = False) -> Answer:
    """In float64 from the same inputs. With `entropy`, the gradient is that of upstream . (logprob + 2 entropy)."""
    x = given.hidden_ND.detach().cpu().double().requires_grad_()
    w = given.weight_VD.detach().cpu().double().requires_grad_()
    z = x @ w.t() * options.multiplier
    if options.soft_cap is not None:
        z = options.soft_cap * torch.tanh(z / options.soft_cap)
    everything = (z / options.temperature).log_softmax(-1)
    logprob = everything.gather(1, given.targets_N.cpu()[:, None])[:, 0]
    spread = -(everything.exp() * everything).sum(-1)
    total = logprob + 2 * spread if entropy else logprob
    total.backward(given.upstream_N.cpu().double())
    assert x.grad is not None
    assert w.grad is not None
    return Answer(logprob.detach(), spread.detach(), x.grad, w.grad)


def answer(
    given: Inputs,
    backend: Backend,
    *,
    shard: VocabShard | None = None,
    options: LogitOptions = PLAIN,
    entropy: bool = False,
    chunk: int | None = 7,
    cache_bytes: int | None = 0,
) -> Answer:
    """What the back end says; on the CPU."""
    x, w = given.hidden_ND.clone().requires_grad_(), given.weight_VD.clone().requires_grad_()
    shard = shard or VocabShard(0, len(w), None)
    spread = None
    settings = {"options": options, "backend": backend, "chunk": chunk, "cache_bytes": cache_bytes}
    if entropy:
        logprob, spread = linear_logprob_entropy(x, w, given.targets_N, shard, **settings)
        (logprob + 2 * spread).backward(given.upstream_N)
    else:
        logprob = linear_logprob(x, w, given.targets_N, shard, **settings)
        logprob.backward(given.upstream_N)
    assert logprob.dtype == torch.float32
    spread = None if spread is None else spread.detach().cpu()
    return Answer(logprob.detach().cpu(), spread, x.grad.cpu(), w.grad.cpu())


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want).norm() / want.norm().clamp(min=1e-30))


def assert_near(got: Answer, want: Answer, gradient: float, logprob: float = LOGPROB) -> None:
    for mine, true in ((got.logprob_N, want.logprob_N), (got.entropy_N, want.entropy_N)):
        if mine is not None:
            assert float((mine.double() - true).abs().max()) <= logprob
    assert relative(got.hidden, want.hidden) <= gradient
    assert relative(got.weight, want.weight) <= gradient
