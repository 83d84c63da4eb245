"""Pages in PyTorch: where the words of a token go, and tiles of a cache as centroids. Any device."""

import functools

import torch

from tq_vllm.config import get_config
from tq_vllm.core.cache import EncodedKV
from tq_vllm.core.codebooks import page_centroids
from tq_vllm.format import TILE_TOKENS, TurboQuantPage, pack_words, unpack_words


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
            f"kv_cache of {page.config.name} at head size {page.head_dim}: got {kv_cache.dtype} {tuple(kv_cache.shape)}, "
            f"allowed uint8 [num_blocks, num_kv_heads, a multiple of {TILE_TOKENS}, {page.slot_bytes}]."
        )
    regions = kv_cache.view(num_blocks, num_kv_heads, block_size * slot_bytes)
    return regions.view(torch.int32).view(num_blocks, num_kv_heads, block_size // TILE_TOKENS, page.tile_bytes // 4)


@functools.cache
def _columns(page: TurboQuantPage, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return where a token's data stand in a tile record: words int64 [16, num_words] in int32 units (key planes, then
    value planes) and scales int64 [16, 2] in int16 units (key, value)."""
    words = [
        [page.key_word_offset(s, token, w) // 4 for s in page.key_sections for w in range(s.words)]
        + [page.value_word_offset(s, token, w) // 4 for s in page.value_sections for w in range(s.words)]
        for token in range(TILE_TOKENS)
    ]
    scales = [[page.key_scale_offset // 2 + t, page.value_scale_offset // 2 + t] for t in range(TILE_TOKENS)]
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
    words = torch.cat(
        pack_words(encoded.key_codes, page.config.key_bits) + pack_words(encoded.value_codes, page.config.value_bits), -1
    )  # [num_tokens, num_kv_heads, num_words] int32
    scales = torch.stack((encoded.key_scale, encoded.value_scale), -1).to(torch.float16)  # [num_tokens, num_kv_heads, 2]
    records.index_put_((block, head, tile, word_columns[token][:, None]), words)
    records.view(torch.int16).index_put_((block, head, tile, scale_columns[token][:, None]), scales.view(torch.int16))


def read_tokens(
    kv_cache: torch.Tensor, page: TurboQuantPage, blocks: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the contents of blocks, int64 [n, m], in rotated space: scale * centroid is a coordinate.

    Returns:
        key_centroids, value_centroids [n, num_kv_heads, m * block_size, head_dim]; key_scale, value_scale [n,
        num_kv_heads, m * block_size]. Slots never written hold anything: finite centroids, any scale, NaN included.
    """
    records = tile_records(kv_cache, page)[blocks].transpose(1, 2).flatten(2, 3)  # [n, num_kv_heads, tiles, tile words]
    word_columns, scale_columns = _columns(page, blocks.device)
    sections = page.key_sections + page.value_sections
    words = list(records[..., word_columns].flatten(2, 3).split([s.words for s in sections], -1))
    key_words, value_words = words[: len(page.key_sections)], words[len(page.key_sections) :]
    scales = records.view(torch.float16)[..., scale_columns].flatten(2, 3).to(dtype)  # [n, num_kv_heads, tokens, 2]
    return (
        _centroids(key_words, page.config.key_bits, page.head_dim, dtype),
        _centroids(value_words, page.config.value_bits, page.head_dim, dtype),
        scales[..., 0],
        scales[..., 1],
    )


def _centroids(words: list[torch.Tensor], bits: int, head_dim: int, dtype: torch.dtype) -> torch.Tensor:
    """Unpack words, one int32 [..., words] a plane, to centroids [..., head_dim]."""
    codes = unpack_words(words, bits, head_dim)
    if bits == 8:
        return codes.view(torch.int8).to(dtype)
    return page_centroids(bits).to(codes.device, dtype)[codes.int()]
