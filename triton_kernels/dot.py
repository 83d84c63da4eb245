"""The tensor-core product, also where Triton's interpreter runs it."""

import triton
import triton.language as tl

INTERPRETED: tl.constexpr = tl.constexpr(bool(triton.knobs.runtime.interpret))  # it takes bf16 for integers


@triton.jit
def dot(a, b, accumulator):
    """a [M, K] @ b [K, N] + accumulator f32 [M, N]; f32 operands are not rounded."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), accumulator, input_precision="ieee")
    else:
        return tl.dot(a, b, accumulator, input_precision="ieee")
