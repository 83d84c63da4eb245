"""The CUDA write against the PyTorch write: the same bytes in the whole cache, but for counted near-ties."""

import itertools
import math

import pytest
import torch

from tests.ops.batches import PAGES
from tq_vllm.config import PRESETS
from tq_vllm.core.cache import encode_kv, offset_at
from tq_vllm.core.codebook_tables import PAGE_LEVELS, PAGE_UNIT
from tq_vllm.core.qjl import page_sketch
from tq_vllm.core.quantizers import decode_vectors
from tq_vllm.core.rotations import get_rotation
from tq_vllm.format import TILE_TOKENS, TurboQuantPage, unpack_words, value_token_order
from tq_vllm.ops import cuda_library, cuda_store, torch_ops
from tq_vllm.ops.torch_pages import tile_records

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(cuda_library.why_missing() is not None, reason=str(cuda_library.why_missing())),
]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def empty_cache(page, num_blocks, num_kv_heads, block_size, generator, padding=0):
    """A cache of random bytes; `padding` bytes (a multiple of 16) between the regions of heads and of blocks."""
    region = block_size * page.slot_bytes
    head_stride = region + padding
    block_stride = num_kv_heads * head_stride + 3 * padding
    storage = torch.randint(0, 256, (num_blocks * block_stride,), dtype=torch.uint8, generator=generator)
    shape = (num_blocks, num_kv_heads, block_size, page.slot_bytes)
    return storage, lambda s: s.as_strided(shape, (block_stride, head_stride, page.slot_bytes, 1))


