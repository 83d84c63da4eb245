"""Pages in PyTorch: where the words of a token go, and tiles of a cache as centroids. Any device."""

import functools

import torch

from tq_vllm.config import TRELLIS, get_config
from tq_vllm.core.cache import EncodedKV
from tq_vllm.core.codebooks import page_centroids, trellis_centroids
from tq_vllm.format import TILE_TOKENS, TurboQuantPage, pack_words


@functools.cache
def get_page(preset: str, head_dim: int) -> TurboQuantPage:
    return TurboQuantPage(get_config(preset), head_dim)


def tile_records(kv_cache: torch.Tensor, page: TurboQuantPage) -> torch.Tensor:
    """View kv_cache, uint8 [num_blocks, num_kv_heads, block_size, slot_bytes] with free strides of the first two
    dimensions, as int32 [num_blocks, num_kv_heads, block_size / 16, tile_bytes / 4].

    Raises:
        ValueError: the tensor does not hold pages of this format.
    """
    num_blocks, num_kv_heads, block_size, slot_bytes = kv_cache.shape
    if kv_cache.dtype != torch.uint8 or slot_bytes != page.slot_bytes or block_size % TILE_TOKENS:
        raise ValueError(
            f"kv_cache of {page.config.name} at head size {page.head_dim}: got {kv_cache.dtype} "
            f"{tuple(kv_cache.shape)}, allowed uint8 [num_blocks, num_kv_heads, a multiple of {TILE_TOKENS}, "
            f"{page.slot_bytes}]."
        )
    regions = kv_cache.view(num_blocks, num_kv_heads, block_size * slot_bytes)
    return regions.view(torch.int32).view(num_blocks, num_kv_heads, block_size // TILE_TOKENS, page.tile_bytes // 4)


@functools.cache
def _columns(page: TurboQuantPage, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return where a token's data stand in a tile record: words int64 [16, num_words] in int32 units (key planes, that
    of a key sketch, value planes) and scales int64 [16, 2 or 3] in int16 units (key, value, sketch)."""
    keys = page.key_sections + page.sketch_sections
    words = [
        [page.key_word_offset(s, token, w) // 4 for s in keys for w in range(s.words)]
        + [page.value_word_offset(s, token, w) // 4 for s in page.value_sections for w in range(s.words)]
        for token in range(TILE_TOKENS)
    ]
    offsets = [page.key_scale_offset, page.value_scale_offset]
    offsets += [page.sketch_scale_offset] if page.config.key_sketch else []
    scales = [[offset // 2 + t for offset in offsets] for t in range(TILE_TOKENS)]
    return torch.tensor(words, device=device), torch.tensor(scales, device=device)


def write_tokens(kv_cache: torch.Tensor, page: TurboQuantPage, slots: torch.Tensor, encoded: EncodedKV) -> None:
    """Scatter encoded vectors to their slots, int64 [num_tokens], all different and none negative."""
    records = tile_records(kv_cache, page)
    word_columns, scale_columns = _columns(page, slots.device)
    block_size = kv_cache.shape[2]
    token = slots % TILE_TOKENS
    block = torch.div(slots, block_size, rounding_mode="floor")[:, None, None]  # [num_tokens, 1, 1]
    tile = torch.div(slots % block_size, TILE_TOKENS, rounding_mode="floor")[:, None, None]
    head = torch.arange(kv_cache.shape[1], device=slots.device)[None, :, None]  # [1, num_kv_heads, 1]
    key_words = pack_words(encoded.key_codes, page.config.key_width)
    value_words = pack_words(encoded.value_codes, page.config.value_width)
    scales = [encoded.key_scale, encoded.value_scale]
    if page.config.key_sketch:
        key_words += pack_words(encoded.sketch_signs, 1)
        scales.append(encoded.sketch_scale)
    words = torch.cat(key_words + value_words, -1)  # [num_tokens, num_kv_heads, num_words] int32
    scales = torch.stack(scales, -1).to(torch.float16)  # [num_tokens, num_kv_heads, 2 or 3]
    records.index_put_((block, head, tile, word_columns[token][:, None]), words)
    records.view(torch.int16).index_put_((block, head, tile, scale_columns[token][:, None]), scales.view(torch.int16))


def read_tiles(
    kv_cache: torch.Tensor, page: TurboQuantPage, blocks: torch.Tensor, tiles: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the contents of tiles of 16 tokens in rotated space: scale * centroid is a coordinate.

    Args:
        blocks, tiles: int64 [n, m] and [m]; tile tiles[j] of block blocks[i, j].

    Returns:
        key_centroids, value_centroids [n, num_kv_heads, 16 * m, head_dim]; key_scale, value_scale [n, num_kv_heads,
        16 * m]. Slots never written hold anything: finite centroids, any scale, NaN included.
    """
    heads = torch.arange(kv_cache.shape[1], device=blocks.device)[:, None]
    records = tile_records(kv_cache, page)[blocks[:, None], heads, tiles]  # [n, num_kv_heads, m, tile_bytes / 4]
    key_words = [
        records[..., s.offset // 4 :][..., : TILE_TOKENS * s.words].unflatten(-1, (TILE_TOKENS, s.words))
        for s in page.key_sections
    ]
    value_words = [  # format.value_token_order: token = 8 b + 2 a + c stands at 4 a + 2 b + c
        records[..., s.offset // 4 :][..., : TILE_TOKENS * s.words]
        .unflatten(-1, (s.words, 4, 2, 2))
        .permute(0, 1, 2, 5, 4, 6, 3)
        .flatten(3, 5)
        for s in page.value_sections
    ]
    halves = records.view(torch.float16)
    key_scale, value_scale = (
        halves[..., offset // 2 : offset // 2 + TILE_TOKENS].flatten(2).to(dtype)
        for offset in (page.key_scale_offset, page.value_scale_offset)
    )
    key = centroids_of([w.flatten(2, 3) for w in key_words], page.config.key_width, page.head_dim, dtype)
    value = centroids_of([w.flatten(2, 3) for w in value_words], page.config.value_width, page.head_dim, dtype)
    return key, value, key_scale, value_scale


def read_sketches(
    kv_cache: torch.Tensor, page: TurboQuantPage, blocks: torch.Tensor, tiles: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the key sketches of tiles, arguments as in `read_tiles`.

    Returns:
        signs, +1 and -1 [n, num_kv_heads, 16 * m, head_dim], and scale [n, num_kv_heads, 16 * m]: scale * sign is a
        coordinate of S times the estimate of the rotated residual.
    """
    heads = torch.arange(kv_cache.shape[1], device=blocks.device)[:, None]
    records = tile_records(kv_cache, page)[blocks[:, None], heads, tiles]  # [n, num_kv_heads, m, tile_bytes / 4]
    (plane,) = page.sketch_sections
    words = records[..., plane.offset // 4 :][..., : TILE_TOKENS * plane.words]
    words = words.unflatten(-1, (TILE_TOKENS, plane.words))
    scale = records.view(torch.float16)[..., page.sketch_scale_offset // 2 :][..., :TILE_TOKENS].flatten(2).to(dtype)
    return centroids_of([words.flatten(2, 3)], 1, page.head_dim, dtype), scale


def read_tokens(
    kv_cache: torch.Tensor, page: TurboQuantPage, blocks: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the contents of whole blocks, int64 [n, m], as `read_tiles` does: block_size * m tokens for each n."""
    tiles_of_block = kv_cache.shape[2] // TILE_TOKENS
    tiles = torch.arange(tiles_of_block, device=blocks.device).repeat(blocks.shape[1])
    return read_tiles(kv_cache, page, blocks.repeat_interleave(tiles_of_block, 1), tiles, dtype)


# Every width but 8 is brought to words of eight nibbles laid out as in plane 4, and looked up four coordinates at a
# time. In a plane-4 word, exchanging the signs of coordinates 4, 5 with those of 2, 3 leaves both halves of the word
# alike: coordinate k (or 4 + k) has its low three bits at 4k and its top bit at _TOP_BIT[k].
_TOP_BIT = (7, 15, 3, 11)


@functools.cache
def _half_word_table(bits: int, what: str, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return [65536, 4] of dtype: for the four nibbles of a half word (of `bits`-bit codes)

    "even": the centroid (5 bits: of index 2 * nibble); "step": what the lowest index bit adds to it (5 bits);
    "top": the nibbles' top bits as 0 and 1. 1 bit: the centroid is the sign. Trellis codes: the level that the nibble
    counts.
    """
    half = torch.arange(1 << 16)[:, None]
    low, top = half >> torch.arange(0, 16, 4) & 7, half >> torch.tensor(_TOP_BIT) & 1  # [65536, 4]
    if what == "top":
        table = top
    elif bits > TRELLIS:
        levels = trellis_centroids(bits - TRELLIS)
        table = levels[(low | top << 3) % len(levels)]
    elif bits == 1:
        table = 1 - 2 * top
    elif bits == 5:
        even, odd = (page_centroids(5)[2 * low + lowest + (top << 4)] for lowest in (0, 1))
        table = even if what == "even" else odd - even
    else:
        table = page_centroids(bits)[low % 2**bits | top << (bits - 1)]
    return table.to(device, dtype).contiguous()


def _look_up(words: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Look up the nibbles of plane-4 words, int32 [..., words]: [..., 8 * words] of the table's dtype."""
    exchanged = ((words >> 20) ^ words) & 0x0808
    words = (words ^ exchanged) ^ (exchanged << 20)
    half = words.view(torch.int16).flatten().to(torch.int32).bitwise_and_(0xFFFF)
    if table.dtype == torch.float32:  # four floats as one element: a tenth of the time of a look-up by rows
        found = table.view(torch.complex128).flatten().index_select(0, half).view(torch.float32)
    else:
        found = table.index_select(0, half)
    return found.view(*words.shape[:-1], 8 * words.shape[-1])


def _top_bits(plane_1: torch.Tensor) -> torch.Tensor:
    """Spread words of plane 1, int32 [..., words], to the top bits of plane-4 words, int32 [..., 4 * words]."""
    bits = torch.stack([plane_1 >> 2 * j for j in range(4)], -1).flatten(-2)
    return (bits & 0x01010101) << 7 | (bits & 0x02020202) << 2


def _trellis_nibbles(uncoded: torch.Tensor, coded: torch.Tensor, bits: int) -> torch.Tensor:
    """Plane-4 words, int32 [..., head_dim / 8], of the words of the planes of trellis codes of `bits` bits."""

    def rotated(n: int) -> torch.Tensor:
        return coded << n | (coded >> (32 - n)) & ((1 << n) - 1)

    parities = rotated(2), coded ^ rotated(1) ^ rotated(3)
    groups = []
    for j in range(4):
        nibble = parities[0] >> j & 0x11111111 | (parities[1] >> j & 0x11111111) << 1
        if bits == 2:
            nibble |= (uncoded >> j & 0x11111111) << 2
        else:
            nibble |= (uncoded[..., j % 2 :: 2] >> 2 * (j // 2) & 0x33333333) << 2
        groups.append(nibble)
    return torch.cat(groups, -1)


def centroids_of(words: list[torch.Tensor], bits: int, head_dim: int, dtype: torch.dtype) -> torch.Tensor:
    """Unpack words, one int32 [..., words] a plane of `bits`, to centroids [..., head_dim] of dtype f32 or f64.

    Same as decode_vectors of unpack_words(words, bits, head_dim) with a scale of 1, ten times faster on a CPU; of 1
    bit +1 and -1.
    """
    words = [w.contiguous() for w in words]
    if bits == 8:
        return words[0].view(torch.int8).to(dtype)
    num_words = head_dim // 8

    def table(what: str) -> torch.Tensor:
        return _half_word_table(bits, what, dtype, words[0].device)

    if bits == 5:
        odd = _look_up(_top_bits(words[1])[..., :num_words], table("top"))
        return _look_up(words[0], table("even")).addcmul_(odd, _look_up(words[0], table("step")))
    if bits == 4:
        return _look_up(words[0], table("even"))
    if bits > TRELLIS:
        return _look_up(_trellis_nibbles(*words, bits - TRELLIS), table("even"))
    if bits == 1:
        return _look_up(_top_bits(words[0])[..., :num_words], table("even"))
    nibbles = torch.stack((words[0], words[0] >> 2), -1).flatten(-2)[..., :num_words] & 0x33333333
    if bits == 3:
        nibbles |= _top_bits(words[1])[..., :num_words]
    return _look_up(nibbles, table("even"))
