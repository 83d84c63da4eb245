"""Codes of a tile of keys or values -> centroids in units of the page codebook, for every plane of format.py.

A tile is BN consecutive tokens of one request and one KV head; BN is a multiple of 16 and the tile starts at a multiple
of BN. Its *columns* are the tokens in the order in which value words hold them (`column_tokens`), for keys too: then
scores and values agree, and value loads are contiguous. A *group* is 8 consecutive coordinates, one word of plane 4.

All widths but 8 (width 1: the signs of a key sketch) are first brought into *nibble form*, the word of plane 4 in
format.py: a table index at bits 4k .. 4k+2 and a sign bit for coordinate k of the group. Of trellis codes the index
counts the levels upwards and the sign bit is its fourth bit. From there two ways lead to numbers: `expand`, plain
Triton, for every width; and `lookup`, where one `prmt` takes four table entries, for LOOKUP_BITS. Both give the same
numbers.
"""

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from tq_vllm.config import TRELLIS
from tq_vllm.core.codebook_tables import PAGE_LEVELS, PAGE_UNIT, TRELLIS_LEVELS, TRELLIS_UNIT
from tq_vllm.format import TILE_TOKENS, TurboQuantPage

TRELLIS_2, TRELLIS_3 = tl.constexpr(TRELLIS + 2), tl.constexpr(TRELLIS + 3)
LOOKUP_BITS = (1, 2, 3, 4, 5, TRELLIS + 2, TRELLIS + 3)


@dataclass(frozen=True)
class Codes:
    """Compile-time facts about the keys or the values of a page; offsets and strides in 32-bit words.

    Attributes:
        bits: width of a code, a key of format.PLANES.
        offset0, offset1: of the planes in a tile record (offset1: of plane 1; 0 where there is none).
        token0, token1: from a token to the next in each plane.
        word: from a word of a token to its next.
        scale: offset of the scales in a tile record, in f16.
        groups: head_dim / 8.
        table: entries e of the page codebook, a centroid is (2 e + 1) * unit; four signed bytes to an int. Indexed by
            the magnitude's index, for 2 bits by the code; of trellis codes all levels in rising order.
        unit: of a centroid.
        asm: PTX of `lookup`, or "": use `expand`.
        dtypes: of the eight results of `lookup`.
    """

    bits: int
    offset0: int
    offset1: int
    token0: int
    token1: int
    word: int
    scale: int
    groups: int
    table: tuple[int, ...]
    unit: float
    asm: str
    dtypes: tuple[tl.dtype, ...]


@functools.cache
def key_codes(page: TurboQuantPage, lookup_dtype: tl.dtype | None) -> Codes:
    """Facts about a page's keys; `lookup_dtype` is the 16-bit dtype that `lookup` gives, None: use `expand`."""
    first, last = page.key_sections[0], page.key_sections[-1]
    return Codes(
        page.config.key_width, first.offset // 4, last.offset // 4, first.words, last.words, 1,
        page.key_scale_offset // 2, page.head_dim // 8, *_codebook(page.config.key_width, lookup_dtype),
    )  # fmt: skip


@functools.cache
def value_codes(page: TurboQuantPage, lookup_dtype: tl.dtype | None) -> Codes:
    """The same of its values. Their words are transposed: token0 and token1 step through columns."""
    first, last = page.value_sections[0], page.value_sections[-1]
    return Codes(
        page.config.value_width, first.offset // 4, last.offset // 4, 1, 1, TILE_TOKENS,
        page.value_scale_offset // 2, page.head_dim // 8, *_codebook(page.config.value_width, lookup_dtype),
    )  # fmt: skip


@functools.cache
def sketch_codes(page: TurboQuantPage, lookup_dtype: tl.dtype | None) -> Codes:
    """The same of its key sketches: numbers are +1 and -1."""
    (plane,) = page.sketch_sections
    return Codes(
        1, plane.offset // 4, plane.offset // 4, plane.words, plane.words, 1, page.sketch_scale_offset // 2,
        page.head_dim // 8, *_codebook(1, lookup_dtype),
    )  # fmt: skip


