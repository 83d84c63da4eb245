"""Codes and raw tokens side by side as 16-bit keys and values, for a kernel that attends dense sequences.

The prefix of every request is decoded, rotated back, and its key offset added again; what comes out is what the codes
mean in the model's own space. Prefixes are laid one after the other along a line of tokens, a slice of which is written
at a time, so that the buffer is bounded whatever the context.
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
from tq_vllm.triton_kernels.rotation import sign_matrix, sketch_matrix, unrotate

BN = SEGMENT_TOKENS  # tokens of a program: the key offset is one vector over it
EVERYTHING = 2**31 - 1  # no prefix is longer
# Arguments that change from step to step: a kernel is compiled once, while the engine warms up.
CHANGING = (
    "num_reqs", "num_passes", "slice_tokens", "slice_start", "slice_end", "num_segments", "stride_table", "newest",
)  # fmt: skip
UNALIGNED = ("block_table", "seq_lens", "query_start_loc", "starts", "bounds")  # parts of larger tensors


REQUEST_SIZES = (16, 128, 1024)  # lanes that stand for requests: each number compiles a kernel


def padded_requests(num_reqs: int) -> int:
    """Return the lanes for num_reqs requests: the next of REQUEST_SIZES, or the next power of two past them."""
    return next((n for n in REQUEST_SIZES if n >= num_reqs), 0) or triton.next_power_of_2(num_reqs)


@triton.jit
def prefixes(seq_lens, query_start_loc, num_reqs, window,
             REQS: tl.constexpr, BN: tl.constexpr, WINDOW: tl.constexpr):  # fmt: skip
    """First token of the prefix that a request still sees (a multiple of BN), tokens from there to the prefix's end,
    and tokens of this step: int32 [REQS] each. A request of length 0 has none."""
    request = tl.arange(0, REQS)
    real = request < num_reqs
    seq_len = tl.load(seq_lens + request, mask=real, other=0)
    query_len = tl.load(query_start_loc + request + 1, mask=real, other=0)
    query_len -= tl.load(query_start_loc + request, mask=real, other=0)
    context_len = tl.maximum(seq_len - query_len, 0)
    first = tl.zeros([REQS], tl.int32)
    if WINDOW:
        first = tl.maximum(context_len - window + 1, 0) // BN * BN
    return first, context_len - first, tl.where(seq_len > 0, query_len, 0)


@triton.jit(do_not_specialize=CHANGING, do_not_specialize_on_alignment=UNALIGNED)
def plan_kernel(
    seq_lens,  # int32 [num_reqs]
    query_start_loc,  # int32 [num_reqs + 1]
    starts,  # int32 [num_reqs]: where on the line a request's prefix begins
    bounds,  # int32 [num_passes, num_reqs + 1]: cumulative tokens of each pass; the last one has this step's tokens
    num_reqs, num_passes, slice_tokens, window,
    JOINED: tl.constexpr,  # one pass: every prefix is followed by its request's tokens of this step
    REQS: tl.constexpr, BN: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    request = tl.arange(0, REQS)
    real = request < num_reqs
    _, context_len, query_len = prefixes(seq_lens, query_start_loc, num_reqs, window, REQS, BN, WINDOW)
    length = context_len + query_len if JOINED else context_len
    end = tl.cumsum(length, 0)
    tl.store(starts + request, end - length, mask=real)
    if not JOINED:
        for i in range(num_passes - 1):
            row = bounds + i * (num_reqs + 1)
            tl.store(row, 0)
            in_slice = tl.minimum(tl.maximum(end - i * slice_tokens, 0), slice_tokens)
            tl.store(row + 1 + request, in_slice, mask=real)
        end = tl.cumsum(query_len, 0)
    row = bounds + (num_passes - 1) * (num_reqs + 1)
    tl.store(row, 0)
    tl.store(row + 1 + request, end, mask=real)


@triton.jit
def _rotated_back(x, signs, HEAD_DIM: tl.constexpr, D: tl.constexpr, BN: tl.constexpr):
    """Integers x [BN, D] in 16 bits, in the space of the codes -> f32 [BN, D], exact, in the space of the model."""
    if D <= 128:
        matrix = tl.load(signs + tl.arange(0, D)[:, None] * D + tl.arange(0, D)[None, :]).to(tl.float32).to(x.dtype)
        product = dot(x, matrix, tl.zeros([BN, D], tl.float32))
    else:  # halves, so that the matrix fits into shared memory
        low, high = tl.split(tl.permute(tl.reshape(x, [BN, 2, D // 2]), [0, 2, 1]))
        at = signs + tl.arange(0, D // 2)[:, None] * D + tl.arange(0, D)[None, :]
        product = dot(low, tl.load(at).to(tl.float32).to(x.dtype), tl.zeros([BN, D], tl.float32))
        product = dot(high, tl.load(at + D // 2 * D).to(tl.float32).to(x.dtype), product)
    return product * (1.0 / HEAD_DIM**0.5)


@triton.jit(do_not_specialize=CHANGING, do_not_specialize_on_alignment=UNALIGNED)
def dequantize_kernel(
    cache,  # uint8, see format.py
    block_table,  # int32 [num_reqs, max_blocks]
    seq_lens,  # int32 [num_reqs]
    query_start_loc,  # int32 [num_reqs + 1]
    starts,  # int32 [num_reqs]
    key_offset,  # [num_segments, num_kv_heads, HEAD_DIM], read for OFFSET
    signs,  # bf16 [D, D]
    sketch,  # bf16 [D, D] from sketch_matrix, read for SKETCH
    keys, values,  # [workspace tokens, num_kv_heads, HEAD_DIM]
    num_reqs, slice_start, slice_end, num_segments, window, newest,
    stride_block, stride_head,  # of the cache, in 16 bytes
    stride_table, stride_segment, stride_offset_head,
    KEYS: tl.constexpr, VALUES: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE_BYTES: tl.constexpr,
    HEAD_DIM: tl.constexpr, W: tl.constexpr, REQS: tl.constexpr, BN: tl.constexpr,
    OFFSET: tl.constexpr, WINDOW: tl.constexpr, WIDE: tl.constexpr,
    SKETCHES: tl.constexpr, SKETCH: tl.constexpr,  # codes of the key sketches, and whether there are any
):  # fmt: skip
    """One program a (tile of BN tokens of a prefix, KV head); writes tokens slice_start .. slice_end of the line, of
    each prefix the newest `newest` alone."""
    head = tl.program_id(1)
    num_kv_heads = tl.num_programs(1)
    first, context_len, _ = prefixes(seq_lens, query_start_loc, num_reqs, window, REQS, BN, WINDOW)
    tiles = tl.cdiv(context_len, BN)
    ends = tl.cumsum(tiles, 0)
    request = tl.sum((ends <= tl.program_id(0)).to(tl.int32), 0)
    if request >= num_reqs:
        return
    mine = tl.arange(0, REQS) == request
    tile = tl.program_id(0) - tl.sum(tl.where(mine, ends - tiles, 0), 0)
    length = tl.sum(tl.where(mine, context_len, 0), 0)
    first = tl.sum(tl.where(mine, first, 0), 0)
    line = tl.load(starts + request) + tile * BN  # of the tile's first token
    oldest = length - newest  # counted from `first`, as the tile's tokens are
    if (line >= slice_end) | (line + BN <= slice_start) | (tile * BN + BN <= oldest):
        return

    D: tl.constexpr = 8 * W
    DTYPE: tl.constexpr = tl.float32 if WIDE else tl.bfloat16
    d = tl.arange(0, D)
    block_row = block_table + request.to(tl.int64) * stride_table
    words = cache.to(tl.pointer_type(tl.int32))
    in_record, in_tile = column_tokens(BN)
    start = first + tile * BN
    end = first + length
    record = tile_records(block_row, start, end, head, stride_block, stride_head, BLOCK_SIZE, TILE_BYTES, BN, BN)
    pairs = tile_records(block_row, start, end, head, stride_block, stride_head, BLOCK_SIZE, TILE_BYTES, BN, BN // 2)
    target = line + in_tile
    written = (start + in_tile < end) & (target >= slice_start) & (target < slice_end)
    written = written & (tile * BN + in_tile >= oldest)
    at = ((target - slice_start).to(tl.int64) * num_kv_heads + head)[:, None] * HEAD_DIM + d[None, :]
    mask = written[:, None] & (d < HEAD_DIM)[None, :]

    k = numbers(words, record, in_record, KEYS, W, BN, DTYPE)
    key_scale = (load_scales(words, pairs, KEYS, BN) * KEYS.unit)[:, None]
    if SKETCH:  # both parts go through the rotation as one, so that no two of its matrices are in shared memory
        s = _rotated_back(numbers(words, record, in_record, SKETCHES, W, BN, DTYPE), sketch, HEAD_DIM, D, BN)
        k = k.to(tl.float32) * key_scale + s * load_scales(words, pairs, SKETCHES, BN)[:, None]
        k = unrotate(k, signs, HEAD_DIM, D, BN, 3 if WIDE else 2)
    else:
        k = _rotated_back(k, signs, HEAD_DIM, D, BN) * key_scale
    if OFFSET:
        segment = tl.minimum(start // BN, num_segments - 1).to(tl.int64)
        offset = key_offset + segment * stride_segment + head * stride_offset_head + d
        k += tl.load(offset, mask=d < HEAD_DIM, other=0.0).to(tl.float32)[None, :]
    if WINDOW:  # what it has left behind may hold anything, NaN included
        held = (start + in_tile > end - window)[:, None]
        k = tl.where(held, k, 0.0)
    tl.store(keys + at, k.to(keys.dtype.element_ty), mask=mask)

    v = numbers(words, record, tl.arange(0, BN) % 16, VALUES, W, BN, DTYPE)
    v = _rotated_back(v, signs, HEAD_DIM, D, BN)
    v = v * (load_scales(words, pairs, VALUES, BN) * VALUES.unit)[:, None]
    if WINDOW:
        v = tl.where(held, v, 0.0)
    tl.store(values + at, v.to(values.dtype.element_ty), mask=mask)


@triton.jit
def _finite(x):
    """Rows of x [BN, D] whose squared norm is finite in f32, the others as zeros: what the cache stores."""
    wide = x.to(tl.float32)
    norm = tl.sum(wide * wide, 1)
    return tl.where((norm * 0.0 == 0.0)[:, None], x, 0.0).to(x.dtype)


@triton.jit(do_not_specialize=CHANGING, do_not_specialize_on_alignment=UNALIGNED)
def place_kernel(
    key, value,  # [num_tokens, num_kv_heads, HEAD_DIM]
    seq_lens,  # int32 [num_reqs]
    query_start_loc,  # int32 [num_reqs + 1]
    bounds,  # int32 [num_reqs + 1]: of the pass, in which this step's tokens stand last in each request
    keys, values,  # [workspace tokens, num_kv_heads, HEAD_DIM]
    num_reqs, stride_key_token, stride_key_head, stride_value_token, stride_value_head,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, REQS: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Copy this step's tokens to their places; one program a (BN tokens, KV head)."""
    token = tl.program_id(0) * BN + tl.arange(0, BN)
    head = tl.program_id(1)
    num_kv_heads = tl.num_programs(1)
    request = tl.arange(0, REQS)
    query_end = tl.load(query_start_loc + 1 + request, mask=request < num_reqs, other=2147483647)
    of_token = tl.sum((query_end[None, :] <= token[:, None]).to(tl.int32), 1)  # [BN]
    real = of_token < num_reqs
    of_token = tl.where(real, of_token, 0)
    real = real & (tl.load(seq_lens + of_token) > 0)
    from_end = tl.load(query_start_loc + of_token + 1) - token
    target = tl.load(bounds + of_token + 1) - from_end
    d = tl.arange(0, D)
    mask = real[:, None] & (d < HEAD_DIM)[None, :]
    token = token.to(tl.int64)[:, None]
    k = tl.load(key + token * stride_key_token + head * stride_key_head + d[None, :], mask=mask, other=0.0)
    v = tl.load(value + token * stride_value_token + head * stride_value_head + d[None, :], mask=mask, other=0.0)
    at = (target.to(tl.int64) * num_kv_heads + head)[:, None] * HEAD_DIM + d[None, :]
    tl.store(keys + at, _finite(k), mask=mask)
    tl.store(values + at, _finite(v), mask=mask)


