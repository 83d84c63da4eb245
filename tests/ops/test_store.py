"""What store_kv writes: the bytes that format.py documents, in the slots it was given, and nothing else."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ops.batches import FORMATS, PAGES, Batch, store_kv
from tq_vllm.config import TRELLIS, get_config
from tq_vllm.core.cache import encode_kv
from tq_vllm.core.quantizers import decode_vectors
from tq_vllm.format import PLANES, SUPPORTED_HEAD_DIMS, TILE_TOKENS, TurboQuantPage, pack_words, unpack_words
from tq_vllm.ops.torch_pages import centroids_of


def read_slot(kv_cache, page, slot, head):
    """Read one slot byte by byte as format.py documents it: codes and scales of a key, a value and a key sketch."""
    block, in_block = divmod(slot, kv_cache.shape[2])
    tile, token = divmod(in_block, TILE_TOKENS)
    record = kv_cache[block, head].flatten()[tile * page.tile_bytes : (tile + 1) * page.tile_bytes]
    parts = [
        (page.key_sections, page.key_word_offset, page.config.key_width, page.key_scale_offset),
        (page.value_sections, page.value_word_offset, page.config.value_width, page.value_scale_offset),
    ]
    if page.config.key_sketch:
        parts.append((page.sketch_sections, page.key_word_offset, 1, page.sketch_scale_offset))
    found = []
    for sections, word_offset, bits, _ in parts:
        words = []
        for section in sections:
            offsets = [word_offset(section, token, word) for word in range(section.words)]
            words.append(torch.stack([record[o : o + 4] for o in offsets]).contiguous().view(torch.int32).flatten())
        found.append(unpack_words(words, bits, page.head_dim))
    for *_, offset in parts:
        found.append(record[offset + 2 * token :][:2].contiguous().view(torch.float16).float()[0])
    return found


@pytest.mark.parametrize("preset, head_dim", PAGES)
def test_bytes_are_where_the_format_says(preset, head_dim):
    batch = Batch(preset=preset, head_dim=head_dim, seq_lens=(40,), query_lens=(1,), block_size=32).fill()
    page = TurboQuantPage(batch.config, head_dim)
    encoded = encode_kv(batch.keys[0], batch.values[0], batch.config)
    slots = batch.slots(0, torch.arange(40)).tolist()
    for token in (0, 1, 7, 8, 15, 16, 31, 39):
        for head in range(batch.num_kv_heads):
            found = read_slot(batch.kv_cache, page, slots[token], head)
            codes, scales = found[: len(found) // 2], found[len(found) // 2 :]
            assert torch.equal(codes[0], encoded.key_codes[token, head])
            assert torch.equal(codes[1], encoded.value_codes[token, head])
            assert scales[:2] == [encoded.key_scale[token, head], encoded.value_scale[token, head]]
            if batch.config.key_sketch:
                assert torch.equal(codes[2], encoded.sketch_signs[token, head])
                assert scales[2] == encoded.sketch_scale[token, head]


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from([(w, d) for w in PLANES for d in SUPPORTED_HEAD_DIMS if w < TRELLIS or d % 32 == 0]),
    st.booleans(),
    st.integers(0, 2**32),
)
def test_fast_unpacking_equals_the_documented_one(width_and_head_dim, double, seed):
    width, head_dim = width_and_head_dim
    dtype = torch.float64 if double else torch.float32
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2 ** (width % TRELLIS), (3, head_dim), dtype=torch.uint8, generator=generator)
    expected = 1.0 - 2 * codes if width == 1 else decode_vectors(codes, torch.ones(3), width)
    assert torch.equal(centroids_of(pack_words(codes, width), width, head_dim, dtype), expected.to(dtype))


@settings(max_examples=40, deadline=None)
@given(st.data(), st.sampled_from(sorted(FORMATS)), st.booleans())
def test_codes_do_not_depend_on_the_chunking(data, preset, with_offset):
    whole = Batch(preset=preset, seq_lens=(90,), query_lens=(1,), with_offset=with_offset).fill()
    parts = Batch(preset=preset, seq_lens=(90,), query_lens=(1,), with_offset=with_offset)
    cuts = sorted(data.draw(st.lists(st.integers(0, 90), max_size=6)))
    for start, end in zip([0, *cuts], [*cuts, 90], strict=True):
        parts.store(0, start, end)
    assert torch.equal(whole.kv_cache, parts.kv_cache)


@pytest.mark.parametrize("preset", FORMATS)
def test_slot_minus_1_and_tokens_past_the_slots_write_nothing(preset):
    batch = Batch(preset=preset, seq_lens=(40,), query_lens=(1,))
    slots = batch.slots(0, torch.arange(40))
    expected = Batch(preset=preset, seq_lens=(40,), query_lens=(1,))
    for token in (3, 17, 18):
        expected.store(0, token, token + 1)
    slots[[i for i in range(40) if i not in (3, 17, 18)]] = -1
    positions = torch.arange(40)
    store_kv(batch.keys[0], batch.values[0], batch.kv_cache, slots[:30], positions, None, preset)
    assert torch.equal(batch.kv_cache, expected.kv_cache)
    store_kv(batch.keys[0], batch.values[0], batch.kv_cache, torch.full((40,), -1), None, None, preset)
    store_kv(batch.keys[0], batch.values[0], batch.kv_cache, slots[:0], None, None, preset)
    assert torch.equal(batch.kv_cache, expected.kv_cache)


def test_a_write_touches_the_bytes_of_its_slot_only():
    batch = Batch(seq_lens=(64,), query_lens=(1,), block_size=64).fill()
    page = TurboQuantPage(batch.config, batch.head_dim)
    before = [read_slot(batch.kv_cache, page, s, 0) for s in batch.slots(0, torch.arange(64)).tolist()]
    storage = batch.kv_cache.new_empty(0).set_(batch.kv_cache.untyped_storage())
    old = storage.clone()
    batch.keys[0][20] += 1.0
    batch.store(0, 20, 21)
    after = [read_slot(batch.kv_cache, page, s, 0) for s in batch.slots(0, torch.arange(64)).tolist()]
    changed = [i for i, (a, b) in enumerate(zip(before, after, strict=True)) if not torch.equal(a[0], b[0])]
    assert changed == [20]
    assert 0 < (storage != old).sum() <= batch.num_kv_heads * page.slot_bytes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_inputs_and_strided_rows(dtype):
    """Keys as vLLM passes them: slices of a fused qkv tensor."""
    batch = Batch(dtype=dtype, seq_lens=(30,), query_lens=(1,), with_offset=True)
    fused = torch.cat((batch.keys[0].flatten(1), batch.values[0].flatten(1)), 1)
    key, value = (x.unflatten(1, (batch.num_kv_heads, -1)) for x in fused.chunk(2, 1))
    assert not key.is_contiguous()
    positions = torch.arange(30)
    batch.fill()
    expected = batch.kv_cache.clone()
    batch.kv_cache.zero_()
    store_kv(key, value, batch.kv_cache, batch.slots(0, positions), positions.int(), batch.key_offset, batch.preset)
    page = TurboQuantPage(batch.config, batch.head_dim)
    for slot in batch.slots(0, positions).tolist():
        for a, b in zip(read_slot(batch.kv_cache, page, slot, 1), read_slot(expected, page, slot, 1), strict=True):
            assert torch.equal(a, b)


def test_a_cache_of_another_format_is_refused():
    batch = Batch(seq_lens=(5,), query_lens=(1,))
    slots = torch.arange(5)
    with pytest.raises(ValueError, match=r"turboquant:k8v8 at head size 64: got .*allowed uint8 .* 132\]"):
        store_kv(batch.keys[0], batch.values[0], batch.kv_cache, slots, None, None, "turboquant:k8v8")
    with pytest.raises(ValueError, match="a multiple of 16"):
        store_kv(batch.keys[0], batch.values[0], batch.kv_cache[:, :, :8], slots, None, None, "turboquant")


def test_key_offset_needs_positions():
    batch = Batch(seq_lens=(5,), query_lens=(1,), with_offset=True)
    with pytest.raises(ValueError, match="positions"):
        store_kv(batch.keys[0], batch.values[0], batch.kv_cache, torch.arange(5), None, batch.key_offset, "turboquant")


def test_presets_of_equal_widths_write_equal_bytes():
    assert get_config("turboquant").key_bits == get_config("turboquant:k4v4").key_bits
    a, b = (Batch(preset=p, seq_lens=(20,), query_lens=(1,)).fill() for p in ("turboquant", "turboquant:k4v4"))
    assert torch.equal(a.kv_cache, b.kv_cache)
