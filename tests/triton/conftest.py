"""Runs the Triton kernels on a CUDA device where there is one, else in Triton's interpreter (see ../conftest.py)."""

import importlib.util

import pytest


@pytest.fixture(scope="session")
def triton_ops():
    if importlib.util.find_spec("triton") is None:
        pytest.skip("the package triton is not installed (pip install triton==3.6.0)")
    from tq_vllm.ops import triton_ops

    return triton_ops
