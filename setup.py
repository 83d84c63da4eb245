"""Builds the CUDA extension when it can be built; everything else about the package is in pyproject.toml."""

import os
import shutil
from pathlib import Path

from setuptools import setup


def wants_cuda() -> bool:
    """TQ_BUILD_CUDA=1 builds, TQ_BUILD_CUDA=0 does not; unset, it is built when nvcc is found."""
    choice = os.environ.get("TQ_BUILD_CUDA")
    wanted = choice == "1" or (choice is None and shutil.which("nvcc") is not None)
    why = f"TQ_BUILD_CUDA={choice}" if choice is not None else f"nvcc {'found' if wanted else 'not found'}"
    print(f"tq_vllm: CUDA extension {'will be built' if wanted else 'is not built'} ({why})")
    return wanted


def cuda_extension() -> dict:
    """The setup() arguments that build tq_vllm._C from csrc/ against the installed torch."""
    from torch.utils.cpp_extension import BuildExtension, CUDAExtension

    sources = sorted(str(path) for pattern in ("*.cu", "*.cpp") for path in Path("csrc").glob(pattern))
    extension = CUDAExtension("tq_vllm._C", sources, py_limited_api=True)
    return {"ext_modules": [extension], "cmdclass": {"build_ext": BuildExtension}}


setup(**(cuda_extension() if Path("csrc").is_dir() and wants_cuda() else {}))
