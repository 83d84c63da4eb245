"""Attention of any number of query rows over codes and, where given, over this step's raw keys and values.

One program per (tile of query rows, KV head, request); a row is a query token and a query head of the KV head's group.
Codes become 16-bit numbers in registers, tile by tile, and go into tensor-core products with the rotated queries; the
sum of values is rotated back once, and the raw tokens of the step follow in the same online softmax. No buffers.
"""

import torch
import triton
import triton.language as tl

from tq_vllm.format import SEGMENT_TOKENS, TurboQuantPage
from tq_vllm.triton_kernels.codes import (
    column_tokens,
    key_codes,
    load_scales,
    numbers,
    sketch_codes,
    tile_records,
    value_codes,
)
from tq_vllm.triton_kernels.dot import INTERPRETED, dot
from tq_vllm.triton_kernels.rotation import normalised, rotate_rows, sign_matrix, transposed_sketch, unrotate
from tq_vllm.triton_kernels.softmax import NOTHING, capped, finish, online_softmax, score_scale, visible

BN = SEGMENT_TOKENS  # tokens of a tile: the key offset is one number over it


@triton.jit
def find_broken_kernel(
    key, value,  # [num_tokens, num_kv_heads, HEAD_DIM]
    broken,  # int32 [1], zero; 1 where a number is not finite
    query_end,  # int32 [1], query_start_loc[-1]: rows past it hold anything
    stride_key_token, stride_key_head, stride_value_token, stride_value_head,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * BN + tl.arange(0, BN)
    head = tl.program_id(1)
    d = tl.arange(0, D)
    present = (token < tl.load(query_end))[:, None] & (d < HEAD_DIM)[None, :]
    token = token.to(tl.int64)[:, None]
    k = tl.load(key + token * stride_key_token + head * stride_key_head + d[None, :], mask=present, other=0.0)
    v = tl.load(value + token * stride_value_token + head * stride_value_head + d[None, :], mask=present, other=0.0)
    if tl.sum(k.to(tl.float32) * 0.0 + v.to(tl.float32) * 0.0) != 0.0:
        tl.store(broken, 1)


@triton.jit
def _load_raw(pointers, real, HEAD_DIM: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr, CHECKED: tl.constexpr):
    """Raw vectors [BN, D]. MASKED: zero where not `real`. CHECKED: zero where not all finite, as in the cache."""
    d = tl.arange(0, D)
    at = pointers[:, None] + d[None, :]
    if MASKED:
        x = tl.load(at, mask=real[:, None] & (d < HEAD_DIM)[None, :], other=0.0)
    elif HEAD_DIM < D:
        x = tl.load(at, mask=(d < HEAD_DIM)[None, :], other=0.0)
    else:
        x = tl.load(at)
    if CHECKED:
        finite = tl.sum(x.to(tl.float32) * 0.0, 1) == 0.0
        x = tl.where(finite[:, None], x, 0.0).to(x.dtype)
    return x


@triton.jit
def _attend_raw(
    q, query_start, query_len, index, keys, values, begin, end, result, maximum, total,
    stride_key_token, stride_value_token, window, to_score, soft_cap,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr, MASKED: tl.constexpr, CHECKED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Take tokens begin .. end of this step into result, maximum and total. Without MASKED all rows see all of them."""
    for start in tl.range(begin, end, BN, num_stages=STAGES):
        column = start + tl.arange(0, BN)
        real = column < query_len
        source = (query_start + column).to(tl.int64)
        k = _load_raw(keys + source * stride_key_token, real, HEAD_DIM, D, MASKED, CHECKED)
        scores = dot(q, tl.trans(k).to(q.dtype), tl.zeros([BM, BN], tl.float32))
        scale = tl.full([BM], 1.0, tl.float32)
        if SOFT_CAP:
            scores = capped(scores * to_score, soft_cap)
        else:
            scale *= to_score
        if MASKED:
            scores = tl.where(visible(index, column, window, WINDOW) & real[None, :], scores, float("-inf"))
        weights, factor, maximum, total = online_softmax(scores, scale, maximum, total)
        v = _load_raw(values + source * stride_value_token, real, HEAD_DIM, D, MASKED, CHECKED)
        result = dot(weights.to(v.dtype), v, result * factor[:, None])
    return result, maximum, total


@triton.jit
def _attend_codes(
    rotated, row_scale, sketched, sketched_scale, query_rows, valid, position, cache, block_row, kv_head, codes_len,
    first_tile, end_tile, result, maximum, total, offsets, num_segments, stride_segment, stride_block, stride_head,
    window, to_score, soft_cap,
    KEYS: tl.constexpr, VALUES: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE_BYTES: tl.constexpr,
    HEAD_DIM: tl.constexpr, W: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, VALUE_DTYPE: tl.constexpr,
    OFFSET: tl.constexpr, WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr, MASKED: tl.constexpr, STAGES: tl.constexpr,
    SKETCHES: tl.constexpr, SKETCH: tl.constexpr,
):  # fmt: skip
    """Take tiles first_tile .. end_tile of the cache into result (in the space of the codes, in units of VALUES.unit),
    maximum and total. Without MASKED all rows see all of them."""
    words = cache.to(tl.pointer_type(tl.int32))
    in_record, in_tile = column_tokens(BN)
    d = tl.arange(0, 8 * W)
    if OFFSET:
        raw = tl.load(query_rows[:, None] + d[None, :], mask=valid[:, None] & (d < HEAD_DIM)[None, :], other=0.0)
    for tile in tl.range(first_tile, end_tile, num_stages=STAGES):
        start = tile * BN
        record = tile_records(block_row, start, codes_len, kv_head, stride_block, stride_head,
                              BLOCK_SIZE, TILE_BYTES, BN, BN)  # fmt: skip
        pairs = tile_records(block_row, start, codes_len, kv_head, stride_block, stride_head,
                             BLOCK_SIZE, TILE_BYTES, BN, BN // 2)  # fmt: skip
        k = numbers(words, record, in_record, KEYS, W, BN, rotated.dtype)
        scores = dot(rotated, tl.trans(k), tl.zeros([BM, BN], tl.float32))
        scores = scores * load_scales(words, pairs, KEYS, BN)[None, :]
        scale = row_scale
        if OFFSET or SOFT_CAP or SKETCH:
            scores = scores * scale[:, None]
            scale = tl.full([BM], 1.0, tl.float32)
        if SKETCH:
            signs = numbers(words, record, in_record, SKETCHES, W, BN, rotated.dtype)
            more = dot(sketched, tl.trans(signs), tl.zeros([BM, BN], tl.float32))
            scores += more * load_scales(words, pairs, SKETCHES, BN)[None, :] * sketched_scale[:, None]
        if OFFSET:
            segment = tl.minimum(tile, num_segments - 1).to(tl.int64)
            offset = tl.load(offsets + segment * stride_segment + d, mask=d < HEAD_DIM, other=0.0).to(tl.float32)
            scores += (tl.sum(raw.to(tl.float32) * offset[None, :], 1) * to_score)[:, None]
        if SOFT_CAP:
            scores = capped(scores, soft_cap)
        value_scale = load_scales(words, pairs, VALUES, BN)
        if MASKED:
            written = start + in_tile < codes_len
            seen = visible(position, start + in_tile, window, WINDOW) & written[None, :]
            scores = tl.where(seen, scores, float("-inf"))
            if WINDOW:  # what it has left behind may hold anything
                written = written & (start + in_tile > tl.min(position, 0) - window)
            value_scale = tl.where(written, value_scale, 0.0)
        weights, factor, maximum, total = online_softmax(scores, scale, maximum, total)
        v = numbers(words, record, tl.arange(0, BN) % 16, VALUES, W, BN, VALUE_DTYPE)
        result = dot((weights * value_scale[None, :]).to(VALUE_DTYPE), v, result * factor[:, None])
    return result, maximum, total


@triton.jit
def prefill_kernel(
    query,  # [num_tokens, num_heads, HEAD_DIM]
    key, value,  # [num_tokens, num_kv_heads, HEAD_DIM], read for FRESH
    cache,  # uint8, see format.py
    block_table,  # int32 [num_reqs, max_blocks]
    seq_lens,  # int32 [num_reqs]
    query_start_loc,  # int32 [num_reqs + 1]
    key_offset,  # [num_segments, num_kv_heads, HEAD_DIM], read for OFFSET
    sinks,  # [num_heads], read for SINKS
    signs,  # bf16 [D, D]
    sketch,  # bf16 [D, D] from transposed_sketch, read for SKETCH
    out,  # [num_tokens, num_heads, HEAD_DIM]
    lse,  # f32 [num_heads, num_tokens], written for LSE
    broken,  # int32 [1] from find_broken_kernel, read for FRESH
    num_segments, window, softmax_scale, soft_cap,
    stride_block, stride_head,  # of the cache, in 16 bytes
    stride_table, stride_query_token, stride_query_head, stride_key_token, stride_key_head,
    stride_value_token, stride_value_head, stride_segment, stride_offset_head,
    stride_out_token, stride_out_head, stride_lse,
    KEYS: tl.constexpr, VALUES: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE_BYTES: tl.constexpr,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, W: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    FRESH: tl.constexpr, OFFSET: tl.constexpr, SINKS: tl.constexpr, WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr, LSE: tl.constexpr, STAGES: tl.constexpr,
    SKETCHES: tl.constexpr, SKETCH: tl.constexpr,  # codes of the key sketches, and whether there are any
):  # fmt: skip
    request = tl.program_id(2)
    kv_head = tl.program_id(1)
    first_row = (tl.num_programs(0) - 1 - tl.program_id(0)) * BM  # the longest tiles first
    query_start = tl.load(query_start_loc + request)
    query_len = tl.load(query_start_loc + request + 1) - query_start
    if first_row >= query_len * GROUP:
        return
    seq_len = tl.load(seq_lens + request)
    context_len = seq_len - query_len

    row = first_row + tl.arange(0, BM)
    index = row // GROUP  # [BM] token of the row in its request
    valid = index < query_len
    token = (query_start + index).to(tl.int64)
    head = kv_head * GROUP + row % GROUP
    position = context_len + index
    query_rows = query + token * stride_query_token + head * stride_query_head  # [BM] pointers
    first_index = first_row // GROUP
    end_index = tl.minimum((first_row + BM - 1) // GROUP + 1, query_len)

    D: tl.constexpr = 8 * W
    WIDE: tl.constexpr = query.dtype.element_ty == tl.float32
    KEY_DTYPE: tl.constexpr = tl.float32 if WIDE else tl.float16
    VALUE_DTYPE: tl.constexpr = tl.float32 if WIDE else tl.bfloat16
    d = tl.arange(0, D)
    to_score = score_scale(softmax_scale, SOFT_CAP)
    maximum = tl.full([BM], NOTHING, tl.float32)
    total = tl.zeros([BM], tl.float32)
    result = tl.zeros([BM, D], tl.float32)

    # Tiles that every row sees as a whole come first and need no mask.
    codes_len = context_len if FRESH else tl.minimum(context_len + end_index, seq_len)
    whole_len = context_len if FRESH else context_len + first_index + 1
    if codes_len > 0:
        first_tile = 0
        whole_tile = whole_len // BN
        if WINDOW:
            first_tile = tl.maximum(context_len + first_index - window + 1, 0) // BN
            whole_tile = first_tile
        in_codes = rotate_rows(query_rows, valid, signs, HEAD_DIM, D, BM)
        rotated, row_scale = normalised(in_codes, KEY_DTYPE)
        row_scale *= to_score * KEYS.unit
        sketched, sketched_scale = rotated, row_scale
        if SKETCH:
            sketched, sketched_scale = normalised(unrotate(in_codes, sketch, HEAD_DIM, D, BM, 3), KEY_DTYPE)
            sketched_scale *= to_score
        block_row = block_table + request.to(tl.int64) * stride_table
        offsets = key_offset + kv_head * stride_offset_head
        result, maximum, total = _attend_codes(
            rotated, row_scale, sketched, sketched_scale, query_rows, valid, position, cache, block_row, kv_head,
            codes_len, first_tile, whole_tile, result, maximum, total, offsets, num_segments, stride_segment,
            stride_block, stride_head, window, to_score, soft_cap, KEYS, VALUES, BLOCK_SIZE, TILE_BYTES,
            HEAD_DIM, W, BM, BN, VALUE_DTYPE, OFFSET, WINDOW, SOFT_CAP, False, STAGES, SKETCHES, SKETCH,
        )  # fmt: skip
        result, maximum, total = _attend_codes(
            rotated, row_scale, sketched, sketched_scale, query_rows, valid, position, cache, block_row, kv_head,
            codes_len, whole_tile, tl.cdiv(codes_len, BN), result, maximum, total, offsets, num_segments,
            stride_segment, stride_block, stride_head, window, to_score, soft_cap, KEYS, VALUES, BLOCK_SIZE, TILE_BYTES,
            HEAD_DIM, W, BM, BN, VALUE_DTYPE, OFFSET, WINDOW, SOFT_CAP, True, STAGES, SKETCHES, SKETCH,
        )  # fmt: skip
        result = unrotate(result * VALUES.unit, signs, HEAD_DIM, D, BM, 3 if WIDE else 2)

    if FRESH:
        q = tl.load(query_rows[:, None] + d[None, :], mask=valid[:, None] & (d < HEAD_DIM)[None, :], other=0.0)
        keys = key + kv_head * stride_key_head
        values = value + kv_head * stride_value_head
        begin = 0
        whole = tl.where(seq_len > 0, (first_index + 1) // BN * BN, 0)
        if WINDOW:
            begin = tl.maximum(first_index - window + 1, 0) // BN * BN
            whole = begin
        end = tl.where(seq_len > 0, end_index, 0)
        if tl.load(broken) == 0:
            result, maximum, total = _attend_raw(
                q, query_start, query_len, index, keys, values, begin, whole, result, maximum, total,
                stride_key_token, stride_value_token, window, to_score, soft_cap,
                HEAD_DIM, D, BM, BN, WINDOW, SOFT_CAP, False, False, STAGES,
            )  # fmt: skip
            result, maximum, total = _attend_raw(
                q, query_start, query_len, index, keys, values, whole, end, result, maximum, total,
                stride_key_token, stride_value_token, window, to_score, soft_cap,
                HEAD_DIM, D, BM, BN, WINDOW, SOFT_CAP, True, False, STAGES,
            )  # fmt: skip
        else:
            result, maximum, total = _attend_raw(
                q, query_start, query_len, index, keys, values, begin, end, result, maximum, total,
                stride_key_token, stride_value_token, window, to_score, soft_cap,
                HEAD_DIM, D, BM, BN, WINDOW, SOFT_CAP, True, True, 1,
            )  # fmt: skip

    sink = maximum
    if SINKS:
        sink = tl.load(sinks + head).to(tl.float32)
    logsumexp, factor = finish(maximum, total, sink, SINKS)
    tl.store(
        out + token[:, None] * stride_out_token + head[:, None] * stride_out_head + d[None, :],
        (result * factor[:, None]).to(out.dtype.element_ty), mask=valid[:, None] & (d < HEAD_DIM)[None, :],
    )  # fmt: skip
    if LSE:
        tl.store(lse + head.to(tl.int64) * stride_lse + token, logsumexp, mask=valid)


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program may take."""
    if device.type != "cuda":
        return 0
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def launch_shape(rows: int, padded_dim: int, wide: bool, device: torch.device) -> tuple[int, int, int]:
    """Rows of a program, its warps and its stages. wide: f32 products, on the FMA units with both operands in shared
    memory."""
    if wide or rows <= 16:
        return 16, 4, 1 if wide or padded_dim > 128 else 2
    if padded_dim > 128:
        return 32 if rows <= 32 else 64, 8, 1
    if rows <= 512:
        return 32 if rows <= 32 else 64, 4, 2
    return 128, 8, 3 if shared_memory(device) >= 160 << 10 else 2


def prefill(
    query, key, value, kv_cache, block_table, seq_lens, query_start_loc, key_offset, sinks, out, lse,
    softmax_scale: float, max_query_len: int, sliding_window: int, logits_soft_cap: float, page: TurboQuantPage,
) -> None:  # fmt: skip
    """Attend queries of any length; arguments as in ops/schema.py."""
    num_heads, head_dim = query.shape[1:]
    num_kv_heads, block_size = kv_cache.shape[1:3]
    group = num_heads // num_kv_heads
    W = triton.next_power_of_2(head_dim // 8)
    rows = max_query_len * group
    wide = query.dtype == torch.float32
    sketch, signs = page.config.key_sketch, sign_matrix(head_dim, 8 * W, query.device)
    # Queries in two spaces do not fit shared memory at the largest tiles.
    shape_rows = min(rows, 512 if W <= 16 else 32) if sketch else rows
    BM, warps, stages = launch_shape(shape_rows, 8 * W, wide, query.device)
    by_table = not wide and not INTERPRETED
    keys = key_codes(page, tl.float16 if by_table else None)
    values = value_codes(page, tl.bfloat16 if by_table else None)
    sketches = sketch_codes(page, tl.float16 if by_table else None) if sketch else keys
    fresh = key is not None
    key, value = (key, value) if fresh else (query, query)
    offset = query if key_offset is None else key_offset
    broken = seq_lens
    if fresh:
        broken = torch.zeros(1, dtype=torch.int32, device=query.device)
        find_broken_kernel[(triton.cdiv(len(key), BN), num_kv_heads)](
            key, value, broken, query_start_loc[-1:], key.stride(0), key.stride(1), value.stride(0), value.stride(1),
            head_dim, 8 * W, BN, num_warps=4,
        )  # fmt: skip
    prefill_kernel[(triton.cdiv(rows, BM), num_kv_heads, len(seq_lens))](
        query, key, value, kv_cache, block_table, seq_lens, query_start_loc, offset,
        query if sinks is None else sinks, signs,
        transposed_sketch(head_dim, 8 * W, query.device) if sketch else signs, out,
        query if lse is None else lse, broken, offset.shape[0], sliding_window, softmax_scale, logits_soft_cap,
        kv_cache.stride(0) // 16, kv_cache.stride(1) // 16, block_table.stride(0), query.stride(0), query.stride(1),
        key.stride(0), key.stride(1), value.stride(0), value.stride(1), offset.stride(0), offset.stride(1),
        out.stride(0), out.stride(1), 0 if lse is None else lse.stride(0),
        keys, values, block_size, page.tile_bytes, group, head_dim, W, BM, BN,
        fresh, key_offset is not None, sinks is not None, sliding_window > 0, logits_soft_cap > 0, lse is not None,
        STAGES=stages, SKETCHES=sketches, SKETCH=sketch, num_warps=warps,
    )  # fmt: skip
