"""A reference that lives in host memory and visits the device once every so many steps.

It comes after the backward pass of the step before, when activations are gone, while the optimizer works; scores what
the coming steps train on, in one pass of the pipeline; and leaves. Its numbers are those of a resident reference to the
bit: every stream is scored alone, whatever is scored beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from megadpo.data.stream import Scored
from megadpo.parallel.context import ParallelContext
from megadpo.train.passes import with_reference
from megadpo.train.portions import Portion, Portions


class SwappedPortions(Portions):
    """Portions that come with the numbers of such a reference. steps: that one visit is for. on_visit: called
    before each.

    Every rank calls every method alike. The chunks' parameters are empty outside `reference`.
    """

    def __init__(
        self,
        train: Scored,
        size: int,
        end: int,
        context: ParallelContext,
        reference: Sequence[Any],
        steps: int,
        on_visit: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(train, size, end, context)
        self._chunks, self._steps, self._on_visit = list(reference), steps, on_visit
        self._parameters = list({id(p): p for chunk in reference for p in chunk.parameters()}.values())
        self._home = [_in_host_memory(parameter.data) for parameter in self._parameters]
        self._stream: Any = torch.cuda.Stream()
        self._scored: dict[int, Portion] = {}
        self._here: list[Tensor] | None = None
        self._leave()

    def at(self, consumed: int) -> Portion:
        """With the reference's numbers; after a visit, if one is due."""
        if consumed not in self._scored:
            self._on_visit()
            self._scored = self._visit(consumed)
        return self._scored[consumed]

    def prepare(self, consumed: int) -> None:
        """Start the copy to the device, if a visit will be due."""
        if consumed not in self._scored and consumed < self.end:
            self._come()

    @contextmanager
    def reference(self) -> Iterator[list[Any] | None]:
        self._come()
        assert self._here is not None
        torch.cuda.current_stream().wait_stream(self._stream)
        for parameter, there in zip(self._parameters, self._here, strict=True):
            parameter.data = there
        try:
            yield self._chunks
        finally:
            self._leave()

    def _come(self) -> None:
        """Copy on a stream of its own, behind what the device has been given to do so far: memory that is taken for the
        copy may still be in use there."""
        if self._here is not None:
            return
        device = self.context.device
        self._here = [torch.empty(home.shape, dtype=home.dtype, device=device) for home in self._home]
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for there, home in zip(self._here, self._home, strict=True):
                there.copy_(home, non_blocking=True)

    def _leave(self) -> None:
        self._here = None
        for parameter in self._parameters:
            parameter.data = torch.empty(0, dtype=parameter.dtype, device=self.context.device)
        for chunk in self._chunks:
            for module in chunk.modules():  # FP8 casts of weights that Transformer Engine keeps from pass to pass
                getattr(module, "_fp8_workspaces", {}).clear()

    def _visit(self, consumed: int) -> dict[int, Portion]:
        """The coming steps' portions with the reference's numbers; fewer at the end of the run."""
        portions: dict[int, Portion] = {}
        while len(portions) < self._steps and (portion := self.plain(consumed)) is not None:
            portions[consumed] = portion
            consumed += len(portion.groups)
        assert portions, "the run has no step behind its end"
        every = [batch for portion in portions.values() for batch in (*portion.batches, *(portion.mismatched or ()))]
        with self.reference() as chunks:
            assert chunks is not None
            scored = iter(with_reference(chunks, every, self.context))
        return {
            place: replace(
                portion,
                batches=[next(scored) for _ in portion.batches],
                mismatched=None if portion.mismatched is None else [next(scored) for _ in portion.mismatched],
            )
            for place, portion in portions.items()
        }


def _in_host_memory(values: Tensor) -> Tensor:
    """A copy, pinned where there is a GPU: only then does a copy to it run beside other work."""
    home = torch.empty(values.shape, dtype=values.dtype, device="cpu", pin_memory=values.is_cuda)
    return home.copy_(values)
