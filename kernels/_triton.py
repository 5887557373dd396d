"""What the Triton files share: a product that is right everywhere, and the record of a launch."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

LOG2_E = 1.4426950408889634


class Launch(NamedTuple):
    """One kernel as an operator launches it in bfloat16: what is compiled ahead of time to count its registers."""

    kernel: Any
    constants: dict[str, Any]
    warps: int
    stages: int = 3


@triton.jit
def dot(a, b, INTERPRET: tl.constexpr):
    """`a @ b` accumulated in float32, or in float64 where the operands are."""
    if INTERPRET:  # numpy has no bfloat16
        a = a.to(tl.float32) if a.dtype == tl.bfloat16 else a
        b = b.to(tl.float32) if b.dtype == tl.bfloat16 else b
    out_dtype: tl.constexpr = tl.float64 if a.dtype == tl.float64 else tl.float32
    return tl.dot(a, b, input_precision="ieee", out_dtype=out_dtype)
