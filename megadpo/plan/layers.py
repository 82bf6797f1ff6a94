"""Matrix products and memory traffic of one layer and of the head, on one tensor-parallel rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from megadpo.convert.shape import Experts, LatentAttention, ModelShape
from megadpo.plan import constants as c
from megadpo.plan.machine import Device
from megadpo.plan.workload import Work

KEPT_LOGITS = 2**30
"""Bytes of logits that stay for the backward pass (kernels/megadpo_kernels/logprob.py)."""


@dataclass(frozen=True)
class Grid:
    """Of what a layer's work depends on."""

    tensor: int
    expert: int
    sequence_parallel: bool

    @property
    def outside(self) -> int:
        """Ranks that the rows outside attention and MLP are split over."""
        return self.tensor if self.sequence_parallel else 1


@dataclass(frozen=True)
class Product:
    """[rows, inner] x [inner, columns], `batches` times in one kernel."""

    rows: float
    columns: float
    inner: float
    batches: float = 1


@dataclass(frozen=True)
class Seconds:
    """Of one micro-batch in one layer, or in the head."""

    forward: float
    backward: float


@dataclass(frozen=True)
class LayerTime:
    products: Seconds
    """Of the linear layers, with their casts, and the memory traffic of all that is no product."""
    attention: Seconds
    wgrad: float
    """The part of the backward products that a collective can run beside."""

    @property
    def forward(self) -> float:
        return self.products.forward + self.attention.forward


class LayerKind(NamedTuple):
    """What tells layers of a model apart."""

    experts: bool
    fp8: bool
    """Whether its linear products run as Device.fp8 says."""
    window: bool


def layer_time(shape: ModelShape, grid: Grid, work: Work, device: Device, kind: LayerKind) -> LayerTime:
    with_experts, fp8, _ = kind
    products = linear_products(shape, grid, work.tokens, with_experts)
    forward = sum(device.product(p.rows, p.columns, p.inner, fp8, p.batches) for p in products)
    inputs = sum(device.product(p.rows, p.inner, p.columns, fp8, p.batches) for p in products)
    weights = sum(device.product(p.columns, p.inner, p.rows, fp8, p.batches) for p in products)
    if fp8:
        forward += sum(device.cast(p.batches * p.rows * p.inner) for p in products)
        inputs += sum(device.cast(p.batches * p.rows * p.columns) for p in products)
    rest = device.stream(2 * traffic(shape, grid, work.tokens, with_experts)) + c.SMALL_KERNELS * c.KERNEL_SECONDS
    attention = _attention(shape, grid, work.most_window_area if kind.window else work.most_area, work, device)
    return LayerTime(Seconds(forward + rest, inputs + weights + 2 * rest), attention, weights)


def linear_products(shape: ModelShape, grid: Grid, tokens: int, with_experts: bool) -> list[Product]:
    """Forward, of one layer on one rank."""
    found = _latent(shape, shape.latent, grid, tokens) if shape.latent else _grouped_query(shape, grid, tokens)
    if with_experts and shape.experts is not None:
        return found + _experts(shape, shape.experts, grid, tokens)
    return found + _gated(tokens, shape.ffn_hidden_size / grid.tensor, shape.hidden_size)


def _grouped_query(shape: ModelShape, grid: Grid, tokens: int) -> list[Product]:
    queries = shape.num_attention_heads * shape.kv_channels / grid.tensor
    keys = shape.num_query_groups * shape.kv_channels / grid.tensor
    return [
        Product(tokens, queries + 2 * keys, shape.hidden_size),
        Product(tokens, shape.hidden_size, queries),
    ]


def _latent(shape: ModelShape, latent: LatentAttention, grid: Grid, tokens: int) -> list[Product]:
    heads, hidden = shape.num_attention_heads / grid.tensor, shape.hidden_size
    queries = heads * (latent.query_key_width + latent.rotary_width)
    found = [Product(tokens, queries, latent.query_rank or hidden)]
    if latent.query_rank is not None:
        found.append(Product(tokens, latent.query_rank / grid.tensor, hidden))
    return [
        *found,
        Product(tokens, (latent.key_value_rank + latent.rotary_width) / grid.tensor, hidden),
        Product(tokens, heads * (latent.query_key_width + latent.value_width), latent.key_value_rank),
        Product(tokens, hidden, heads * latent.value_width),
    ]


def _experts(shape: ModelShape, experts: Experts, grid: Grid, tokens: int) -> list[Product]:
    """Rows go to the experts evenly. Dealt out, a rank has whole experts and gets the rows of all ranks for them."""
    hidden, own = shape.hidden_size, tokens / grid.outside
    found = [Product(own, experts.count, hidden)]
    if grid.expert > 1:
        here, rows, width = experts.count / grid.expert, own * experts.per_token, float(experts.ffn_hidden_size)
    else:
        here, rows = float(experts.count), float(tokens * experts.per_token)
        width = experts.ffn_hidden_size / grid.tensor
    found += [Product(p.rows, p.columns, p.inner, here) for p in _gated(rows / here, width, hidden)]
    if experts.shared_ffn_hidden_size:
        found += _gated(tokens, experts.shared_ffn_hidden_size / grid.tensor, hidden)
    return found


def _gated(rows: float, width: float, hidden: int) -> list[Product]:
    return [Product(rows, 2 * width, hidden), Product(rows, hidden, width)]


def traffic(shape: ModelShape, grid: Grid, tokens: int, with_experts: bool) -> float:
    """Elements that norms, residual additions, rotary embedding and activation read and write in one forward pass."""
    norms = 2 + 2 * shape.norms.after
    outside = shape.hidden_size / grid.outside * (2 * norms + 2 * 3)
    heads = (shape.num_attention_heads + shape.num_query_groups) * shape.kv_channels / grid.tensor
    width = shape.ffn_hidden_size / grid.tensor
    if with_experts and (experts := shape.experts):
        width = (experts.per_token * experts.ffn_hidden_size + experts.shared_ffn_hidden_size) / grid.tensor
        outside += 4 * experts.per_token * shape.hidden_size / grid.outside  # rows sorted by expert, and back
    return tokens * (outside + 2 * heads + 3 * width)


def _attention(shape: ModelShape, grid: Grid, area: float, work: Work, device: Device) -> Seconds:
    """area: attended pairs of rows of the data-parallel rank that has most of them."""
    flops = 2 * shape.pair_multiplications / grid.tensor * area
    forward = device.attention(flops, area, work.mean_rows)
    backward = device.attention_backward(flops, area, work.mean_rows)
    return Seconds(forward + c.KERNEL_SECONDS, backward + 2 * c.KERNEL_SECONDS)


def head_time(shape: ModelShape, tensor: int, scored: float, device: Device) -> Seconds:
    """Log-probabilities of `scored` rows over this rank's part of the vocabulary; 0 of a reward model."""
    if shape.head != "vocabulary":
        return Seconds(0.0, 0.0)
    columns, inner = shape.vocab_size / tensor, shape.hidden_size
    logits = scored * columns
    again = max(0.0, 1 - KEPT_LOGITS / max(4 * logits, 1))
    once = device.product(scored, columns, inner)
    rows = device.stream(logits * c.HEAD_TRAFFIC_BYTES / 2)
    backward = device.product(scored, inner, columns) + device.product(columns, inner, scored) + again * once
    return Seconds(once + rows, backward + rows)
