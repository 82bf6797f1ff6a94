"""CUDA graphs on a CPU: what a graph's memory does, without the speed.

`make_graphed_callables` stands in for torch's: every operation of a part's forward and backward pass is recorded with
the very tensors that it read and wrote. A replay runs the same operations on the same memory and no Python: not the
part's, nobody's hooks. As on a device

* there is one copy of the input, of all that is kept for the backward pass and of the results;
* memory that the pool could give to the next graph holds nothing any more. Here it holds NaN at once: what a forward
  pass does not leave for its backward pass, and after a backward pass all of both.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WARM_UP = 2


def key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def finished(result: Any) -> Any:
    """A collective is waited for here, and its handle has no work left: gloo's has copies to do, once per wait."""
    if isinstance(result, tuple) and isinstance(result[-1], torch.ScriptObject):
        result[-1].wait()
        return (*result[:-1], torch._C._distributed_c10d.FakeWork().boxed())
    return result


class Tape(TorchDispatchMode):
    """Operations as they come, and the memory that they make."""

    def __init__(self, outside: set[int]) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple, dict, Any]] = []
        self.read: set[int] = set()
        self.made: dict[int, Tensor] = {}
        self.outside = outside
        """Storages that are not the pool's: parameters, buffers, what the part was given."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        result = finished(func(*args, **kwargs))
        self.calls.append((func, args, kwargs, result))
        for tensor in tensors((args, kwargs)):
            self.read.add(key(tensor))
            if key(tensor) not in self.made:
                self.outside.add(key(tensor))
        for tensor in tensors(result):
            if key(tensor) not in self.outside:
                self.made.setdefault(key(tensor), tensor)
        return result

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, results in self.calls:
            again = finished(func(*args, **kwargs))
            for new, old in zip(tensors(again), tensors(results), strict=True):
                if key(new) != key(old):
                    old.copy_(new)

    def poison(self, kept: set[int]) -> None:
        for storage, tensor in self.made.items():
            if storage not in kept and tensor.is_floating_point():
                whole = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
                whole.fill_(torch.nan)


class Replayed:
    """One part's graphs."""

    def __init__(self, part: torch.nn.Module, static: Tensor) -> None:
        self.part, self.static = part, static
        self.weights, self.replays = list(part.parameters()), 0

    def record_forward(self) -> None:
        self.forward = Tape({key(tensor) for tensor in [self.static, *self.weights, *self.part.buffers()]})
        with self.forward:
            self.outputs = tuple(self.part(self.static))

    def record_backward(self) -> None:
        self.gradients_out = tuple(torch.empty_like(o) if o.requires_grad else None for o in self.outputs)
        given = [gradient for gradient in self.gradients_out if gradient is not None]
        self.backward = Tape(self.forward.outside | {key(gradient) for gradient in given})
        self.backward.made.update(self.forward.made)
        with self.backward:
            self.gradients_in = torch.autograd.grad(
                [output for output in self.outputs if output.requires_grad], [self.static, *self.weights], given
            )
        self.outputs = tuple(output.detach() for output in self.outputs)
        self.left = self.backward.read | {key(tensor) for tensor in self.outputs}
        self.results = {key(gradient) for gradient in self.gradients_in}

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        return Replay.apply(self, x, *self.weights)


class Replay(torch.autograd.Function):
    """As torch's Graphed: copies in, a replay, the graph's own memory out."""

    @staticmethod
    def forward(ctx: Any, graph: Replayed, x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.graph = graph
        graph.replays += 1
        with torch.no_grad():
            graph.static.copy_(x)
        graph.forward.replay()
        graph.forward.poison(graph.left)
        return tuple(output.data for output in graph.outputs)  # torch sees no replay write to it, as on a device

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        graph = ctx.graph
        for mine, given in zip(graph.gradients_out, gradients, strict=True):
            if mine is not None:
                mine.copy_(given)
        graph.backward.replay()
        graph.backward.poison(graph.results)
        return (None, *(gradient.data for gradient in graph.gradients_in))


def make_graphed_callables(parts: Sequence[torch.nn.Module], samples: Sequence[tuple[Tensor]]) -> tuple[Replayed, ...]:
    """As torch.cuda.make_graphed_callables: warm-up, all forward, then all backward. The warm-up's backward pass goes
    to the weights themselves, as Transformer Engine's does."""
    graphs = [Replayed(part, sample) for part, (sample,) in zip(parts, samples, strict=True)]
    for graph in graphs:
        for _ in range(WARM_UP):
            outputs = [o for o in graph.part(graph.static) if o.requires_grad]
            given = [torch.full_like(o, torch.nan) for o in outputs]
            torch.autograd.backward(outputs, given)
            for tensor in (graph.static, *graph.weights):
                tensor.grad = None
    for graph in graphs:
        graph.record_forward()
    for graph in reversed(graphs):
        graph.record_backward()
    return tuple(graphs)
