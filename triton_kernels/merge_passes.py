"""Adds up what passes over parts of a context gave for the same queries, and applies sinks."""

import torch
import triton
import triton.language as tl

ROWS = 16  # query rows of a program


@triton.jit(do_not_specialize=("stride_part_lse", "stride_lse"), do_not_specialize_on_alignment=("query_end",))
def merge_pass_kernel(
    part,  # [num_tokens, num_heads, HEAD_DIM], of this pass
    part_lse,  # f32 [num_heads, num_tokens], natural log, not finite: nothing seen
    total,  # [num_tokens, num_heads, HEAD_DIM], of the passes before; f32, and with this one after, unless LAST
    total_lse,  # f32 [num_heads, num_tokens]
    sinks,  # [num_heads], read for SINKS
    out,  # [num_tokens, num_heads, HEAD_DIM], written for LAST
    query_end,  # int32 [1], query_start_loc[-1]: rows of later tokens stay untouched
    stride_part_token, stride_part_head, stride_part_lse, stride_lse, stride_out_token, stride_out_head,
    NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
    FIRST: tl.constexpr, LAST: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    real = row < tl.load(query_end) * NUM_HEADS
    token, head = row // NUM_HEADS, row % NUM_HEADS
    d = tl.arange(0, D)
    at = row[:, None] * HEAD_DIM + d[None, :]
    mask = real[:, None] & (d < HEAD_DIM)[None, :]
    nothing = float("-inf")

    lse = tl.load(part_lse + head * stride_part_lse + token, mask=real, other=nothing)
    lse = tl.where(tl.abs(lse) < float("inf"), lse, nothing)  # FlashAttention 2 says +inf where nothing was seen
    part_at = part + token[:, None] * stride_part_token + head[:, None] * stride_part_head + d[None, :]
    result = tl.load(part_at, mask=mask, other=0.0).to(tl.float32)
    result = tl.where((lse > nothing)[:, None], result, 0.0)
    if not FIRST:
        old_lse = tl.load(total_lse + head * stride_lse + token, mask=real, other=nothing)
        old = tl.load(total + at, mask=mask, other=0.0).to(tl.float32)
        top = tl.maximum(old_lse, lse)
        base = tl.where(top > nothing, top, 0.0)
        old_weight, weight = tl.exp(old_lse - base), tl.exp(lse - base)
        sum_of_weights = old_weight + weight
        inverse = 1.0 / tl.where(sum_of_weights > 0, sum_of_weights, 1.0)
        result = result * (weight * inverse)[:, None] + old * (old_weight * inverse)[:, None]
        lse = tl.where(sum_of_weights > 0, base + tl.log(sum_of_weights), nothing)
    tl.store(total_lse + head * stride_lse + token, lse, mask=real)
    if LAST:
        if SINKS:
            sink = tl.load(sinks + head).to(tl.float32)
            result = result * (1.0 / (1.0 + tl.exp(sink - lse)))[:, None]
        out_at = out + token[:, None] * stride_out_token + head[:, None] * stride_out_head + d[None, :]
        tl.store(out_at, result.to(out.dtype.element_ty), mask=mask)
    else:
        tl.store(total + at, result, mask=mask)


def merge_pass(
    part: torch.Tensor,
    part_lse: torch.Tensor,
    total: torch.Tensor | None,
    total_lse: torch.Tensor,
    sinks: torch.Tensor | None,
    out: torch.Tensor | None,
    query_start_loc: torch.Tensor,
    first: bool,
) -> None:
    """Take a pass's part, [num_tokens, num_heads, head_dim] and f32 [num_heads, num_tokens], into total and total_lse.

    Args:
        total: f32, contiguous, before the last pass any float dtype; None for the only pass of a step.
        out: None, or where the result goes after the last pass, sinks applied (to out, not to total_lse); may be part.
        query_start_loc: int32 [num_reqs + 1].
        first: total and total_lse hold nothing yet.
    """
    num_tokens, num_heads, head_dim = part.shape
    merge_pass_kernel[(triton.cdiv(num_tokens * num_heads, ROWS),)](
        part, part_lse, part if total is None else total, total_lse, part if sinks is None else sinks,
        part if out is None else out, query_start_loc[-1:], part.stride(0), part.stride(1), part_lse.stride(0),
        total_lse.stride(0),
        0 if out is None else out.stride(0), 0 if out is None else out.stride(1),
        num_heads, head_dim, triton.next_power_of_2(head_dim), ROWS, first, out is not None, sinks is not None,
        num_warps=4,
    )  # fmt: skip
