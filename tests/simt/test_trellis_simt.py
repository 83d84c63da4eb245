"""The CUDA search through a trellis block, compiled for a CPU, against the PyTorch one: paths, levels and words."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from tq_vllm.config import TRELLIS
from tq_vllm.core import trellis
from tq_vllm.core.codebook_tables import TRELLIS_UNIT
from tq_vllm.core.codebooks import trellis_centroids
from tq_vllm.format import pack_words

HERE = Path(__file__).parent
CSRC = HERE.parent.parent / "csrc"
BLOCKS = 20_000

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")


@pytest.fixture(scope="module")
def search(tmp_path_factory):
    """search(bits, blocks f32 [n, 32], cells) -> (words int32 [n, 3], sums f32 [n, 3]) of trellis.cpp."""
    folder = tmp_path_factory.mktemp("simt")
    for source in (*CSRC.glob("*.cuh"), *HERE.glob("*.h"), HERE / "trellis.cpp"):
        shutil.copy(source, folder)
    flags = ["-std=c++17", "-O2", "-ffp-contract=off", "-w", "-include", "simt.h", "-I.", "-shared", "-fPIC"]
    subprocess.run(["g++", *flags, "trellis.cpp", "-o", "trellis.so"], check=True, cwd=folder)
    library = ctypes.CDLL(str(folder / "trellis.so"))

    def run(bits, blocks, cells):
        words, sums = torch.empty(len(blocks), 3, dtype=torch.int32), torch.empty(len(blocks), 3)
        pointers = [ctypes.c_void_p(x.data_ptr()) for x in (blocks, words, sums)]
        library.simt_trellis(bits, pointers[0], len(blocks), ctypes.c_float(cells), *pointers[1:])
        return words, sums

    return run


@pytest.mark.parametrize("scale", [1.0, 0.85, 1.28])
@pytest.mark.parametrize("bits", [2, 3])
def test_search(search, bits, scale):
    blocks = torch.randn(BLOCKS, 32, generator=torch.Generator().manual_seed(bits))
    words, sums = search(bits, blocks, 1 / (scale * TRELLIS_UNIT[bits]))

    levels, y = trellis_centroids(bits), blocks.t() / scale
    paths = trellis.closest_paths(y, levels)
    codes, index = trellis.quantize(y, paths, levels)
    c = levels[index].double()
    alike = words[:, 2] == paths
    assert alike.float().mean() > 0.9995  # near-ties: the units of the two sides differ
    square, unit = (y - c).square().sum(0), TRELLIS_UNIT[bits]
    found = (y.double().square().sum(0) / unit**2 - 2 * sums[:, 1] + sums[:, 2]) * unit**2
    torch.testing.assert_close(found[alike], square[alike], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.mean(), square.mean(), rtol=1e-4, atol=0)
    torch.testing.assert_close(sums[alike, 2].double() * unit**2, c.square().sum(0)[alike], rtol=1e-5, atol=0)
    open_distance = trellis.open_distances(y, levels)
    torch.testing.assert_close(sums[:, 0] * unit**2, open_distance, rtol=1e-4, atol=1e-4)

    # One block is a vector of 32 coordinates: its words as the page holds them.
    as_vector = torch.empty_like(codes.t())
    as_vector[:, trellis.block_order(32)[0]] = codes.t()
    packed = torch.cat(pack_words(as_vector, TRELLIS + bits), -1)  # [n, uncoded words and the coded one]
    same = (words[:, [0, 2] if bits == 2 else [0, 1, 2]] == packed).all(-1)
    assert (same | ~alike).float().mean() > 0.9995
