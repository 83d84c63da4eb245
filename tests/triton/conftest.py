"""Runs the Triton kernels on a CUDA device where there is one, else in Triton's interpreter."""

import importlib.util

import pytest
import torch


@pytest.fixture(scope="session")
def triton_ops():
    """tq_vllm.ops.triton_ops with its kernels imported for the device, or for the interpreter."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("the package triton is not installed (pip install triton==3.6.0)")
    with pytest.MonkeyPatch.context() as patch:
        if not torch.cuda.is_available():
            patch.setenv("TRITON_INTERPRET", "1")  # read when a kernel's module is imported

        import tests.triton.decoded  # noqa: F401
        from tq_vllm.ops import triton_ops
    return triton_ops
