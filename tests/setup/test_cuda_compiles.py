"""The CUDA kernels compile for every compute capability of a wheel (`make build`: all presets and head sizes)."""

import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
ARCHITECTURES = ("80", "90", "100", "120")  # the default of setup.py


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on the PATH")
@pytest.mark.parametrize(
    "source, head_dim, rows", [("decode_instance", 64, 4), ("decode_instance", 64, 16), ("store_kv_instance", 80, 0)]
)
def test_kernels(source, head_dim, rows, tmp_path):
    """Of attention the kernels of the default preset, for blocks of `rows` query rows."""
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    defines = [f"-DTQ_HEAD_DIM={head_dim}", f"-DTQ_ROWS={rows}", "-DTQ_DEFAULT_PRESET"]
    command = ["nvcc", "-std=c++17", "-O3", *targets, *defines, "-c", f"{source}.cu", "-o", str(tmp_path / "out.o")]
    done = subprocess.run(command, cwd=CSRC, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert not [line for line in done.stderr.splitlines() if "warning" in line]
