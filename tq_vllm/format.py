"""The page: where every bit of a TurboQuant KV cache lives. The one contract between CUDA, Triton and CPU kernels.

vLLM hands a layer `kv_cache`, uint8 [num_blocks, num_kv_heads, block_size, slot_bytes]. The `block_size * slot_bytes`
bytes of one (block, head) are contiguous and hold `block_size / 16` tile records, each of 16 consecutive tokens:

    tile record, 16 * slot_bytes bytes, every section a multiple of 16 bytes
    +--------------------------------+--------------------------------+------------------+------------------+
    | key planes (1 or 2)            | value planes (1 or 2)          | key scales       | value scales     |
    | [16 tokens][words]             | [words][16 tokens, permuted]   | [16 tokens] f16  | [16 tokens] f16  |
    +--------------------------------+--------------------------------+------------------+------------------+

With a key sketch (config.key_sketch) a plane of 1 bit, the sketch's signs, laid out as a key plane, follows the key
planes, and the f16 scales of the sketch, [16 tokens], follow the value scales.

A *plane* stores a field of 8, 4, 2 or 1 bits of every coordinate of a rotated vector, in little-endian 32-bit words of
consecutive coordinates. A code of b bits is `index | sign << (b - 1)`; its fields are

    b   planes     fields                                        (index: rank of the magnitude, sign: 1 = negative)
    8   8          the signed byte itself
    5   4 and 1    4: index >> 1 and the sign     1: index & 1
    4   4          4: index and the sign
    3   2 and 1    2: index                       1: the sign
    2   2          2: the code
    1   1          1: the code, a sign (of a key sketch)
    t3  2 and 1    2: the uncoded bits     1: the coded bit         (width TRELLIS + 3: trellis codes, core/trellis.py)
    t2  1 and 1    1: the uncoded bit      1: the coded bit         (width TRELLIS + 2)

and within a word coordinate c stands at (k = c % 8):

    plane   coordinates a word   bits of coordinate c
    8       4                    8 * (c % 4) .. + 7
    4       8                    magnitude 4k .. 4k+2; sign 8k+7 for k < 4, 8(k-4)+3 for k >= 4
    2       16                   4k + 2s .. + 1, s = c / 8 % 2
    1       32                   8 * (k % 4) + 2j + k / 4, j = c / 8 % 4; where 32 does not divide d, the
                                 last word is padded

The words of trellis codes hold the blocks of the trellis instead, 32 coordinates each: block w is word w of a plane of
1 bit and words 2w, 2w + 1 of plane 2. With coordinate k of the block's j-th group at position 4k + j of the trellis,

    plane              word of the block   bits
    1, coded           0                   4k + j
    1, uncoded (t2)    0                   4k + j
    2, uncoded (t3)    j % 2               low bit 4k + 2 (j / 2); high bit: a sign's of plane 4, less 2 where j < 2

Why: `prmt` takes four nibbles as byte selectors, so a nibble's low three bits look up a table of eight magnitudes and
give four bytes; the sign of code k sits at bit 7 of the byte where k's level appears (of the word for k < 4, of the
word << 4 for k >= 4), the extra bit of plane 1 likewise after a shift, so that signs cost one XOR for four codes. A
step along the trellis is a rotation of the coded word by one bit; the two parities of a position come out at its bit,
and the j-th bits of all nibbles, parities and uncoded bits, make a plane-4 word of the j-th group: index = level % 8,
"sign" = level / 8.

Keys are token-major: a row is what the lanes of an int8 MMA read along the reduction.
Values are word-major, and the tokens of a tile are permuted so that the four words of tokens 2q, 2q+1, 2q+8, 2q+9 (the
reduction indices that lane q of an `m16n8k16` MMA holds) are one 16-byte load.

A vector's stored scale is f16; decoded coordinate = scale * centroid of its code (core.codebooks.page_centroids). Of a
key sketch it is scale * (+1 or -1), in the space of the sketch (core.qjl).
"""

from dataclasses import dataclass
from functools import cached_property

import torch

from tq_vllm.config import PRESETS, RECENT_PRESET, TRELLIS, TurboQuantConfig

TILE_TOKENS = 16
SEGMENT_TOKENS = 64  # a key offset is constant over this many absolute positions
SUPPORTED_HEAD_DIMS = (64, 80, 96, 112, 128, 192, 256)
PLANES = {8: (8,), 5: (4, 1), 4: (4,), 3: (2, 1), 2: (2,), 1: (1,), TRELLIS + 3: (2, 1), TRELLIS + 2: (1, 1)}
TRELLIS_BLOCK = 32  # coordinates

