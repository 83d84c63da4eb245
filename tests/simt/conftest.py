"""Kernels of csrc compiled for a CPU (simt.h)."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CSRC = HERE.parent.parent / "csrc"


@pytest.fixture(scope="session")
def compile_simt(tmp_path_factory):
    """A function that compiles a .cpp of this folder: csrc as it is, its instructions from here, no CUDA headers."""

    def compile_simt(name: str) -> ctypes.CDLL:
        folder = tmp_path_factory.mktemp("simt")
        for source in (*CSRC.glob("*.cuh"), *CSRC.glob("*.h"), *HERE.glob("*.h"), *HERE.glob("*.c*")):
            shutil.copy(source, folder)
        for header in ("cuda_runtime.h", "cuda_fp16.h", "cuda_bf16.h", "early_start.cuh"):
            (folder / header).write_text('#include "simt.h"\n')
        flags = ["-std=c++17", "-O1", "-w", "-fpermissive", "-I.", "-shared", "-fPIC"]
        subprocess.run(["g++", *flags, f"{name}.cpp", "-o", f"{name}.so"], check=True, cwd=folder)
        return ctypes.CDLL(str(folder / f"{name}.so"))

    return compile_simt
