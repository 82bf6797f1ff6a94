"""CUDA graphs of the part of a layer that treats every row alike: its shapes never change, as all streams have T rows.

Captured is what lies behind the attention: of a plain layer the norm, the MLP and what is added (`mlp`); of one with
experts the norm, the router and the shared experts (`moe_router`). Attention stays as it is, since where the segments
of a stream start and end changes from one to the next; so do experts, to which different numbers of rows go.

A graph reads and writes the same memory at every replay, so there is one per micro-batch that may be between its
forward and its backward pass (`most_in_flight`, of its model chunk), taken in turn, whatever the number of
micro-batches in a step. The graphs of one turn share their memory: all layers forward, then all backward, is the order
of capture and of every replay. Those of different turns, and of different model chunks, share none.

A replay runs no Python. What Python does beside the products is done here: hooks that wait for gathered weights are
called, and weights whose gradient the graph adds to the float32 buffer by itself are marked so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.fp8_utils import get_fp8_recipe, is_first_last_bf16_layer
from megatron.core.transformer import TransformerConfig, cuda_graphs
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megadpo.observe.gpus import GIB
from megadpo.parallel import mcore_fixes
from megadpo.parallel.context import ParallelContext
from megadpo.parallel.cuda_graphs import most_in_flight


class GraphedLayer(TransformerLayer):
    """Megatron-Core's layer, which replays what has been captured of it. One private method is overridden, and
    MoELayer.forward is taken apart; tests/train/test_graphs.py compares both with what Megatron-Core does."""

    current_microbatch: int
    """Set by the schedule before each forward pass."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.graphs: list[Graph] = []
        """In the order in which micro-batches take them; none before `capture`."""

    def _forward_mlp(self, hidden_states: Tensor, inference_context: Any = None, padding_mask: Any = None) -> Tensor:
        """hidden [T, 1, D] behind the attention -> [T, 1, D] for the next layer. Passes without a gradient have no
        backward pass that would free a graph's memory, and run as without graphs."""
        if not self.graphs or not torch.is_grad_enabled():
            return super()._forward_mlp(hidden_states, inference_context, padding_mask)
        graph = self.graphs[self.current_microbatch % len(self.graphs)]
        return self.rest(*graph(hidden_states))

    def row_by_row(self, hidden_TD: Tensor) -> tuple[Tensor, ...]:
        """What is captured: a plain layer's output; or what was given, the norm's output, every expert's weight, who is
        chosen, and the shared experts' output where there are any. (What was given is among it so that its gradients
        are added up in the same order as without a graph.)"""
        if not self.is_moe_layer:
            return (super()._forward_mlp(hidden_TD),)
        normed_TD = self._forward_pre_mlp_layernorm(hidden_TD)
        shared_TD = self.mlp.shared_experts_compute(normed_TD)
        found = (hidden_TD, normed_TD, *self.mlp.route(normed_TD))
        return found if shared_TD is None else (*found, shared_TD)

    def rest(self, *found: Tensor) -> Tensor:
        """The layer's output from that of `row_by_row`."""
        if not self.is_moe_layer:
            return found[0]
        hidden_TD, normed_TD, weights, chosen = found[:4]
        shared_TD = found[4] if len(found) > 4 else None
        rows, weights = self.mlp.preprocess(normed_TD, weights, chosen)
        rows, weights = self.mlp.dispatch(rows, weights)
        rows, _ = self.mlp.routed_experts_compute(rows, weights)
        output_TD = self.mlp.postprocess(self.mlp.combine(rows), shared_TD)
        return self._forward_post_mlp((output_TD, None), hidden_TD)


class Part(torch.nn.Module):
    """What is captured of a layer, as make_graphed_callables wants it: a module with its parameters and no others."""

    def __init__(self, layer: GraphedLayer) -> None:
        super().__init__()
        used = [layer.pre_mlp_layernorm, layer.mlp]
        if layer.is_moe_layer:
            used[1:] = [layer.mlp.router, *([layer.mlp.shared_experts] if layer.mlp.use_shared_expert else [])]
        self.used = torch.nn.ModuleList(used)
        self.run = layer.row_by_row

    def forward(self, hidden_TD: Tensor) -> tuple[Tensor, ...]:
        return self.run(hidden_TD)


@dataclass(frozen=True)
class Gathers:
    """Megatron-Core's memory for the rows that its own layers gather under sequence parallelism (tensor_parallel/
    layers.py: "mpu"). All layers of all models share it, and it is replaced when somebody asks for more: a graph
    would go on writing where it was."""

    key: tuple[str, torch.dtype]
    address: int

    @staticmethod
    def made(rows: int, widest: int, dtype: torch.dtype, context: ParallelContext) -> Gathers | None:
        """As large as any model of the run asks for; None where no layer uses it. rows: of all tensor ranks."""
        if mcore_fixes.have_te() or not context.sequence_parallel or context.tensor_size == 1:
            return None
        tensor = parallel_state.get_global_memory_buffer().get_tensor([rows, 1, widest], dtype, "mpu")
        return Gathers(("mpu", dtype), tensor.data_ptr())

    def there(self) -> bool:
        return parallel_state.get_global_memory_buffer().buffer[self.key].data_ptr() == self.address


Make = Callable[[tuple[Part, ...], tuple[tuple[Tensor], ...]], Sequence[Any]]
"""make_graphed_callables, torch's or Transformer Engine's: of parts in the order in which they run, with an input for
each, what replays them."""


