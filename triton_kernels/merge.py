"""Adds up the splits of every query row, applies sinks and rotates the result back."""

import torch
import triton
import triton.language as tl

from tq_vllm.triton_kernels.rotation import sign_matrix, unrotate
from tq_vllm.triton_kernels.softmax import NOTHING, finish
from tq_vllm.triton_kernels.split import splits_of

LANES = 16  # rows of a tensor-core product; LANES / PHASES query rows a program


@triton.jit
def merge_kernel(
    split_out,  # f32 [num_items, num_kv_heads, max_rows, D], in the space of the codes
    split_lse,  # f32 [num_items, num_kv_heads, max_rows], base 2, -inf: nothing
    seq_lens,  # int32 [num_reqs]
    query_start_loc,  # int32 [num_reqs + 1]
    sinks,  # [num_heads]
    signs,  # bf16 [D, D]
    out,  # [num_tokens, num_heads, HEAD_DIM]
    lse,  # f32 [num_heads, num_tokens]
    num_reqs, programs, max_rows, window, stride_out_token, stride_out_head, stride_lse,
    NUM_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr,
    LANES: tl.constexpr, PHASES: tl.constexpr, REQS: tl.constexpr, BN: tl.constexpr,
    WINDOW: tl.constexpr, SINKS: tl.constexpr, LSE: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """A lane adds up every PHASES-th split of one row; then the PHASES lanes of a row are added up."""
    request = tl.program_id(1)
    query_start = tl.load(query_start_loc + request)
    query_len = tl.load(query_start_loc + request + 1) - query_start
    ROWS: tl.constexpr = LANES // PHASES
    if tl.program_id(0) * ROWS >= query_len * NUM_HEADS:
        return
    lane = tl.arange(0, LANES)
    phase = lane % PHASES
    of_request = tl.program_id(0) * ROWS + lane // PHASES
    index = of_request // NUM_HEADS
    head = of_request % NUM_HEADS
    valid = index < query_len
    row = head // GROUP * max_rows + index * GROUP + head % GROUP
    d = tl.arange(0, D)

    first, count = splits_of(request, seq_lens, query_start_loc, num_reqs, programs, window, REQS, BN, WINDOW)
    maximum = tl.full([LANES], NOTHING, tl.float32)
    total = tl.zeros([LANES], tl.float32)
    result = tl.zeros([LANES, D], tl.float32)
    for start in range(0, count, PHASES):
        present = valid & (start + phase < count)
        at = (first + start + phase).to(tl.int64) * (NUM_HEADS // GROUP * max_rows) + row
        score = tl.load(split_lse + at, mask=present, other=float("-inf"))
        part = tl.load(split_out + at[:, None] * D + d[None, :], mask=present[:, None], other=0.0)
        new_maximum = tl.maximum(maximum, score)
        factor = tl.exp2(maximum - new_maximum)
        weight = tl.exp2(score - new_maximum)
        result = result * factor[:, None] + part * weight[:, None]
        total = total * factor + weight
        maximum = new_maximum

    if PHASES > 1:
        by_phase = tl.reshape(maximum, [ROWS, PHASES])
        top = tl.max(by_phase, 1)[:, None]
        factor = tl.exp2(by_phase - top)
        total = tl.sum(tl.reshape(total, [ROWS, PHASES]) * factor, 1)[:, None]
        result = tl.sum(tl.reshape(result, [ROWS, PHASES, D]) * factor[:, :, None], 1)[:, None, :]
        maximum = tl.reshape(tl.broadcast_to(top, [ROWS, PHASES]), [LANES])
        total = tl.reshape(tl.broadcast_to(total, [ROWS, PHASES]), [LANES])
        result = tl.reshape(tl.broadcast_to(result, [ROWS, PHASES, D]), [LANES, D])

    sink = maximum
    if SINKS:
        sink = tl.load(sinks + head).to(tl.float32)
    logsumexp, factor = finish(maximum, total, sink, SINKS)
    result = unrotate(result * factor[:, None], signs, HEAD_DIM, D, LANES, PARTS)
    written = valid & (phase == 0)
    token = query_start + index
    tl.store(
        out + token.to(tl.int64)[:, None] * stride_out_token + head[:, None] * stride_out_head + d[None, :],
        result.to(out.dtype.element_ty), mask=written[:, None] & (d < HEAD_DIM)[None, :],
    )  # fmt: skip
    if LSE:
        tl.store(lse + head.to(tl.int64) * stride_lse + token, logsumexp, mask=written)


def merge_splits(
    split_out, split_lse, seq_lens, query_start_loc, sinks, out, lse, programs: int, max_query_len: int,
    sliding_window: int, tile_tokens: int,
) -> None:  # fmt: skip
    """Write out and lse (arguments as in ops/schema.py) from the splits that `decode_kernel` left."""
    num_items, num_kv_heads, max_rows, D = split_out.shape
    num_reqs, (num_heads, head_dim) = len(seq_lens), out.shape[1:]
    rows = max_query_len * num_heads
    phases = min(LANES, triton.next_power_of_2(num_items // num_reqs))  # about as many as a row has splits
    merge_kernel[(triton.cdiv(rows, LANES // phases), num_reqs)](
        split_out, split_lse, seq_lens, query_start_loc, split_lse if sinks is None else sinks,
        sign_matrix(head_dim, D, out.device), out, split_lse if lse is None else lse,
        num_reqs, programs, max_rows, sliding_window, out.stride(0), out.stride(1), 0 if lse is None else lse.stride(0),
        num_heads, num_heads // num_kv_heads, head_dim, D, LANES, phases, triton.next_power_of_2(num_reqs), tile_tokens,
        sliding_window > 0, sinks is not None, lse is not None, 3 if out.dtype == torch.float32 else 2, num_warps=4,
    )  # fmt: skip