def _entries(bits: int) -> list[int]:
    if bits == 1:
        return [0]
    if bits > TRELLIS:
        entries = list(TRELLIS_LEVELS[bits - TRELLIS])
        return [~e for e in entries[::-1]] + entries
    entries = list(PAGE_LEVELS[bits])
    return entries + [~e for e in entries] if bits == 2 else entries  # 2 * ~e + 1 = -(2 e + 1)


def _codebook(bits: int, lookup_dtype: tl.dtype | None) -> tuple[tuple[int, ...], float, str, tuple]:
    if bits == 8:
        return (), 1.0, "", ()
    entries = _entries(bits)
    words = [sum((e & 255) << 8 * j for j, e in enumerate(entries[i : i + 4])) for i in range(0, len(entries), 4)]
    table = tuple(word - (word >> 31 << 32) for word in words)
    unit = 1.0 if bits == 1 else TRELLIS_UNIT[bits - TRELLIS] if bits > TRELLIS else PAGE_UNIT[bits]
    if lookup_dtype is None or bits not in LOOKUP_BITS:
        return table, unit, "", ()
    return table, unit, lookup_asm(bits, lookup_dtype), (lookup_dtype,) * 8


def _table_bytes(entries: list[int], dtype: torch.dtype) -> list[int]:
    """Operands of `prmt`: high bytes of the numbers of entries 0..3 and 4..7, then their low bytes."""
    numbers = torch.tensor([2 * e + 1 for e in (entries * 8)[:8]], dtype=dtype).view(torch.int16).tolist()
    return [
        sum((numbers[first + i] >> shift & 255) << 8 * i for i in range(4)) for shift in (8, 0) for first in (0, 4)
    ]  # fmt: skip


def lookup_asm(bits: int, dtype: tl.dtype) -> str:
    """PTX: words $8 and $9 in nibble form -> $0 .. $7, number k of both words as a pair of dtype.

    5 bits: $10 and $11 hold the lowest bits as `_plane_1` gives them; a table of differences turns the numbers of
    even indices into those of odd ones. Trellis codes of 3 bits do the same with the lower and the upper half of
    their levels. All tables are XORed with a zero that the compiler can't see through, or it would build every
    literal anew at each use. dtype: tl.float16 or tl.bfloat16.
    """
    entries, torch_dtype = _entries(bits), torch.float16 if dtype == tl.float16 else torch.bfloat16
    halves = {5: (entries[::2], entries[1::2]), TRELLIS + 3: (entries[:8], entries[8:])}.get(bits, (entries, None))
    first = _table_bytes(halves[0], torch_dtype)
    tables = dict(zip(("t0", "t1", "u0", "u1"), first, strict=True))
    if halves[1] is not None:
        second = _table_bytes(halves[1], torch_dtype)
        tables |= {f"d{name}": one ^ two for (name, one), two in zip(tables.items(), second, strict=True)}
    code = [
        f".reg .b32 z, s, x, e, m, p, q, ha0, ha1, la0, la1, hb0, hb1, lb0, lb1, {', '.join(tables)};",
        "mov.u32 z, %lanemask_lt; shr.u32 z, z, 31;",
        *(f"xor.b32 {name}, z, 0x{value:08x};" for name, value in tables.items()),
    ]
    for word, low_bits, name in (("$8", "$10", "a"), ("$9", "$11", "b")):
        code.append(f"and.b32 s, {word}, 0x77777777;")
        for half, low_shift, sign_shift in ((0, 7, 0), (1, 6, 4)):
            high, low = f"h{name}{half}", f"l{name}{half}"
            code.append(f"prmt.b32 {high}, t0, t1, s; prmt.b32 {low}, u0, u1, s;")
            if halves[1] is not None:  # a ^ (b & c), where prmt made a byte of ones of every set bit
                chooser, shift = (low_bits, low_shift) if bits == 5 else (word, sign_shift)
                code += [
                    f"shl.b32 x, {chooser}, {shift}; prmt.b32 m, x, x, 0xba98;",
                    f"prmt.b32 e, dt0, dt1, s; lop3.b32 {high}, {high}, e, m, 0x78;",
                    f"prmt.b32 e, du0, du1, s; lop3.b32 {low}, {low}, e, m, 0x78;",
                ]
            if bits < TRELLIS:
                code += [f"shl.b32 x, {word}, {sign_shift};", f"lop3.b32 {high}, {high}, x, 0x80808080, 0x78;"]
            code.append("shr.u32 s, s, 16;")
    for half in (0, 1):
        for pair, select in ((0, "0x5140"), (1, "0x7362")):
            out = 4 * half + 2 * pair
            code += [
                f"prmt.b32 p, la{half}, ha{half}, {select}; prmt.b32 q, lb{half}, hb{half}, {select};",
                f"prmt.b32 ${out}, p, q, 0x5410; prmt.b32 ${out + 1}, p, q, 0x7632;",
            ]
    return "{ " + " ".join(code) + " }"