def plan(
    seq_lens: torch.Tensor, query_start_loc: torch.Tensor, num_passes: int, slice_tokens: int, sliding_window: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Lay out prefixes and this step's tokens on the device.

    Args:
        num_passes: 1: prefix and tokens of this step together; else a pass for every `slice_tokens` of the line of
            prefixes, and a last one of this step's tokens alone.

    Returns:
        starts int32 [num_reqs] (tokens), bounds int32 [num_passes, num_reqs + 1].
    """
    num_reqs = len(seq_lens)
    starts = torch.empty(num_reqs, dtype=torch.int32, device=seq_lens.device)
    bounds = torch.empty(num_passes, num_reqs + 1, dtype=torch.int32, device=seq_lens.device)
    plan_kernel[(1,)](
        seq_lens, query_start_loc, starts, bounds, num_reqs, num_passes, slice_tokens, sliding_window,
        num_passes == 1, padded_requests(num_reqs), BN, sliding_window > 0, num_warps=4,
    )  # fmt: skip
    return starts, bounds


def dequantize(
    kv_cache, block_table, seq_lens, query_start_loc, starts, key_offset, keys, values, first: int, last: int,
    context_tokens: int, sliding_window: int, page: TurboQuantPage, newest: int = EVERYTHING,
) -> None:  # fmt: skip
    """Write tokens first .. last of the line of prefixes to the start of keys and values.

    Args:
        starts: of `plan`.
        keys, values: [at least last - first, num_kv_heads, head_dim], contiguous.
        context_tokens: upper bound of the tokens of all prefixes.
        newest: how many of each prefix, from its end; the others stay as they are.
    """
    num_reqs, num_kv_heads, block_size = len(seq_lens), *kv_cache.shape[1:3]
    head_dim = page.head_dim
    W = triton.next_power_of_2(head_dim // 8)
    wide = keys.dtype == torch.float32 or INTERPRETED
    lookup = None if wide else tl.bfloat16
    offset = keys if key_offset is None else key_offset
    codes, sketch = key_codes(page, lookup), page.config.key_sketch
    signs = sign_matrix(head_dim, 8 * W, keys.device)
    # Keys with sketches keep two f32 tiles: at the largest heads too many registers for 4 warps.
    dequantize_kernel[(-(-context_tokens // BN) + num_reqs, num_kv_heads)](
        kv_cache, block_table, seq_lens, query_start_loc, starts, offset, signs,
        sketch_matrix(head_dim, 8 * W, keys.device) if sketch else signs, keys, values,
        num_reqs, first, last, offset.shape[0], sliding_window, newest,
        kv_cache.stride(0) // 16, kv_cache.stride(1) // 16, block_table.stride(0), offset.stride(0), offset.stride(1),
        codes, value_codes(page, lookup), block_size, page.tile_bytes, head_dim, W,
        padded_requests(num_reqs), BN, key_offset is not None, sliding_window > 0, wide,
        sketch_codes(page, lookup) if sketch else codes, sketch, num_warps=8 if sketch and W > 16 else 4,
    )  # fmt: skip


def place(key, value, seq_lens, query_start_loc, bounds, keys, values) -> None:
    """Copy this step's key and value, [num_tokens, num_kv_heads, head_dim], to the places that `bounds`, int32
    [num_reqs + 1], gives them in keys and values; vectors that the cache would store as zero become zero."""
    num_tokens, num_kv_heads, head_dim = key.shape
    place_kernel[(-(-num_tokens // BN), num_kv_heads)](
        key, value, seq_lens, query_start_loc, bounds, keys, values, len(seq_lens), key.stride(0), key.stride(1),
        value.stride(0), value.stride(1), head_dim, triton.next_power_of_2(head_dim),
        padded_requests(len(seq_lens)), BN, num_warps=4,
    )  # fmt: skip