_BITS_4_INDEX = tuple(4 * k for k in range(8))
_BITS_4_SIGN = tuple(8 * k + 7 if k < 4 else 8 * (k - 4) + 3 for k in range(8))
_BITS_2 = tuple(4 * k + 2 * s for s in range(2) for k in range(8))
_BITS_1 = tuple(8 * (k % 4) + 2 * j + k // 4 for j in range(4) for k in range(8))
_BITS_8 = (0, 8, 16, 24)
# Of trellis planes, whose words hold the groups j = 0, 2, 1, 3 of a block (plane 2: two of them each).
_TRELLIS_2_LOW = tuple(4 * k + 2 * i for i in range(2) for k in range(8))
_TRELLIS_2_HIGH = tuple(_BITS_4_SIGN[k] - 2 + 2 * i for i in range(2) for k in range(8))
_TRELLIS_1 = tuple(4 * k + j for j in (0, 2, 1, 3) for k in range(8))
# Plane, plus TRELLIS for trellis codes -> lowest bit of the field of each coordinate of a word; its top bit if apart.
_BIT_OF = {
    8: _BITS_8, 4: _BITS_4_INDEX, 2: _BITS_2, 1: _BITS_1, TRELLIS + 2: _TRELLIS_2_LOW, TRELLIS + 1: _TRELLIS_1,
}  # fmt: skip
_TOP_BIT_OF = {4: _BITS_4_SIGN, TRELLIS + 2: _TRELLIS_2_HIGH}


class UnsupportedHeadDimError(ValueError):
    """A head size that the page format does not hold."""


def words_per_token(plane: int, head_dim: int) -> int:
    """32-bit words that one vector takes in a plane of `plane` bits."""
    return -(-head_dim * plane // 32)


def value_token_order(token: int) -> int:
    """Place of `token` (0..15) among the 16 tokens of a value word."""
    return (token % 8 // 2) * 4 + token % 2 + 2 * (token // 8)


def head_dims_of(config: TurboQuantConfig) -> tuple[int, ...]:
    """Head sizes that a preset can store: a trellis takes whole blocks of 32 coordinates."""
    return tuple(d for d in SUPPORTED_HEAD_DIMS if not config.trellis or d % TRELLIS_BLOCK == 0)


@dataclass(frozen=True)
class Section:
    """A contiguous part of a tile record: `offset` in bytes; `plane` bits a coordinate; words a token."""

    plane: int
    offset: int
    words: int


@dataclass(frozen=True)
class TurboQuantPage:
    """Byte offsets of a tile record for one preset and head size.

    Raises:
        UnsupportedHeadDimError: on construction, for a head size that is not in `head_dims_of(config)`.
    """

    config: TurboQuantConfig
    head_dim: int

    def __post_init__(self) -> None:
        if self.head_dim not in head_dims_of(self.config):
            raise UnsupportedHeadDimError(
                f"Head size of a {self.config.name} cache: got {self.head_dim}, allowed {head_dims_of(self.config)}. "
                f"Use --kv-cache-dtype auto or fp8 for this model."
            )

    @cached_property
    def key_sections(self) -> tuple[Section, ...]:
        return self._sections(self.config.key_width, 0)

    @cached_property
    def sketch_sections(self) -> tuple[Section, ...]:
        """The plane of signs of the key sketch, or nothing."""
        return self._sections(1, self._end(self.key_sections)) if self.config.key_sketch else ()

    @cached_property
    def value_sections(self) -> tuple[Section, ...]:
        return self._sections(self.config.value_width, self._end(self.key_sections + self.sketch_sections))

    @cached_property
    def key_scale_offset(self) -> int:
        """Byte offset of f16 [16] in a tile record."""
        return self._end(self.value_sections)

    @cached_property
    def value_scale_offset(self) -> int:
        """Byte offset of f16 [16] in a tile record."""
        return self.key_scale_offset + 2 * TILE_TOKENS

    @cached_property
    def sketch_scale_offset(self) -> int:
        """Byte offset of f16 [16] in a tile record, if there is a key sketch."""
        return self.value_scale_offset + 2 * TILE_TOKENS

    @cached_property
    def tile_bytes(self) -> int:
        return self.sketch_scale_offset + (2 * TILE_TOKENS if self.config.key_sketch else 0)

    @cached_property
    def slot_bytes(self) -> int:
        """Bytes of one token of one KV head: the last dimension of vLLM's cache tensor."""
        return self.tile_bytes // TILE_TOKENS

    def _sections(self, width: int, offset: int) -> tuple[Section, ...]:
        sections = []
        for plane in PLANES[width]:
            sections.append(Section(plane, offset, words_per_token(plane, self.head_dim)))
            offset = self._end(sections)
        return tuple(sections)

    @staticmethod
    def _end(sections) -> int:
        return sections[-1].offset + 4 * TILE_TOKENS * sections[-1].words

    def key_word_offset(self, section: Section, token: int, word: int) -> int:
        """Byte offset in the tile record of a key word of `token` (0..15)."""
        return section.offset + 4 * (token * section.words + word)

    def value_word_offset(self, section: Section, token: int, word: int) -> int:
        """Byte offset in the tile record of a value word of `token` (0..15)."""
        return section.offset + 4 * (word * TILE_TOKENS + value_token_order(token))


def recent_block_size(page: TurboQuantPage, block_size: int) -> int:
    """Tokens of RECENT_PRESET, a multiple of 16, that fit into the bytes of a block of `page`: vLLM's blocks all have
    the size of the largest. 0 where none does."""
    tile_bytes = TurboQuantPage(PRESETS[RECENT_PRESET], page.head_dim).tile_bytes
    return block_size * page.slot_bytes // tile_bytes * TILE_TOKENS


def _fields(codes: torch.Tensor, width: int) -> list[torch.Tensor]:
    """Split codes, int [..., d], into the fields of their planes, int64 [..., d]; plane 4 keeps its sign as bit 3."""
    c = codes.to(torch.int64)
    if width > TRELLIS:
        return [c >> 1, c & 1]
    if width == 5:
        return [(c >> 1) & 7 | (c >> 4) << 3, c & 1]
    if width == 3:
        return [c & 3, c >> 2]
    return [c]


def _join(fields: list[torch.Tensor], width: int) -> torch.Tensor:
    if width > TRELLIS:
        return fields[0] << 1 | fields[1]
    if width == 5:
        nibble, low = fields
        return (nibble & 7) << 1 | low | (nibble >> 3) << 4
    if width == 3:
        return fields[0] | fields[1] << 2
    return fields[0]


def _shifts(bit_of: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor(bit_of, dtype=torch.int64, device=device)


def _to_blocks(codes: torch.Tensor) -> torch.Tensor:
    """Bring codes [..., d] to the order of trellis blocks: of each the groups j = 0, 2, 1, 3 of eight coordinates."""
    return codes.unflatten(-1, (2, 2, -1, 8)).movedim(-2, -4).transpose(-3, -2).flatten(-4)


def _from_blocks(codes: torch.Tensor) -> torch.Tensor:
    """Inverse of `_to_blocks`."""
    return codes.unflatten(-1, (-1, 2, 2, 8)).transpose(-3, -2).movedim(-4, -2).flatten(-4)


def _planes(width: int) -> list[tuple[int, int]]:
    """(plane, its key in _BIT_OF) of each plane of a width."""
    return [(plane, plane + TRELLIS * (width > TRELLIS)) for plane in PLANES[width]]


def pack_words(codes: torch.Tensor, width: int) -> list[torch.Tensor]:
    """Pack the codes of vectors into the words of their planes.

    Args:
        codes: any int dtype [..., head_dim], values below 2**bits (a signed byte's bit pattern for 8 bits).
        width: a key of PLANES; head_dim is a multiple of 32 for trellis codes.

    Returns:
        One int32 [..., words] per plane of `width`, in the order of PLANES.
    """
    d = codes.shape[-1]
    if width > TRELLIS:
        codes = _to_blocks(codes)
    packed = []
    for (plane, bits), field in zip(_planes(width), _fields(codes, width), strict=True):
        per_word = 32 // plane
        if d % per_word:
            field = torch.nn.functional.pad(field, (0, per_word - d % per_word))
        field = field.unflatten(-1, (-1, per_word))
        top = plane - 1 if bits in _TOP_BIT_OF else plane
        word = ((field & (2**top - 1)) << _shifts(_BIT_OF[bits], codes.device)).sum(-1)  # fields do not overlap
        if bits in _TOP_BIT_OF:
            word += ((field >> top) << _shifts(_TOP_BIT_OF[bits], codes.device)).sum(-1)
        packed.append(torch.where(word >= 2**31, word - 2**32, word).to(torch.int32))
    return packed


def unpack_words(words: list[torch.Tensor], width: int, head_dim: int) -> torch.Tensor:
    """Inverse of `pack_words`: one int32 [..., words] per plane -> codes uint8 [..., head_dim]."""
    fields = []
    for (plane, bits), word in zip(_planes(width), words, strict=True):
        w = word.to(torch.int64).unsqueeze(-1)
        top = plane - 1 if bits in _TOP_BIT_OF else plane
        field = (w >> _shifts(_BIT_OF[bits], word.device)) & (2**top - 1)
        if bits in _TOP_BIT_OF:
            field |= ((w >> _shifts(_TOP_BIT_OF[bits], word.device)) & 1) << top
        fields.append(field.flatten(-2)[..., :head_dim])
    codes = _join(fields, width).to(torch.uint8)
    return _from_blocks(codes) if width > TRELLIS else codes