class Graph:
    """A part's graphs for one micro-batch, forward and backward."""

    def __init__(
        self, replay: Callable[[Tensor], tuple[Tensor, ...]], part: Part, shape: torch.Size, gathers: Gathers | None
    ) -> None:
        self._replay, self._shape, self._modules, self._gathers = replay, shape, list(part.modules()), gathers
        self._weights = list(part.parameters())
        self._addresses = [weight.data_ptr() for weight in self._weights]
        # capturing ran the code that sets this
        self._added = [weight for weight in self._weights if getattr(weight, "grad_added_to_main_grad", False)]
        self.in_flight = False

    def __call__(self, hidden_TD: Tensor) -> tuple[Tensor, ...]:
        assert not self.in_flight, "a graph's memory would be written while a backward pass needs it"
        assert hidden_TD.shape == self._shape, f"a stream of other length: {hidden_TD.shape}, not {self._shape}"
        for module in self._modules:  # looked up here: hooks come and go (train.optimizer.settled)
            for hook in module._forward_pre_hooks.values():
                hook(module, ())
        assert self._gathers is None or self._gathers.there(), "the memory for gathered rows has moved"
        assert [weight.data_ptr() for weight in self._weights] == self._addresses, "weights have moved"
        for weight in self._added:
            weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
        found = self._replay(hidden_TD)
        self.in_flight = True
        found[0].register_hook(self._backward)
        return found

    def _backward(self, gradient: Tensor) -> None:
        self.in_flight = False


def capture(
    chunks: Sequence[Any],
    scopes: Sequence[str],
    rows: int,
    widest: int,
    context: ParallelContext,
    make: Make | None = None,
) -> str:
    """Capture these parts (model.cuda_graphs) of all layers of the policy; a line for the log.

    chunks: wrapped by data parallelism, as their weights' gradients have their places then. rows: of every stream.
    widest: the largest hidden size of the models that run in this process, a reference's among them.
    Before the first step: the passes that this takes leave nothing behind but zeros in the gradients' buffers.
    make: stands in for CUDA where there is none.
    """
    turns, before, layers, graphs = most_in_flight(context), _reserved(context), 0, 0
    gathers = Gathers.made(rows, widest, chunks[0].config.params_dtype, context)
    rows //= context.tensor_size if context.sequence_parallel else 1
    for chunk, in_flight in zip(chunks, turns, strict=True):
        config = chunk.config
        mine = [layer for layer in chunk.module.decoder.layers if _scope(layer) in scopes]
        layers += len(mine)
        graphs += 2 * in_flight * len(mine)
        with _capturing():
            for _ in range(in_flight if mine else 0):
                _capture_turn(mine, rows, config, gathers, make or _make(mine, config, context))
        chunk.zero_grad_buffer()
    size = f", {(_reserved(context) - before) / GIB:.2f} GiB" if context.device.type == "cuda" else ""
    return (
        f"CUDA graphs of {' and '.join(scopes)}: {layers} layers here, at most {', '.join(map(str, turns))} "
        f"micro-batches in flight{' of each chunk' if len(turns) > 1 else ''}, {graphs} graphs{size}"
    )


def _scope(layer: GraphedLayer) -> str:
    return "moe_router" if layer.is_moe_layer else "mlp"


def _capture_turn(
    layers: Sequence[GraphedLayer], rows: int, config: TransformerConfig, gathers: Gathers | None, make: Make
) -> None:
    """One graph more for each layer of a chunk."""
    like = {"dtype": config.params_dtype, "device": next(layers[0].parameters()).device}
    parts = tuple(Part(layer) for layer in layers)
    modules: list[Any] = [module for part in parts for module in part.modules()]
    for module in modules:
        # In FP8 the graph casts the weight itself: a cast one that Transformer Engine keeps beside the layer loses its
        # transposed half in a pass without a gradient (quantizer.cpp: convert_and_update_tensor), under the graph.
        if hasattr(module, "disable_parameter_transpose_cache"):
            module.disable_parameter_transpose_cache = True
            getattr(module, "_fp8_workspaces", {}).clear()  # the cast one, which nobody reads from now on
    samples = [torch.zeros(rows, 1, config.hidden_size, requires_grad=True, **like) for _ in layers]
    graphs = make(parts, tuple((sample,) for sample in samples))
    for layer, part, sample, graph in zip(layers, parts, samples, graphs, strict=True):
        layer.graphs.append(Graph(graph, part, sample.shape, gathers))


def _make(layers: Sequence[GraphedLayer], config: TransformerConfig, context: ParallelContext) -> Make:
    """Transformer Engine's for its layers: it knows their FP8 state, and puts back what it learnt while capturing."""
    if not mcore_fixes.have_te():
        return torch.cuda.make_graphed_callables
    from transformer_engine.pytorch import make_graphed_callables

    fp8: dict[str, Any] = {}
    if config.fp8:
        in_fp8 = tuple(not is_first_last_bf16_layer(config, layer.layer_number - 1) for layer in layers)
        fp8 = {"enabled": in_fp8, "recipe": get_fp8_recipe(config), "amax_reduction_group": context.amax_group()}
    return lambda parts, samples: make_graphed_callables(parts, samples, allow_unused_input=True, **fp8)


@contextmanager
def _capturing() -> Iterator[None]:
    """Data parallelism's hooks do nothing inside (distributed_data_parallel.py: is_graph_capturing)."""
    cuda_graphs._set_capture_start()
    try:
        yield
    finally:
        cuda_graphs._set_capture_end()


def _reserved(context: ParallelContext) -> int:
    """Bytes that torch has taken from the device; what graphs hold is part of it."""
    if context.device.type != "cuda":
        return 0
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved(context.device)
