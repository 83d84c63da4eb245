"""The CUDA write of trellis codes run on a CPU, lane by lane (simt.h), against the bytes of the PyTorch write."""

import contextlib
import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from tests.ops.batches import Batch
from tq_vllm.ops import cuda_ops, torch_ops

HERE = Path(__file__).parent
CSRC = HERE.parent.parent / "csrc"

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")


@pytest.fixture(scope="module")
def simulator(tmp_path_factory):
    folder = tmp_path_factory.mktemp("simt")
    for source in (*CSRC.glob("*.cuh"), *CSRC.glob("*.h"), *HERE.glob("*.h"), *HERE.glob("*.c*")):
        shutil.copy(source, folder)
    for header in ("cuda_runtime.h", "cuda_fp16.h", "cuda_bf16.h", "early_start.cuh"):
        (folder / header).write_text('#include "simt.h"\n')
    flags = ["-std=c++17", "-O1", "-w", "-fpermissive", "-I.", "-shared", "-fPIC"]
    subprocess.run(["g++", *flags, "store.cpp", "-o", "store.so"], check=True, cwd=folder)
    return ctypes.CDLL(str(folder / "store.so"))


@pytest.fixture(autouse=True)
def on_cpu(simulator, monkeypatch):
    """Let cuda_ops launch on the simulator."""

    class Library:
        def tq_store_kv(self, params, stream):
            return simulator.simt_store_kv(params)

    assert simulator.simt_store_params_bytes() == ctypes.sizeof(cuda_ops._StoreParams)
    monkeypatch.setattr(cuda_ops, "library", lambda: Library())
    monkeypatch.setattr(cuda_ops, "stream_of", lambda tensor: ctypes.c_void_p(0))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())


@pytest.mark.parametrize("head_dim", cuda_ops.TRELLIS_HEAD_DIMS)
@pytest.mark.parametrize("preset", ["turboquant:t3", "turboquant:t2"])
@pytest.mark.parametrize("dtype, with_offset", [(torch.float32, False), (torch.bfloat16, True)], ids=["f32", "bf16"])
def test_bytes(preset, head_dim, dtype, with_offset):
    """All alike, but for a scale at a near-tie of float16 or a block at one of paths."""
    fields = {"seq_lens": (37,), "query_lens": (1,), "with_offset": with_offset}
    batch = Batch(preset=preset, head_dim=head_dim, dtype=dtype, **fields)
    key, value, positions = batch.keys[0], batch.values[0], torch.arange(37)
    key[5], value[6] = 0.0, torch.nan
    slots = batch.slots(0, positions)
    slots[::9] = -1
    offset = batch.key_offset if with_offset else None
    caches = [batch.kv_cache.clone(), batch.kv_cache.clone()]
    for ops, kv_cache in zip((cuda_ops, torch_ops), caches, strict=True):
        ops.store_kv(key, value, kv_cache, slots, positions, offset, preset)
    found, expected = (x.view(torch.uint8) for x in caches)
    written = (expected != batch.kv_cache).sum()
    assert written > 30 * batch.num_kv_heads * head_dim // 4
    assert (found != expected).sum() <= 0.005 * written