def read_slots(kv_cache, page, slots):
    """Return codes uint8 [n, num_kv_heads, head_dim] and scale f16 [n, num_kv_heads] of keys, of values, and of key
    sketches where there are any."""
    records = tile_records(kv_cache, page)
    block_size = kv_cache.shape[2]
    records = records[slots // block_size, :, slots % block_size // TILE_TOKENS]  # [n, num_kv_heads, tile_bytes / 4]
    token = slots % TILE_TOKENS
    row = torch.arange(len(slots))
    order = torch.tensor([value_token_order(t) for t in range(TILE_TOKENS)])[token]
    found = []
    parts = [
        (page.key_sections, page.config.key_width, True, page.key_scale_offset),
        (page.value_sections, page.config.value_width, False, page.value_scale_offset),
    ]
    if page.config.key_sketch:
        parts.append((page.sketch_sections, 1, True, page.sketch_scale_offset))
    for sections, bits, is_key, offset in parts:
        words = []
        for s in sections:
            plane = records[..., s.offset // 4 :][..., : TILE_TOKENS * s.words]
            by_token = plane.unflatten(-1, (TILE_TOKENS, s.words) if is_key else (s.words, TILE_TOKENS))
            words.append(by_token[row, :, token] if is_key else by_token[row, :, :, order])
        scale = records.view(torch.float16)[..., offset // 2 : offset // 2 + TILE_TOKENS][row, :, token]
        found += [unpack_words(words, bits, page.head_dim), scale]
    return found


def cosines(x, codes, bits):
    """Return <y, c> / (|y| |c|), f64 [...], of vectors x [..., head_dim] and codes."""
    y = get_rotation(x.shape[-1]).forward(x.double())
    c = decode_vectors(codes, torch.ones(codes.shape[:-1]), bits).double()
    return torch.nn.functional.cosine_similarity(y, c, dim=-1, eps=1e-300)


def on_a_threshold(x, codes, reference, config, bits):
    """Say for each vector x [n, head_dim] whether codes and reference differ only where, for one of the candidates, a
    coordinate stands within 2e-5 of the threshold between the two levels (or within 1e-5 of 0 for a sign)."""
    y = get_rotation(x.shape[-1]).forward(x.double())
    u = y * (math.sqrt(x.shape[-1]) / y.norm(dim=-1, keepdim=True))
    low = 2 ** (bits - 1) - 1
    upper = torch.maximum(codes & low, reference & low).long()
    levels = torch.tensor(PAGE_LEVELS[bits])
    steps = torch.cat((torch.tensor([math.inf]), (levels[1:] + levels[:-1] + 1).double())) * PAGE_UNIT[bits]
    ratio = u.abs() / steps[upper]  # [n, head_dim]
    near = (ratio[..., None] / torch.tensor(config.scale_search) - 1).abs().amin(-1) < 2e-5
    near &= ((codes & low).int() - (reference & low).int()).abs() == 1
    near |= ((codes ^ reference) == low + 1) & (u.abs() < 1e-5)
    return (near | (codes == reference)).all(-1)


def run_both(preset, key, value, slots, positions=None, key_offset=None, block_size=16, padding=0):
    """Store with CUDA and with PyTorch on the CPU into equal caches; return (page, CUDA bytes, CPU bytes, view)."""
    page = TurboQuantPage(PRESETS[preset], key.shape[-1])
    num_blocks = max(1, int(slots.max()) // block_size + 1)
    generator = torch.Generator().manual_seed(1)
    storage, view = empty_cache(page, num_blocks, key.shape[1], block_size, generator, padding)
    on_gpu = storage.cuda()

    def cuda(x):
        return None if x is None else x.cuda()

    cuda_store.store_kv(cuda(key), cuda(value), view(on_gpu), cuda(slots), cuda(positions), cuda(key_offset), preset)
    torch_ops.store_kv(key, value, view(storage), slots, positions, key_offset, preset)
    return page, on_gpu.cpu(), storage, view


def check_near_ties(page, got, expected, view, key, value, slots, allowed=1e-4):
    """Differences must be near-ties: codes as close to the vector as the reference's, scales a last digit apart.

    Trellis codes of a near-tie are another path through the block, as near by the sums that chose it: their cosines are
    2 % apart at most.
    """
    stored = slots >= 0
    n = int(stored.sum())
    found = read_slots(view(got), page, slots[stored])
    reference = read_slots(view(expected), page, slots[stored])
    key, value = key[: len(slots)][stored], value[: len(slots)][stored]
    differing = 0
    for i, x, bits in ((0, key, page.config.key_width), (2, value, page.config.value_width)):
        codes, scale, codes_ref, scale_ref = found[i], found[i + 1], reference[i], reference[i + 1]
        differing += int((codes != codes_ref).sum())
        rows = (codes != codes_ref).any(-1)
        gap = (cosines(x[rows], codes[rows], bits) - cosines(x[rows], codes_ref[rows], bits)).abs()
        near = gap < (2e-6 if bits < 8 else 1e-4 if bits == 8 else 2e-2)
        if bits < 8:
            near |= on_a_threshold(x[rows], codes[rows], codes_ref[rows], page.config, bits)
        assert near.all(), f"{page}: {gap[~near]}"
        torch.testing.assert_close(scale[~rows].float(), scale_ref[~rows].float(), rtol=1.1e-3, atol=6e-8)
        torch.testing.assert_close(scale[rows].float(), scale_ref[rows].float(), rtol=0.5, atol=0)
    if page.config.key_sketch:
        check_sketches(page, key, found, reference)
    share = differing / (2 * n * key.shape[1] * key.shape[2])
    assert share <= allowed, f"{page}: {share} of the codes differ"
    return share


def check_sketches(page, key, found, reference):
    """Where codes and scale of a key are equal, signs of the sketch differ at coordinates near 0 alone."""
    codes, scale, signs, sketch_scale = (reference[i] for i in (0, 1, 4, 5))
    same = (found[0] == codes).all(-1) & (found[1] == scale)
    centroids = decode_vectors(codes[same], torch.ones_like(scale[same]), page.config.key_width)
    decoded = centroids.double() * scale[same].double()[..., None]
    residual = get_rotation(page.head_dim).forward(key.double())[same] - decoded
    sketched = page_sketch(page.head_dim).forward(residual) / residual.norm(dim=-1, keepdim=True).clamp(min=1e-30)
    assert (sketched.abs()[found[4][same] != signs[same]] < 1e-4).all()
    assert same.float().mean() > 0.9
    torch.testing.assert_close(found[5][same].float(), sketch_scale[same].float(), rtol=1.1e-3, atol=6e-8)


def check_untouched(page, got, expected, view, slots):
    """Bytes outside the stored slots are as before: with the slots made equal, all bytes are."""
    zeros = torch.zeros(len(slots), view(got).shape[1], page.head_dim)
    for storage in (got, expected):
        torch_ops.store_kv(zeros, zeros, view(storage), slots, None, None, page.config.name)
    assert torch.equal(got, expected)


BYTES = [
    (preset, head_dim)
    for preset, head_dim in PAGES
    if preset != "turboquant:k4v4" and (not PRESETS[preset].trellis or head_dim in cuda_store.TRELLIS_HEAD_DIMS)
]


@pytest.mark.parametrize("preset, head_dim", BYTES)
def test_bytes(preset, head_dim):
    generator = torch.Generator().manual_seed(head_dim)
    for dtype, block_size, padding in zip(DTYPES, (16, 64, 48), (0, 48, 16), strict=True):
        num_tokens, num_kv_heads = 203, 3
        key, value = (
            torch.randn(num_tokens, num_kv_heads, head_dim, generator=generator).mul_(3).to(dtype) for _ in range(2)
        )
        key[:, :, 5] *= 20  # an outlier channel
        slots = torch.randperm(400, generator=generator)[: num_tokens - 3]
        slots[torch.randperm(len(slots), generator=generator)[:30]] = -1
        page, got, expected, view = run_both(preset, key, value, slots, block_size=block_size, padding=padding)
        check_near_ties(page, got, expected, view, key.float(), value.float(), slots, allowed=1e-3)
        check_untouched(page, got, expected, view, slots)


def test_near_ties_are_rare():
    """Of 3 million codes fewer than 1e-4 differ."""
    generator = torch.Generator().manual_seed(0)
    for name in ("", ":k3v3", ":k5v4", ":k2v2", ":t3", ":t2"):
        preset = f"turboquant{name}"
        key, value = (torch.randn(1500, 8, 128, generator=generator).bfloat16() for _ in range(2))
        slots = torch.arange(1500)
        page, got, expected, view = run_both(preset, key, value, slots)
        share = check_near_ties(page, got, expected, view, key.float(), value.float(), slots)
        print(f"{preset}: {share:.1e} of the codes differ")


@pytest.mark.parametrize(
    "preset, head_dim",
    [
        *itertools.product([f"turboquant{name}" for name in ("", ":k8v8", ":k5v4", ":k2v2", ":prod")], (64, 112, 128)),
        *itertools.product(("turboquant:t3", "turboquant:t2"), cuda_store.TRELLIS_HEAD_DIMS),
    ],
)
def test_strange_vectors(preset, head_dim):
    """NaN, inf, 0, huge, tiny, one-hot: finite scales, zeros where the contract says so, neighbours unharmed."""
    generator = torch.Generator().manual_seed(3)
    key, value = (torch.randn(64, 2, head_dim, generator=generator) for _ in range(2))
    for x in (key, value):
        x[1, 0, 3], x[2, 0, 4], x[3, 0] = math.nan, math.inf, 0.0
        x[4, 0], x[5, 0] = 1e30, 1e-30
        x[6, 0] = 0.0
        x[6, 0, 7] = 1.0
        x[7, 0] *= 1e6
        x[8, 0] *= 1e-6
        x[9, 0, 1] = -math.inf
    slots = torch.arange(64)
    page, got, expected, view = run_both(preset, key, value, slots, block_size=64)
    empty = torch.tensor([1, 2, 3, 4, 5, 9])
    found, reference = read_slots(view(got), page, slots), read_slots(view(expected), page, slots)
    for i in range(0, len(found), 2):
        assert (found[i][empty, 0] == 0).all() and (found[i + 1][empty, 0] == 0).all()
        assert found[i + 1].isfinite().all()
    ordinary = torch.cat((torch.tensor([0]), torch.arange(10, 64)))
    for i in (0, 2):
        assert torch.equal(found[i][ordinary], reference[i][ordinary])
        torch.testing.assert_close(found[i + 1][ordinary], reference[i + 1][ordinary], rtol=1.1e-3, atol=0)


@pytest.mark.parametrize("offset_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("positions_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("head_dim", [80, 128, 256])
def test_key_offset(head_dim, positions_dtype, offset_dtype):
    generator = torch.Generator().manual_seed(4)
    key, value = (torch.randn(300, 4, head_dim, generator=generator).bfloat16() for _ in range(2))
    key_offset = torch.randn(4, 4, head_dim, generator=generator).mul_(5).to(offset_dtype)
    positions = torch.arange(300) + 7  # past the last segment too
    centred = key.float() - offset_at(key_offset, positions).float()
    slots = torch.arange(300)
    page, got, expected, view = run_both("turboquant", key, value, slots, positions.to(positions_dtype), key_offset)
    check_near_ties(page, got, expected, view, centred, value.float(), slots, allowed=1e-3)
    assert not torch.equal(encode_kv(key, value, page.config).key_codes, read_slots(view(got), page, slots)[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shift", [0, 1])
def test_slices_of_a_fused_tensor(dtype, shift):
    """Keys and values as slices of qkv, aligned to 16 bytes or not."""
    generator = torch.Generator().manual_seed(5)
    fused = torch.randn(40, 2 * 2 * 128 + shift, generator=generator).to(dtype)
    page = TurboQuantPage(PRESETS["turboquant"], 128)
    storage, view = empty_cache(page, 3, 2, 16, generator)
    on_gpu = storage.cuda()
    slots = torch.arange(40)
    for rows, target, store, where in ((fused.cuda(), on_gpu, cuda_store, "cuda"), (fused, storage, torch_ops, "cpu")):
        key, value = rows[:, shift:].unflatten(1, (4, 128)).split(2, 1)
        store.store_kv(key, value, view(target), slots.to(where), None, None, "turboquant")
    check_near_ties(page, on_gpu.cpu(), storage, view, *(x.float() for x in (key, value)), slots, allowed=1e-3)


def test_graph_replay_reads_the_slots_of_the_moment():
    generator = torch.Generator().manual_seed(6)
    page = TurboQuantPage(PRESETS["turboquant"], 128)
    key, value = (torch.randn(64, 8, 128, generator=generator).bfloat16().cuda() for _ in range(2))
    slots = torch.full((64,), -1, device="cuda")
    storage, view = empty_cache(page, 8, 8, 16, generator)
    captured, direct = storage.cuda(), storage.cuda()
    cuda_store.store_kv(key, value, view(captured), slots, None, None, "turboquant")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        cuda_store.store_kv(key, value, view(captured), slots, None, None, "turboquant")
    assert torch.equal(captured.cpu(), storage)
    slots.copy_(torch.randperm(128, generator=generator)[:64])
    graph.replay()
    cuda_store.store_kv(key, value, view(direct), slots, None, None, "turboquant")
    assert torch.equal(captured, direct) and not torch.equal(captured.cpu(), storage)


def test_wrong_arguments_are_refused():
    page = TurboQuantPage(PRESETS["turboquant"], 64)
    cache = torch.zeros(2, 2, 16, page.slot_bytes, dtype=torch.uint8, device="cuda")
    key = torch.zeros(4, 2, 64, device="cuda")
    slots = torch.arange(4, device="cuda")
    with pytest.raises(ValueError, match="a multiple of 16"):
        cuda_store.store_kv(key, key, cache, slots, None, None, "turboquant:k8v8")
    with pytest.raises(ValueError, match="slot_mapping"):
        cuda_store.store_kv(key, key, cache, slots.int(), None, None, "turboquant")
    with pytest.raises(ValueError, match="key and value"):
        cuda_store.store_kv(key, key[:, :1], cache, slots, None, None, "turboquant")
    with pytest.raises(ValueError, match="positions"):
        cuda_store.store_kv(key, key, cache, slots, None, key[:1], "turboquant")
