"""Attention of few query rows over codes: split over the context, one program per (split, KV head).

All query heads of a KV head and all query tokens of a request share a program, which reads each code once. The splits
are planned on the device from seq_lens, over a grid that depends on host numbers alone, so that a CUDA graph stays
right when the lengths change; merge.py adds up the splits.
"""

import torch
import triton
import triton.language as tl

from tq_vllm.format import SEGMENT_TOKENS, TurboQuantPage
from tq_vllm.triton_kernels.codes import (
    column_tokens,
    key_codes,
    load_scales,
    lookup,
    numbers,
    sketch_codes,
    tile_records,
    value_codes,
)
from tq_vllm.triton_kernels.dot import INTERPRETED, dot
from tq_vllm.triton_kernels.merge import merge_splits
from tq_vllm.triton_kernels.rotation import rotate_queries
from tq_vllm.triton_kernels.softmax import NOTHING, capped, online_softmax, score_scale, visible
from tq_vllm.triton_kernels.split import tiles_of

MAX_ROWS = 64  # query tokens of a request times query heads of a KV head
PROGRAMS = {2: 6, 4: 4}  # of each number of warps, per multiprocessor: the best of 4 to 16 at 32x8192 and 1x131072
BN = SEGMENT_TOKENS  # tokens of a tile: the key offset is one number over it


