"""The CUDA write kernel run on a CPU, lane by lane (simt.h), against the PyTorch write: equal bytes but for near-ties.

Shows the kernel's logic: rotations, signs, planes, scales. Instructions are modelled: nothing here speaks of a device.
"""

import contextlib
import ctypes
import math
import shutil

import pytest
import torch

from tests.ops.batches import FORMATS, Batch
from tests.ops.test_store import read_slot
from tq_vllm.config import PRESETS
from tq_vllm.format import SUPPORTED_HEAD_DIMS, TurboQuantPage
from tq_vllm.ops import cuda_store, torch_ops

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")


@pytest.fixture(scope="module")
def simulator(compile_simt):
    return compile_simt("store")


@pytest.fixture(autouse=True)
def on_cpu(simulator, monkeypatch):
    """Let cuda_store launch on the simulator."""

    class Library:
        wide = 0

        def tq_store_kv(self, params, stream):
            assert simulator.simt_store_params_bytes() == ctypes.sizeof(cuda_store.StoreParams)
            simulator.simt_store_kv(params, 2, self.wide)
            return 0

    library = Library()
    monkeypatch.setattr(cuda_store, "library", lambda: library)
    monkeypatch.setattr(cuda_store, "stream_of", lambda tensor: ctypes.c_void_p(0))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    return library


def check(allowed=2e-3, spoil=None, **fields):
    """Write a batch with both and compare slot by slot; `allowed`: share of the codes that may differ."""
    ours, expected = (Batch(seq_lens=(37,), query_lens=(1,), **fields) for _ in range(2))
    for batch in (ours, expected):
        if spoil is not None:
            spoil(batch)
    positions = torch.arange(37)
    slots = ours.slots(0, positions)
    slots[5] = -1
    untouched = ours.kv_cache.clone()
    cuda_store.store_kv(ours.keys[0], ours.values[0], ours.kv_cache, slots, positions, ours.key_offset, ours.preset)
    expected.store(0, 0, 37)
    page = TurboQuantPage(ours.config, ours.head_dim)
    skipped = ours.slots(0, positions)[5].item()
    before, after = (read_slot(x, page, skipped, 0) for x in (untouched, ours.kv_cache))
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(before, after, strict=True))
    parts = 3 if page.config.key_sketch else 2
    different = total = 0
    for slot in slots[slots >= 0].tolist():
        for head in range(ours.num_kv_heads):
            got, want = (read_slot(x.kv_cache, page, slot, head) for x in (ours, expected))
            for a, b in zip(got[:parts], want[:parts], strict=True):
                different, total = different + (a != b).sum().item(), total + a.numel()
            if all(torch.equal(a, b) for a, b in zip(got[:parts], want[:parts], strict=True)):
                for a, b in zip(got[parts:], want[parts:], strict=True):  # a last digit of f16
                    assert math.isclose(a, b, rel_tol=2**-9, abs_tol=6e-8), (got[parts:], want[parts:])
    assert different <= allowed * total, f"{different} of {total} codes"


@pytest.mark.parametrize("head_dim", SUPPORTED_HEAD_DIMS)
def test_every_head_size(on_cpu, head_dim):
    """On many and, `wide`, few tokens; key sketches have one kernel for both."""
    for preset, on_cpu.wide, dtype in (
        ("turboquant:prod", 0, torch.float32), ("turboquant:prod", 0, torch.bfloat16),
        ("turboquant:k3v3", 0, torch.float32), ("turboquant:k5v4", 1, torch.bfloat16),
    ):  # fmt: skip
        check(preset=preset, head_dim=head_dim, dtype=dtype, with_offset=True)


@pytest.mark.parametrize(
    "preset", [p for p in FORMATS if not PRESETS[p].trellis and p not in ("turboquant:k4v4", "turboquant:prod")]
)
def test_presets(preset):
    check(preset=preset, head_dim=128)


@pytest.mark.parametrize("head_dim", cuda_store.TRELLIS_HEAD_DIMS)
@pytest.mark.parametrize("preset", ["turboquant:t3", "turboquant:t2"])
@pytest.mark.parametrize("dtype, with_offset", [(torch.float32, False), (torch.bfloat16, True)], ids=["f32", "bf16"])
def test_bytes_of_trellis_codes(preset, head_dim, dtype, with_offset):
    """All alike, but for a scale at a near-tie of float16 or a block at one of paths."""
    fields = {"seq_lens": (37,), "query_lens": (1,), "with_offset": with_offset}
    batch = Batch(preset=preset, head_dim=head_dim, dtype=dtype, **fields)
    key, value, positions = batch.keys[0], batch.values[0], torch.arange(37)
    key[5], value[6] = 0.0, torch.nan
    slots = batch.slots(0, positions)
    slots[::9] = -1
    offset = batch.key_offset if with_offset else None
    caches = [batch.kv_cache.clone(), batch.kv_cache.clone()]
    for ops, kv_cache in zip((cuda_store, torch_ops), caches, strict=True):
        ops.store_kv(key, value, kv_cache, slots, positions, offset, preset)
    found, expected = (x.view(torch.uint8) for x in caches)
    written = (expected != batch.kv_cache).sum()
    assert written > 30 * batch.num_kv_heads * head_dim // 4
    assert (found != expected).sum() <= 0.005 * written


@pytest.mark.parametrize("preset", ["turboquant", "turboquant:prod"])
def test_strange_vectors(preset):
    """Zeros, NaN, inf, above the range of a norm, above that of a scale, below it: as PyTorch stores them."""

    def spoil(batch):
        for x in (batch.keys[0], batch.values[0]):
            x[1], x[2, 0, 3], x[3, 0, 4], x[4], x[6], x[7] = 0, math.nan, math.inf, 1e30, x[6] * 1e10, x[7] * 1e-12

    check(preset=preset, head_dim=64, spoil=spoil)


def test_the_comparison_sees_a_wrong_sketch(on_cpu, monkeypatch):
    from tq_vllm.core import qjl
    from tq_vllm.core.rotations import get_rotation

    monkeypatch.setattr(qjl, "page_sketch", lambda d: get_rotation(d, seed=2))
    with pytest.raises(AssertionError, match="codes"):
        check(preset="turboquant:prod", head_dim=64)
