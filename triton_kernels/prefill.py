"""Attention of any number of query rows over codes and, where given, over this step's raw keys and values.

One program per (tile of query rows, KV head, request); a row is a query token and a query head of the KV head's group.
Codes become 16-bit numbers in registers, tile by tile, and go into tensor-core products with the rotated queries; the sum
of values is rotated back once, and the raw tokens of the step follow in the same online softmax. Nothing is allocated.
"""

import torch
import triton
import triton.language as tl

from tq_vllm.format import SEGMENT_TOKENS, TurboQuantPage
from tq_vllm.triton_kernels.codes import column_tokens, key_codes, load_scales, numbers, tile_records, value_codes
from tq_vllm.triton_kernels.dot import INTERPRETED, dot
from tq_vllm.triton_kernels.rotation import normalised, rotate_rows, sign_matrix, unrotate
from tq_vllm.triton_kernels.softmax import NOTHING, capped, finish, online_softmax, score_scale, visible

BN = SEGMENT_TOKENS  # tokens of a tile: the key offset is one number over it


@triton.jit
def _load_raw(pointers, valid, HEAD_DIM: tl.constexpr, D: tl.constexpr):
    """Raw vectors [BN, D], zero where not valid and where a vector holds a NaN or an infinity, as the cache stores them."""
    d = tl.arange(0, D)
    x = tl.load(pointers[:, None] + d[None, :], mask=valid[:, None] & (d < HEAD_DIM)[None, :], other=0.0)
    finite = tl.sum(x.to(tl.float32) * 0.0, 1) == 0.0
    return tl.where(finite[:, None], x, 0.0).to(x.dtype)


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
    signs,  # int8 [D, D]
    out,  # [num_tokens, num_heads, HEAD_DIM]
    lse,  # f32 [num_heads, num_tokens], written for LSE
    num_segments, window, softmax_scale, soft_cap,
    stride_block, stride_head,  # of the cache, in 16 bytes
    stride_table, stride_query_token, stride_query_head, stride_key_token, stride_key_head,
    stride_value_token, stride_value_head, stride_segment, stride_offset_head,
    stride_out_token, stride_out_head, stride_lse,
    KEYS: tl.constexpr, VALUES: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE_BYTES: tl.constexpr,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, W: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    FRESH: tl.constexpr, OFFSET: tl.constexpr, SINKS: tl.constexpr, WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr, LSE: tl.constexpr, STAGES: tl.constexpr,
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

    if FRESH:
        codes_len = context_len
    else:
        codes_len = tl.minimum(context_len + end_index, seq_len)
    first_tile = 0
    if WINDOW:
        first_tile = tl.maximum(context_len + first_index - window + 1, 0) // BN
    if codes_len > 0:
        rotated, scale = normalised(rotate_rows(query_rows, valid, signs, HEAD_DIM, D, BM), KEY_DTYPE)
        row_scale = scale * (to_score * KEYS.unit)
        if OFFSET:
            raw = tl.load(query_rows[:, None] + d[None, :], mask=valid[:, None] & (d < HEAD_DIM)[None, :], other=0.0)
        block_row = block_table + request.to(tl.int64) * stride_table
        words = cache.to(tl.pointer_type(tl.int32))
        in_record, in_tile = column_tokens(BN)
        for tile in tl.range(first_tile, tl.cdiv(codes_len, BN), num_stages=STAGES):
            start = tile * BN
            record = tile_records(block_row, start, codes_len, kv_head, stride_block, stride_head,
                                  BLOCK_SIZE, TILE_BYTES, BN, BN)  # fmt: skip
            pairs = tile_records(block_row, start, codes_len, kv_head, stride_block, stride_head,
                                 BLOCK_SIZE, TILE_BYTES, BN, BN // 2)  # fmt: skip
            written = start + in_tile < codes_len
            k = numbers(words, record, in_record, KEYS, W, BN, KEY_DTYPE)
            scores = dot(rotated, tl.trans(k), tl.zeros([BM, BN], tl.float32))
            key_scale = load_scales(words, pairs, KEYS, BN)
            scores = scores * key_scale[None, :] * row_scale[:, None]
            if OFFSET:
                segment = tl.minimum(tile, num_segments - 1).to(tl.int64)
                offset = tl.load(key_offset + segment * stride_segment + kv_head * stride_offset_head + d,
                                 mask=d < HEAD_DIM, other=0.0).to(tl.float32)  # fmt: skip
                scores += (tl.sum(raw.to(tl.float32) * offset[None, :], 1) * to_score)[:, None]
            scores = capped(scores, soft_cap, SOFT_CAP)
            seen = visible(position, start + in_tile, window, WINDOW) & written[None, :]
            scores = tl.where(seen, scores, float("-inf"))
            weights, factor, maximum, total = online_softmax(scores, maximum, total)
            value_scale = load_scales(words, pairs, VALUES, BN) * VALUES.unit
            value_scale = tl.where(written, value_scale, 0.0)
            v = numbers(words, record, tl.arange(0, BN) % 16, VALUES, W, BN, VALUE_DTYPE)
            result = dot((weights * value_scale[None, :]).to(VALUE_DTYPE), v, result * factor[:, None])
        result = unrotate(result, signs, HEAD_DIM, D, BM, 3 if WIDE else 2)

    if FRESH:
        q = tl.load(query_rows[:, None] + d[None, :], mask=valid[:, None] & (d < HEAD_DIM)[None, :], other=0.0)
        begin = 0
        if WINDOW:
            begin = tl.maximum(first_index - window + 1, 0) // BN * BN
        for start in tl.range(begin, tl.where(seq_len > 0, end_index, 0), BN, num_stages=STAGES):
            column = start + tl.arange(0, BN)
            real = column < query_len
            source = (query_start + column).to(tl.int64)
            k = _load_raw(key + source * stride_key_token + kv_head * stride_key_head, real, HEAD_DIM, D)
            scores = dot(q, tl.trans(k).to(q.dtype), tl.zeros([BM, BN], tl.float32)) * to_score
            scores = capped(scores, soft_cap, SOFT_CAP)
            scores = tl.where(visible(index, column, window, WINDOW) & real[None, :], scores, float("-inf"))
            weights, factor, maximum, total = online_softmax(scores, maximum, total)
            v = _load_raw(value + source * stride_value_token + kv_head * stride_value_head, real, HEAD_DIM, D)
            result = dot(weights.to(v.dtype), v, result * factor[:, None])

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
    wide = query.dtype == torch.float32  # products on the FMA units, with operands in shared memory: small tiles
    BM = 16 if rows <= 16 or wide else 32 if rows <= 32 else 64 if rows <= 512 or W > 16 else 128
    lookup = not wide and not INTERPRETED
    keys, values = key_codes(page, tl.float16 if lookup else None), value_codes(page, tl.bfloat16 if lookup else None)
    fresh = key is not None
    key, value = (key, value) if fresh else (query, query)
    offset = query if key_offset is None else key_offset
    prefill_kernel[(triton.cdiv(rows, BM), num_kv_heads, len(seq_lens))](
        query, key, value, kv_cache, block_table, seq_lens, query_start_loc, offset,
        query if sinks is None else sinks, sign_matrix(head_dim, 8 * W, query.device), out, query if lse is None else lse,
        offset.shape[0], sliding_window, softmax_scale, logits_soft_cap,
        kv_cache.stride(0) // 16, kv_cache.stride(1) // 16, block_table.stride(0), query.stride(0), query.stride(1),
        key.stride(0), key.stride(1), value.stride(0), value.stride(1), offset.stride(0), offset.stride(1),
        out.stride(0), out.stride(1), 0 if lse is None else lse.stride(0),
        keys, values, block_size, page.tile_bytes, group, head_dim, W, BM, BN,
        fresh, key_offset is not None, sinks is not None, sliding_window > 0, logits_soft_cap > 0, lse is not None,
        STAGES=1 if wide or W > 16 else 2, num_warps=8 if BM == 128 or W > 16 else 4,
    )  # fmt: skip
