"""The page format: sizes as documented, no two bits shared, round trips."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tq_vllm.config import PRESETS, TRELLIS, TurboQuantConfig, UnknownPresetError, get_config
from tq_vllm.format import (
    PLANES,
    SUPPORTED_HEAD_DIMS,
    TILE_TOKENS,
    TurboQuantPage,
    UnsupportedHeadDimError,
    head_dims_of,
    pack_words,
    unpack_words,
    value_token_order,
)

EVERY_PAGE = [TurboQuantPage(config, d) for config in PRESETS.values() for d in head_dims_of(config)]
# Every width with the head sizes it can store.
WIDTHS_AND_HEAD_DIMS = [(w, d) for w in PLANES for d in SUPPORTED_HEAD_DIMS if w < TRELLIS or d % 32 == 0]


@pytest.mark.parametrize(
    ("preset", "slot_bytes"),
    [("turboquant", 132), ("turboquant:k8v8", 260), ("turboquant:k8v4", 196), ("turboquant:k5v4", 148),
     ("turboquant:k4v4", 132), ("turboquant:k4v3", 116), ("turboquant:k3v3", 100), ("turboquant:k3v2", 84),
     ("turboquant:k2v2", 68), ("turboquant:t3", 100), ("turboquant:t2", 68), ("turboquant:prod", 134)],
)  # fmt: skip
def test_bytes_per_token_at_head_dim_128(preset, slot_bytes):
    assert TurboQuantPage(get_config(preset), 128).slot_bytes == slot_bytes


@pytest.mark.parametrize("page", EVERY_PAGE, ids=lambda p: f"{p.config.name}-{p.head_dim}")
def test_every_word_and_scale_of_a_tile_has_its_own_bytes(page):
    used = []
    for token in range(TILE_TOKENS):
        for section in page.key_sections + page.sketch_sections:
            used += [page.key_word_offset(section, token, w) for w in range(section.words)]
        for section in page.value_sections:
            used += [page.value_word_offset(section, token, w) for w in range(section.words)]
    covered = sorted(b for offset in used for b in range(offset, offset + 4))
    covered += [page.key_scale_offset + i for i in range(2 * TILE_TOKENS)]
    covered += [page.value_scale_offset + i for i in range(2 * TILE_TOKENS)]
    covered += [page.sketch_scale_offset + i for i in range(2 * TILE_TOKENS) if page.config.key_sketch]
    assert covered == list(range(page.tile_bytes))
    sections = page.key_sections + page.sketch_sections + page.value_sections
    assert all(offset % 16 == 0 for offset in [s.offset for s in sections] + [page.key_scale_offset, page.tile_bytes])
    assert page.slot_bytes * TILE_TOKENS == page.tile_bytes


@pytest.mark.parametrize("head_dim", SUPPORTED_HEAD_DIMS)
def test_a_key_sketch_costs_a_bit_a_coordinate_and_a_scale(head_dim):
    with_sketch, without = (TurboQuantConfig("", 3, 4, key_sketch=sketch) for sketch in (True, False))
    plane = 4 * -(-head_dim // 32)  # whole words
    more = TurboQuantPage(with_sketch, head_dim).slot_bytes - TurboQuantPage(without, head_dim).slot_bytes
    assert more == plane + 2


def test_value_tokens_of_an_mma_lane_are_adjacent():
    for q in range(4):
        assert [value_token_order(t) for t in (2 * q, 2 * q + 1, 2 * q + 8, 2 * q + 9)] == [4 * q + i for i in range(4)]


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(WIDTHS_AND_HEAD_DIMS), st.integers(0, 2**32), st.integers(1, 5))
def test_codes_survive_packing(width_and_head_dim, seed, n):
    width, head_dim = width_and_head_dim
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2 ** (width % TRELLIS), (n, head_dim), generator=generator, dtype=torch.uint8)
    words = pack_words(codes, width)
    assert [w.shape[-1] * 4 for w in words] == [4 * -(-head_dim * p // 32) for p in PLANES[width]]
    assert torch.equal(unpack_words(words, width, head_dim), codes)


@pytest.mark.parametrize("width", PLANES)
def test_every_coordinate_has_its_own_bits(width):
    """One coordinate at a time: the words of the sum are the OR of the words."""
    d = 128
    one_hot = torch.eye(d, dtype=torch.int64) * (2 ** (width % TRELLIS) - 1)
    for plane in pack_words(one_hot, width):
        seen = 0
        for row in plane.tolist():
            bits_of_row = sum((w & 0xFFFFFFFF) << (32 * i) for i, w in enumerate(row))
            assert bits_of_row and not seen & bits_of_row
            seen |= bits_of_row


def test_sign_bits_stand_where_prmt_needs_them():
    for k in range(8):
        (word,) = pack_words(torch.nn.functional.one_hot(torch.tensor(k), 8) * 8, 4)
        assert int(word[0]) & 0xFFFFFFFF == 1 << (8 * k + 7 if k < 4 else 8 * (k - 4) + 3)


@pytest.mark.parametrize("width", [TRELLIS + 2, TRELLIS + 3])
def test_words_of_a_trellis_block_hold_what_the_format_says(width):
    """Coordinate k of the block's j-th group, one at a time: its coded bit, and its uncoded bits."""
    head_dim, blocks = 128, 4
    for block, j, k in itertools.product(range(blocks), range(4), range(8)):
        coordinate = 8 * (block + blocks * j) + k
        expected = [{}, {block: 1 << 4 * k + j}]
        codes = torch.zeros(head_dim, dtype=torch.int64)
        for code in range(1 << width - TRELLIS):
            low, high = code >> 1 & 1, code >> 2
            if width == TRELLIS + 2:
                expected[0] = {block: low << 4 * k + j}
            else:
                top = (8 * k + 7 if k < 4 else 8 * (k - 4) + 3) - (2 if j < 2 else 0)
                expected[0] = {2 * block + j % 2: low << 4 * k + 2 * (j // 2) | high << top}
            expected[1] = {block: (code & 1) << 4 * k + j}
            codes[coordinate] = code
            found = [
                {i: w & 0xFFFFFFFF for i, w in enumerate(plane.tolist()) if w} for plane in pack_words(codes, width)
            ]
            assert found == [{i: w for i, w in plane.items() if w} for plane in expected]


def test_unknown_preset_and_head_size_say_what_is_allowed():
    with pytest.raises(UnknownPresetError, match="got 'turboquant:k9v9'.*turboquant:k8v8.*turboquant:k2v2"):
        get_config("turboquant:k9v9")
    with pytest.raises(UnsupportedHeadDimError, match="got 72, allowed .*128.*fp8"):
        TurboQuantPage(get_config("turboquant"), 72)
    with pytest.raises(UnsupportedHeadDimError, match="turboquant:t3 cache: got 80, allowed .64, 96, 128"):
        TurboQuantPage(get_config("turboquant:t3"), 80)