@triton.jit
def decode_kernel(
    rotated,  # f16 or f32 [num_tokens, num_heads, 8 W], rows of largest magnitude 1, in the space of the codes
    rotated_scales,  # f32 [num_tokens, num_heads]
    sketched, sketched_scales,  # the same in the space of the key sketches, read for SKETCH
    query,  # [num_tokens, num_heads, HEAD_DIM], read for the key offset
    cache,  # uint8, see format.py
    block_table,  # int32 [num_reqs, max_blocks]
    seq_lens,  # int32 [num_reqs]
    query_start_loc,  # int32 [num_reqs + 1]
    key_offset,  # [num_segments, num_kv_heads, HEAD_DIM]
    split_out,  # f32 [num_items, num_kv_heads, ROWS, 8 W], in the space of the codes; ROWS = max_query_len * GROUP
    split_lse,  # f32 [num_items, num_kv_heads, ROWS], base 2
    num_reqs, programs, max_rows, num_segments, window, softmax_scale, soft_cap,
    stride_block, stride_head,  # of the cache, in 16 bytes
    stride_table, stride_query_token, stride_query_head, stride_segment, stride_offset_head,
    KEYS: tl.constexpr, VALUES: tl.constexpr, LOOKUP_KEYS: tl.constexpr, LOOKUP_VALUES: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, TILE_BYTES: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    W: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, REQS: tl.constexpr,
    OFFSET: tl.constexpr, WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr, STAGES: tl.constexpr,
    SKETCHES: tl.constexpr, SKETCH: tl.constexpr,  # codes of the key sketches, and whether there are any
):  # fmt: skip
    item = tl.program_id(0)
    kv_head = tl.program_id(1)
    num_kv_heads = tl.num_programs(1)
    request, first_tile, end_tile = tiles_of(
        item, seq_lens, query_start_loc, num_reqs, programs, window, REQS, BN, WINDOW
    )
    if request >= num_reqs:
        return
    seq_len = tl.load(seq_lens + request)
    query_start = tl.load(query_start_loc + request)
    query_len = tl.load(query_start_loc + request + 1) - query_start

    row = tl.arange(0, BM)
    valid = row < query_len * GROUP
    token = query_start + row // GROUP
    head = kv_head * GROUP + row % GROUP
    position = seq_len - query_len + row // GROUP
    query_row = tl.where(valid, token * (num_kv_heads * GROUP) + head, 0).to(tl.int64)
    scale = score_scale(softmax_scale, SOFT_CAP)
    row_scale = tl.load(rotated_scales + query_row) * (scale * KEYS.unit)

    D: tl.constexpr = 8 * W
    DTYPE: tl.constexpr = rotated.dtype.element_ty
    WEIGHTS: tl.constexpr = tl.float32 if tl.float32 == DTYPE else tl.bfloat16
    group = tl.arange(0, W)
    if LOOKUP_KEYS:
        at = rotated + query_row[:, None] * D + 8 * group[None, :]
        q0 = tl.load(at)
        q1 = tl.load(at + 1)
        q2 = tl.load(at + 2)
        q3 = tl.load(at + 3)
        q4 = tl.load(at + 4)
        q5 = tl.load(at + 5)
        q6 = tl.load(at + 6)
        q7 = tl.load(at + 7)
    else:
        q = tl.load(rotated + query_row[:, None] * D + tl.arange(0, D)[None, :])
    if SKETCH:
        sketch_scale = tl.load(sketched_scales + query_row) * scale
        if LOOKUP_KEYS:
            at = sketched + query_row[:, None] * D + 8 * group[None, :]
            p0 = tl.load(at)
            p1 = tl.load(at + 1)
            p2 = tl.load(at + 2)
            p3 = tl.load(at + 3)
            p4 = tl.load(at + 4)
            p5 = tl.load(at + 5)
            p6 = tl.load(at + 6)
            p7 = tl.load(at + 7)
        else:
            p = tl.load(sketched + query_row[:, None] * D + tl.arange(0, D)[None, :])
    if OFFSET:
        d = tl.arange(0, D)
        raw = tl.load(
            query + token.to(tl.int64)[:, None] * stride_query_token + head[:, None] * stride_query_head + d[None, :],
            mask=valid[:, None] & (d < HEAD_DIM)[None, :], other=0.0,
        ).to(tl.float32) * scale  # fmt: skip

    NATURAL: tl.constexpr = OFFSET or SOFT_CAP or SKETCH  # scores are scaled before the softmax, not by it
    unit_scale = row_scale
    if NATURAL:
        unit_scale = tl.full([BM], 1.0, tl.float32)
    maximum = tl.full([BM], NOTHING, tl.float32)
    total = tl.zeros([BM], tl.float32)
    if LOOKUP_VALUES:
        o0 = tl.zeros([BM, W], tl.float32)
        o1 = tl.zeros([BM, W], tl.float32)
        o2 = tl.zeros([BM, W], tl.float32)
        o3 = tl.zeros([BM, W], tl.float32)
        o4 = tl.zeros([BM, W], tl.float32)
        o5 = tl.zeros([BM, W], tl.float32)
        o6 = tl.zeros([BM, W], tl.float32)
        o7 = tl.zeros([BM, W], tl.float32)
    else:
        o = tl.zeros([BM, D], tl.float32)

    block_row = block_table + request.to(tl.int64) * stride_table
    words = cache.to(tl.pointer_type(tl.int32))
    in_record, in_tile = column_tokens(BN)
    for tile in tl.range(first_tile, end_tile, num_stages=STAGES):
        start = tile * BN
        record = tile_records(block_row, start, seq_len, kv_head, stride_block, stride_head,
                              BLOCK_SIZE, TILE_BYTES, BN, BN)  # fmt: skip
        pairs = tile_records(block_row, start, seq_len, kv_head, stride_block, stride_head,
                             BLOCK_SIZE, TILE_BYTES, BN, BN // 2)  # fmt: skip
        key_scale = load_scales(words, pairs, KEYS, BN)
        value_scale = load_scales(words, pairs, VALUES, BN)
        real = start + in_tile < seq_len  # others hold anything, NaN included
        if WINDOW:
            real = real & (start + in_tile > seq_len - query_len - window)
        value_scale = tl.where(real, value_scale, 0.0)
        if LOOKUP_KEYS:
            k0, k1, k2, k3, k4, k5, k6, k7 = lookup(words, record, in_record, KEYS, W, True)
            scores = dot(q0, k0, tl.zeros([BM, BN], tl.float32))
            scores = dot(q1, k1, scores)
            scores = dot(q2, k2, scores)
            scores = dot(q3, k3, scores)
            scores = dot(q4, k4, scores)
            scores = dot(q5, k5, scores)
            scores = dot(q6, k6, scores)
            scores = dot(q7, k7, scores)
        else:
            k = numbers(words, record, in_record, KEYS, W, BN, DTYPE)
            scores = dot(q, tl.trans(k), tl.zeros([BM, BN], tl.float32))
        scores = scores * key_scale[None, :]
        if NATURAL:
            scores = scores * row_scale[:, None]
        if SKETCH:
            if LOOKUP_KEYS:
                s0, s1, s2, s3, s4, s5, s6, s7 = lookup(words, record, in_record, SKETCHES, W, True)
                more = dot(p0, s0, tl.zeros([BM, BN], tl.float32))
                more = dot(p1, s1, more)
                more = dot(p2, s2, more)
                more = dot(p3, s3, more)
                more = dot(p4, s4, more)
                more = dot(p5, s5, more)
                more = dot(p6, s6, more)
                more = dot(p7, s7, more)
            else:
                signs = numbers(words, record, in_record, SKETCHES, W, BN, DTYPE)
                more = dot(p, tl.trans(signs), tl.zeros([BM, BN], tl.float32))
            scores += more * load_scales(words, pairs, SKETCHES, BN)[None, :] * sketch_scale[:, None]
        if OFFSET:
            segment = tl.minimum(tile, num_segments - 1).to(tl.int64)
            offset = tl.load(key_offset + segment * stride_segment + kv_head * stride_offset_head + d,
                             mask=d < HEAD_DIM, other=0.0).to(tl.float32)  # fmt: skip
            scores += tl.sum(raw * offset[None, :], 1)[:, None]
        if SOFT_CAP:
            scores = capped(scores, soft_cap)
        scores = tl.where(visible(position, start + in_tile, window, WINDOW), scores, float("-inf"))
        weights, factor, maximum, total = online_softmax(scores, unit_scale, maximum, total)
        weights = (weights * value_scale[None, :]).to(WEIGHTS)
        if LOOKUP_VALUES:
            v0, v1, v2, v3, v4, v5, v6, v7 = lookup(
                words, record, tl.arange(0, BN) % 16, VALUES, W, False
            )
            o0 = dot(weights, v0, o0 * factor[:, None])
            o1 = dot(weights, v1, o1 * factor[:, None])
            o2 = dot(weights, v2, o2 * factor[:, None])
            o3 = dot(weights, v3, o3 * factor[:, None])
            o4 = dot(weights, v4, o4 * factor[:, None])
            o5 = dot(weights, v5, o5 * factor[:, None])
            o6 = dot(weights, v6, o6 * factor[:, None])
            o7 = dot(weights, v7, o7 * factor[:, None])
        else:
            v = numbers(words, record, tl.arange(0, BN) % 16, VALUES, W, BN, WEIGHTS)
            o = dot(weights, v, o * factor[:, None])

    split_row = (item.to(tl.int64) * num_kv_heads + kv_head) * max_rows + row
    inverse = VALUES.unit / tl.where(total > 0, total, 1.0)
    if LOOKUP_VALUES:
        at = split_out + split_row[:, None] * D + 8 * group[None, :]
        tl.store(at, o0 * inverse[:, None], mask=valid[:, None])
        tl.store(at + 1, o1 * inverse[:, None], mask=valid[:, None])
        tl.store(at + 2, o2 * inverse[:, None], mask=valid[:, None])
        tl.store(at + 3, o3 * inverse[:, None], mask=valid[:, None])
        tl.store(at + 4, o4 * inverse[:, None], mask=valid[:, None])
        tl.store(at + 5, o5 * inverse[:, None], mask=valid[:, None])
        tl.store(at + 6, o6 * inverse[:, None], mask=valid[:, None])
        tl.store(at + 7, o7 * inverse[:, None], mask=valid[:, None])
    else:
        at = split_out + split_row[:, None] * D + tl.arange(0, D)[None, :]
        tl.store(at, o * inverse[:, None], mask=valid[:, None])
    tl.store(split_lse + split_row, tl.where(total > 0, maximum + tl.log2(total), float("-inf")), mask=valid)


def programs_of(device: torch.device, num_kv_heads: int, warps: int) -> int:
    """Splits a KV head should get, so that together they fill the device; few in the interpreter."""
    if device.type != "cuda":
        return 2
    properties = torch.cuda.get_device_properties(device)
    return max(1, properties.multi_processor_count * PROGRAMS[warps] // num_kv_heads)


def stages_of(tile_bytes: int) -> int:
    """Stages of the software pipeline: n tiles in flight take 2 n + 1, as a tile waits for its block's number."""
    return 7 if 3 * tile_bytes <= 32768 else 5 if 2 * tile_bytes <= 32768 else 3


def decode(
    query, kv_cache, block_table, seq_lens, query_start_loc, key_offset, sinks, out, lse,
    softmax_scale: float, max_query_len: int, sliding_window: int, logits_soft_cap: float, page: TurboQuantPage,
) -> None:  # fmt: skip
    """Attend up to MAX_ROWS query rows per request and KV head to codes; arguments as in ops/schema.py."""
    num_heads, head_dim = query.shape[1:]
    num_reqs, (num_kv_heads, block_size) = len(seq_lens), kv_cache.shape[1:3]
    group = num_heads // num_kv_heads
    W = triton.next_power_of_2(head_dim // 8)
    wide = query.dtype == torch.float32
    by_table = not wide and not INTERPRETED
    keys = key_codes(page, tl.float16 if by_table else None)
    values = value_codes(page, tl.bfloat16 if by_table else None)
    max_rows = max_query_len * group
    lookups = W >= 16  # a tensor-core product takes 16 words at least
    warps = 2 if lookups and keys.asm and values.asm else 4
    stages = 1 if wide else stages_of(BN * page.slot_bytes)
    programs = programs_of(query.device, num_kv_heads, warps)
    num_items = programs + num_reqs
    REQS = triton.next_power_of_2(num_reqs)

    sketch = page.config.key_sketch
    sketches = sketch_codes(page, tl.float16 if by_table else None) if sketch else keys
    rotated, scales, sketched, sketched_scales = rotate_queries(query, 8 * W, sketch)
    split_out = torch.empty(num_items, num_kv_heads, max_rows, 8 * W, dtype=torch.float32, device=query.device)
    split_lse = torch.empty(num_items, num_kv_heads, max_rows, dtype=torch.float32, device=query.device)
    offset = query if key_offset is None else key_offset
    decode_kernel[(num_items, num_kv_heads)](
        rotated, scales, sketched, sketched_scales, query, kv_cache, block_table, seq_lens, query_start_loc, offset,
        split_out, split_lse,
        num_reqs, programs, max_rows, offset.shape[0], sliding_window, softmax_scale, logits_soft_cap,
        kv_cache.stride(0) // 16, kv_cache.stride(1) // 16, block_table.stride(0), query.stride(0), query.stride(1),
        offset.stride(0), offset.stride(1),
        keys, values, lookups and keys.asm != "", lookups and values.asm != "", block_size, page.tile_bytes, group,
        head_dim, W, max(8, triton.next_power_of_2(max_rows)), BN, REQS,
        key_offset is not None, sliding_window > 0, logits_soft_cap > 0, STAGES=stages,
        SKETCHES=sketches, SKETCH=sketch, num_warps=warps,
    )  # fmt: skip
    merge_splits(
        split_out, split_lse, seq_lens, query_start_loc, sinks, out, lse, programs, max_query_len, sliding_window, BN
    )
