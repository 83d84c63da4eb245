"""A kernel that only decodes: the numbers of one block, as the attention kernels see them."""

import triton
import triton.language as tl

from tq_vllm.triton_kernels.codes import column_tokens, load_scales, lookup, numbers, tile_records


@triton.jit
def decoded_kernel(
    cache,  # uint8 [1, num_kv_heads, 64, slot_bytes]
    block_table,  # int32 [1, 1]
    out,  # f32 [num_kv_heads, 64, 8 W], scaled
    planes,  # f32 [num_kv_heads, 64, 8 W], by `lookup` of words that stand first; written where CODES has it
    stride_block, stride_head,
    CODES: tl.constexpr, VALUES: tl.constexpr, TILE_BYTES: tl.constexpr, W: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    record = tile_records(block_table, 0, 64, head, stride_block, stride_head, 64, TILE_BYTES, 64, 64)
    pairs = tile_records(block_table, 0, 64, head, stride_block, stride_head, 64, TILE_BYTES, 64, 32)
    in_record, in_tile = column_tokens(64)
    place = in_record
    if VALUES:
        place = tl.arange(0, 64) % 16
    words = cache.to(tl.pointer_type(tl.int32))
    scale = load_scales(words, pairs, CODES, 64) * CODES.unit
    decoded = numbers(words, record, place, CODES, W, 64, DTYPE).to(tl.float32) * scale[:, None]
    at = head * 64 + in_tile
    tl.store(out + at[:, None] * 8 * W + tl.arange(0, 8 * W)[None, :], decoded)
    if CODES.asm != "":
        group = tl.arange(0, W)[:, None]
        n0, n1, n2, n3, n4, n5, n6, n7 = lookup(words, record, place, CODES, W, True)
        first = planes + at[None, :] * 8 * W + 8 * group
        tl.store(first, n0.to(tl.float32) * scale[None, :])
        tl.store(first + 1, n1.to(tl.float32) * scale[None, :])
        tl.store(first + 2, n2.to(tl.float32) * scale[None, :])
        tl.store(first + 3, n3.to(tl.float32) * scale[None, :])
        tl.store(first + 4, n4.to(tl.float32) * scale[None, :])
        tl.store(first + 5, n5.to(tl.float32) * scale[None, :])
        tl.store(first + 6, n6.to(tl.float32) * scale[None, :])
        tl.store(first + 7, n7.to(tl.float32) * scale[None, :])
