"""The page layout, codebooks and rotation tables compiled into the CUDA library against those of the package."""

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ops.batches import PAGES
from tq_vllm.config import PRESETS
from tq_vllm.format import SUPPORTED_HEAD_DIMS, TurboQuantPage, pack_words
from tq_vllm.ops import cuda_library, cuda_store

ROOT = Path(__file__).resolve().parents[2]
needs_library = pytest.mark.skipif(cuda_library.why_missing() is not None, reason=str(cuda_library.why_missing()))


@needs_library
@pytest.mark.parametrize("preset, head_dim", PAGES)
def test_offsets(preset, head_dim):
    page = TurboQuantPage(PRESETS[preset], head_dim)
    out = (ctypes.c_int32 * 9)()
    config = page.config
    cuda_library.library().tq_layout(config.key_width, config.value_width, head_dim, int(config.key_sketch), out)
    planes = [s.offset for s in page.key_sections], [s.offset for s in page.value_sections]
    expected = [offset for p in planes for offset in (*p, -1)[:2]]
    assert list(out)[:7] == [*expected, page.key_scale_offset, page.value_scale_offset, page.tile_bytes]
    if config.key_sketch:
        assert list(out)[7:] == [page.sketch_sections[0].offset, page.sketch_scale_offset]


@needs_library
@pytest.mark.parametrize("head_dim", SUPPORTED_HEAD_DIMS)
@pytest.mark.parametrize("plane", [8, 4, 2, 1])
def test_bits(plane, head_dim):
    torch = pytest.importorskip("torch")
    bit, sign = (ctypes.c_int32 * head_dim)(), (ctypes.c_int32 * head_dim)()
    cuda_library.library().tq_coordinate_bits(plane, head_dim, bit, sign)
    bits, code = {8: (8, 1), 4: (4, 1), 2: (2, 1), 1: (3, 4)}[plane]  # a code whose field in the plane is 1
    for codes, expected in ((code, bit), (8 if plane == 4 else None, sign)):
        if codes is None:
            continue
        words = pack_words(codes * torch.eye(head_dim, dtype=torch.int64), bits)[-1 if plane == 1 else 0]
        found = [int(row[row != 0].item()) & 0xFFFFFFFF for row in words]
        assert found == [1 << b for b in expected]


@needs_library
def test_argument_structs():
    assert cuda_library.library().tq_store_params_bytes() == ctypes.sizeof(cuda_store.StoreParams)


def test_generated_tables_are_current(tmp_path):
    for name in ("codebook.cuh", "rotation_tables.cuh"):
        (tmp_path / name).write_text((ROOT / "csrc" / name).read_text())
    script = tmp_path / "generate_tables.py"
    script.write_text((ROOT / "csrc" / "generate_tables.py").read_text())
    subprocess.run([sys.executable, str(script)], check=True, env={"PYTHONPATH": str(ROOT)})
    for name in ("codebook.cuh", "rotation_tables.cuh"):
        assert (tmp_path / name).read_text() == (ROOT / "csrc" / name).read_text()
