"""Triton's interpreter, made to round as the GPU does.

It makes bfloat16 of float32 by cutting bits off, where the compiled kernels round to nearest (test_compile.py looks at
the instruction). Left so, it would be the interpreter's error that the bfloat16 tests measure, and not the kernel's.
"""

import numpy as np
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def round_to_nearest() -> None:
    """Replace the interpreter's conversion from float32 to bfloat16, in this process and those that it forks."""
    original = InterpreterBuilder.cast_impl

    def cast_impl(self: InterpreterBuilder, source: TensorHandle, kind: tl.dtype) -> TensorHandle:
        if source.dtype.scalar != tl.float32 or kind.scalar != tl.bfloat16:
            return original(self, source, kind)
        rounded = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16()
        return TensorHandle(rounded.view(torch.int16).numpy().view(np.uint16), tl.bfloat16)

    InterpreterBuilder.cast_impl = cast_impl