@triton.jit
def column_tokens(BN: tl.constexpr):
    """Token of every column of a tile, in its record (0 .. 15) and in the tile: int32 [BN] each.

    The inverse of format.value_token_order.
    """
    column = tl.arange(0, BN)
    in_record = column % 4 // 2 * 8 + column % 16 // 4 * 2 + column % 2
    return in_record, column // 16 * 16 + in_record


@triton.jit
def tile_records(block_row, start, length, kv_head, stride_block, stride_head,
                 BLOCK_SIZE: tl.constexpr, TILE_BYTES: tl.constexpr,
                 BN: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    """Where the tile records of the tile at token `start` begin: int64 [COLUMNS], 32-bit words, for its BN columns or,
    with COLUMNS = BN / 2, for pairs of columns.

    block_row: pointer to the request's row of the block table. Strides in units of 16 bytes. Columns in blocks past
    `length` get a record of block 0, so that what is loaded for them is garbage, but exists.
    """
    record = start + tl.arange(0, COLUMNS) // (16 * COLUMNS // BN) * 16  # [COLUMNS] first token of the record
    if BLOCK_SIZE % BN == 0:
        block = tl.load(block_row + start // BLOCK_SIZE).to(tl.int64)
    else:
        block = tl.load(block_row + record // BLOCK_SIZE, mask=record < length, other=0).to(tl.int64)
    in_block = record % BLOCK_SIZE // 16 * (TILE_BYTES // 4)
    return (block * stride_block + kv_head.to(tl.int64) * stride_head) * 4 + in_block


@triton.jit
def load_scales(words, pair_records, CODES: tl.constexpr, BN: tl.constexpr):
    """Stored scales of the columns, f32 [BN]: anything, NaN included, where no token was written.

    pair_records: `tile_records` of pairs of columns: their tokens are neighbours, and asynchronous copies take four
    bytes at least.
    """
    pair = tl.arange(0, BN // 2)
    both = tl.load(words + CODES.scale // 2 + pair_records + pair % 2 * 4 + pair % 8 // 2)
    even = both.to(tl.int16).to(tl.float16, bitcast=True)
    odd = (both >> 16).to(tl.int16).to(tl.float16, bitcast=True)
    return tl.reshape(tl.join(even, odd), [BN]).to(tl.float32)


@triton.jit
def _over_columns(x, WORDS_FIRST: tl.constexpr):
    """Spread what belongs to words, [N], over the columns of a [BN, N] tile, or of a [N, BN] one for WORDS_FIRST."""
    if WORDS_FIRST:
        return x[:, None]
    else:
        return x[None, :]


@triton.jit
def _load_words(plane, column, index, present, CODES: tl.constexpr, ALL: tl.constexpr, WORDS_FIRST: tl.constexpr):
    """Words `index` [N] of every column, int32 [BN, N]; without ALL, 0 where not `present` [N]."""
    at = plane + _over_columns(column, not WORDS_FIRST) + _over_columns(index * CODES.word, WORDS_FIRST)
    if ALL:
        return tl.load(at)
    else:
        return tl.load(at, mask=_over_columns(present, WORDS_FIRST), other=0)


@triton.jit
def _interleave(even, odd, WORDS_FIRST: tl.constexpr):
    """Words 0, 2, 4 .. and 1, 3, 5 .. of every column, int32 [BN, n] each -> [BN, 2 n]."""
    both = tl.join(even, odd)
    if WORDS_FIRST:
        return tl.reshape(tl.permute(both, [0, 2, 1]), [2 * even.shape[0], even.shape[1]])
    else:
        return tl.reshape(both, [even.shape[0], 2 * even.shape[1]])


@triton.jit
def _plane_1(words, record, token, CODES: tl.constexpr, W: tl.constexpr, WORDS_FIRST: tl.constexpr):
    """Bits of plane 1, int32 [BN, W]: of coordinate k at bit 8 k for k < 4, at 8 (k - 4) + 1 for the others."""
    group = tl.arange(0, W)
    word = _load_words(words + CODES.offset1, record + token * CODES.token1, group // 4, group < CODES.groups, CODES,
                       CODES.groups == W, WORDS_FIRST)  # fmt: skip
    return word >> _over_columns(group % 4 * 2, WORDS_FIRST)


@triton.jit
def _rotated(x, N: tl.constexpr):
    return (x << N) | (x >> (32 - N))


@triton.jit
def _trellis_nibbles(words, record, token, CODES: tl.constexpr, W: tl.constexpr, WORDS_FIRST: tl.constexpr):
    """Trellis codes in nibble form, as `nibbles`. Every group works out the parities of its block."""
    BLOCKS: tl.constexpr = CODES.groups // 4
    ALL: tl.constexpr = CODES.groups == W
    group = tl.arange(0, W)
    block = group % BLOCKS
    j = group // BLOCKS
    present = group < CODES.groups
    coded = _load_words(words + CODES.offset1, record + token * CODES.token1, block, present, CODES, ALL, WORDS_FIRST)
    coded = coded.to(tl.uint32, bitcast=True)
    index = block
    if CODES.bits == TRELLIS_3:
        index = 2 * block + j % 2
    uncoded = _load_words(words + CODES.offset0, record + token * CODES.token0, index, present, CODES, ALL, WORDS_FIRST)
    uncoded = uncoded.to(tl.uint32, bitcast=True)
    c0 = _rotated(coded, 2)
    c1 = coded ^ _rotated(coded, 1) ^ _rotated(coded, 3)
    shift = _over_columns(j % 4, WORDS_FIRST).to(tl.uint32)
    nibble = ((c0 >> shift) & 0x11111111) | (((c1 >> shift) & 0x11111111) << 1)
    if CODES.bits == TRELLIS_3:
        nibble |= ((uncoded >> (shift // 2 * 2)) & 0x33333333) << 2
    else:
        nibble |= ((uncoded >> shift) & 0x11111111) << 2
    return nibble.to(tl.int32, bitcast=True)


@triton.jit
def nibbles(words, record, token, CODES: tl.constexpr, W: tl.constexpr, WORDS_FIRST: tl.constexpr):
    """Codes of all widths but 8 in nibble form (of 5 bits: without the lowest), int32 [BN, W]; [W, BN] for WORDS_FIRST.

    words: the cache as int32. record: int64 [BN] from `tile_records`. token: int32 [BN], 0 .. 15: of the column in its
    record for keys, the column itself for values.
    """
    plane = words + CODES.offset0
    column = record + token * CODES.token0
    if CODES.bits >= TRELLIS_2:
        return _trellis_nibbles(words, record, token, CODES, W, WORDS_FIRST)
    elif CODES.bits == 1:
        sign = _plane_1(words, record, token, CODES, W, WORDS_FIRST)
        return ((sign << 2) & 0x08080808) | ((sign & 0x01010101) << 7)
    elif CODES.bits >= 4:
        group = tl.arange(0, W)
        return _load_words(plane, column, group, group < CODES.groups, CODES, CODES.groups == W, WORDS_FIRST)
    else:
        pair = tl.arange(0, W // 2)
        word = _load_words(plane, column, pair, 2 * pair < CODES.groups, CODES, CODES.groups == W, WORDS_FIRST)
        nibble = _interleave(word & 0x33333333, (word >> 2) & 0x33333333, WORDS_FIRST)
        if CODES.bits == 3:
            sign = _plane_1(words, record, token, CODES, W, WORDS_FIRST)
            nibble = nibble | ((sign << 2) & 0x08080808) | ((sign & 0x01010101) << 7)
        return nibble


@triton.jit
def lookup(words, record, token, CODES: tl.constexpr, W: tl.constexpr, WORDS_FIRST: tl.constexpr):
    """Eight 16-bit tensors [BN, W], or [W, BN]: number k of every group, in units of CODES.unit."""
    nibble = nibbles(words, record, token, CODES, W, WORDS_FIRST)
    if CODES.bits == 5:
        low = _plane_1(words, record, token, CODES, W, WORDS_FIRST)
        return tl.inline_asm_elementwise(CODES.asm, "=r,=r,=r,=r,=r,=r,=r,=r,r,r,r,r", [nibble, low],
                                         dtype=CODES.dtypes, is_pure=True, pack=2)  # fmt: skip
    else:
        return tl.inline_asm_elementwise(CODES.asm, "=r,=r,=r,=r,=r,=r,=r,=r,r,r", [nibble], dtype=CODES.dtypes,
                                         is_pure=True, pack=2)  # fmt: skip


@triton.jit
def expand(words, record, token, CODES: tl.constexpr, W: tl.constexpr, BN: tl.constexpr, DTYPE: tl.constexpr):
    """Numbers of a tile in units of CODES.unit: DTYPE [BN, 8 W], coordinates past the head's anything finite."""
    k = tl.arange(0, 8)[None, None, :]
    if CODES.bits == 8:
        half = tl.arange(0, 2 * W)
        word = _load_words(words + CODES.offset0, record + token * CODES.token0, half, half < 2 * CODES.groups, CODES,
                           CODES.groups == W, False)  # fmt: skip
        low, high = tl.split(tl.reshape(word, [BN, W, 2]))
        number = (tl.where(k < 4, low[:, :, None], high[:, :, None]) << (24 - k % 4 * 8)) >> 24
    else:
        word = nibbles(words, record, token, CODES, W, False)[:, :, None]
        index = (word >> (4 * k)) & 7
        if CODES.bits == 5:
            low = _plane_1(words, record, token, CODES, W, False)[:, :, None]
            index = index * 2 + ((low >> (k % 4 * 8 + k // 4)) & 1)
        negative = (word >> tl.where(k < 4, 8 * k + 7, 8 * k - 29)) & 1
        if CODES.bits == TRELLIS_3:
            index += 8 * negative
        four = tl.full([1, 1, 1], CODES.table[0], tl.int32)
        for i in tl.static_range(1, len(CODES.table)):
            four = tl.where(index >= 4 * i, CODES.table[i], four)
        entry = (four << (24 - index % 4 * 8)) >> 24
        number = 2 * entry + 1
        if CODES.bits < TRELLIS_2:
            number = tl.where(negative != 0, -number, number)
    # 1.5 * 2**23 + number, as a float's bits: several times faster than a conversion from int.
    number = (number + 0x4B400000).to(tl.float32, bitcast=True) - 12582912.0
    return tl.reshape(number.to(DTYPE), [BN, 8 * W])


@triton.jit
def numbers(words, record, token, CODES: tl.constexpr, W: tl.constexpr, BN: tl.constexpr, DTYPE: tl.constexpr):
    """Numbers of a tile as DTYPE [BN, 8 W], by `lookup` where CODES has it, else by `expand`."""
    if CODES.asm == "":
        return expand(words, record, token, CODES, W, BN, DTYPE)
    else:
        v0, v1, v2, v3, v4, v5, v6, v7 = lookup(words, record, token, CODES, W, False)
        even = tl.join(tl.join(v0, v4), tl.join(v2, v6))  # [BN, W, 2 (k / 4), 2 (k / 2 % 2)]
        odd = tl.join(tl.join(v1, v5), tl.join(v3, v7))
        return tl.reshape(tl.join(even, odd), [BN, 8 * W])
