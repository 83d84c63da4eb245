"""Rotation of query rows into the space of the codes, and of weighted sums of values back out of it.

The rotation is sign_matrix / sqrt(head_dim) with entries +1 and -1, which every float dtype holds exactly: a product
with it in 16 bits loses nothing of a 16-bit operand.
"""

import functools

import torch
import triton
import triton.language as tl

from tq_vllm.core.qjl import page_sketch
from tq_vllm.core.rotations import get_rotation
from tq_vllm.triton_kernels.dot import dot


@functools.cache
def sign_matrix(head_dim: int, padded_dim: int, device: torch.device) -> torch.Tensor:
    """Return the rotation times sqrt(head_dim), +1 and -1: bf16 [padded_dim, padded_dim], zeros past head_dim."""
    matrix = torch.zeros(padded_dim, padded_dim, dtype=torch.bfloat16)
    matrix[:head_dim, :head_dim] = (get_rotation(head_dim).matrix() * head_dim**0.5).round().to(torch.bfloat16)
    return matrix.to(device)


@functools.cache
def sketch_matrix(head_dim: int, padded_dim: int, device: torch.device) -> torch.Tensor:
    """The same of the key sketches' rotation (core.qjl.page_sketch)."""
    matrix = torch.zeros(padded_dim, padded_dim, dtype=torch.bfloat16)
    matrix[:head_dim, :head_dim] = (page_sketch(head_dim).matrix() * head_dim**0.5).round().to(torch.bfloat16)
    return matrix.to(device)


@functools.cache
def transposed_sketch(head_dim: int, padded_dim: int, device: torch.device) -> torch.Tensor:
    """Its transpose: `unrotate` by it takes rotated rows into the space of the sketches."""
    return sketch_matrix(head_dim, padded_dim, device).t().contiguous()


@triton.jit
def rotate_rows(rows, valid, signs, HEAD_DIM: tl.constexpr, D: tl.constexpr, BM: tl.constexpr):
    """Rotate vectors: pointers [BM] to their first coordinates and bool [BM] -> f32 [BM, D], 0 past HEAD_DIM."""
    STEP: tl.constexpr = 32
    rotated = tl.zeros([BM, D], tl.float32)
    for start in range(0, D, STEP):
        column = start + tl.arange(0, STEP)
        x = tl.load(rows[:, None] + column[None, :], mask=valid[:, None] & (column < HEAD_DIM)[None, :], other=0.0)
        transposed = tl.load(signs + tl.arange(0, D)[None, :] * D + column[:, None])  # [STEP, D]
        rotated = dot(x, transposed.to(tl.float32).to(x.dtype), rotated)
    return rotated * (1.0 / HEAD_DIM**0.5)


@triton.jit
def normalised(rotated, DTYPE: tl.constexpr):
    """Split rows f32 [BM, D] into DTYPE rows of largest magnitude 1 and f32 scales [BM]."""
    largest = tl.max(tl.abs(rotated), 1)
    scale = tl.where(largest > 0, largest, 1.0)
    return (rotated / scale[:, None]).to(DTYPE), scale


@triton.jit
def _times_signs(x, signs, PARTS: tl.constexpr, BM: tl.constexpr, K: tl.constexpr, D: tl.constexpr):
    """x f32 [BM, K] @ signs bf16 [K, D] -> f32 [BM, D], x taken as a sum of PARTS bf16 numbers."""
    matrix = tl.load(signs + tl.arange(0, K)[:, None] * D + tl.arange(0, D)[None, :])
    part = x.to(tl.bfloat16)
    product = dot(part, matrix, tl.zeros([BM, D], tl.float32))
    for _ in tl.static_range(PARTS - 1):
        x = x - part.to(tl.float32)
        part = x.to(tl.bfloat16)
        product = dot(part, matrix, product)
    return product


@triton.jit
def unrotate(x, signs, HEAD_DIM: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, PARTS: tl.constexpr):
    """Rotate x f32 [BM, D] back; PARTS 2 leaves a relative error of 2**-16, 3 that of f32."""
    if D <= 128:
        product = _times_signs(x, signs, PARTS, BM, D, D)
    else:  # halves, so that the matrix fits into shared memory
        low, high = tl.split(tl.permute(tl.reshape(x, [BM, 2, D // 2]), [0, 2, 1]))
        product = _times_signs(low, signs, PARTS, BM, D // 2, D)
        product += _times_signs(high, signs + D // 2 * D, PARTS, BM, D // 2, D)
    return product * (1.0 / HEAD_DIM**0.5)


@triton.jit
def rotate_queries_kernel(
    query,  # [num_tokens, num_heads, HEAD_DIM]
    rotated,  # f16 or f32 [num_tokens, num_heads, D], rows of largest magnitude 1
    scales,  # f32 [num_tokens, num_heads]
    sketched, sketched_scales,  # the same in the space of the key sketches, written for SKETCH
    signs,  # bf16 [D, D]
    sketch,  # bf16 [D, D] from transposed_sketch, read for SKETCH
    num_rows, stride_token, stride_head,
    NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, SKETCH: tl.constexpr,
):  # fmt: skip
    """Rotate every query row once, before the split kernel reads it many times."""
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    valid = row < num_rows
    pointers = query + (row // NUM_HEADS).to(tl.int64) * stride_token + row % NUM_HEADS * stride_head
    in_codes = rotate_rows(pointers, valid, signs, HEAD_DIM, D, BM)
    unit, scale = normalised(in_codes, rotated.dtype.element_ty)
    at = row.to(tl.int64)[:, None] * D + tl.arange(0, D)[None, :]
    tl.store(rotated + at, unit, mask=valid[:, None])
    tl.store(scales + row, scale, mask=valid)
    if SKETCH:
        unit, scale = normalised(unrotate(in_codes, sketch, HEAD_DIM, D, BM, 3), sketched.dtype.element_ty)
        tl.store(sketched + at, unit, mask=valid[:, None])
        tl.store(sketched_scales + row, scale, mask=valid)


def rotate_queries(query: torch.Tensor, padded_dim: int, sketch: bool = False) -> tuple[torch.Tensor, ...]:
    """Return rotated unit rows [num_tokens, num_heads, padded_dim], f32 for f32 queries, else f16, and their scales;
    the same in the space of the key sketches (without `sketch` the first two again)."""
    num_tokens, num_heads, head_dim = query.shape
    dtype = torch.float32 if query.dtype == torch.float32 else torch.float16
    rotated = torch.empty(num_tokens, num_heads, padded_dim, dtype=dtype, device=query.device)
    scales = torch.empty(num_tokens, num_heads, dtype=torch.float32, device=query.device)
    sketched, sketched_scales = (torch.empty_like(rotated), torch.empty_like(scales)) if sketch else (rotated, scales)
    signs = sign_matrix(head_dim, padded_dim, query.device)
    matrix = transposed_sketch(head_dim, padded_dim, query.device) if sketch else signs
    BM = 16
    rotate_queries_kernel[(triton.cdiv(num_tokens * num_heads, BM),)](
        query, rotated, scales, sketched, sketched_scales, signs, matrix, num_tokens * num_heads,
        query.stride(0), query.stride(1), num_heads, head_dim, padded_dim, BM, sketch, num_warps=4,
    )  # fmt: skip
    return rotated, scales, sketched, sketched_scales
