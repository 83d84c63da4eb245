"""What holds for all tests: how many run at once, their order, and what their environment says to vLLM and Triton."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch is imported: a core for every worker
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest  # noqa: E402
import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is first imported, which vLLM may do


@pytest.hookimpl(optionalhook=True)  # a machine without xdist runs the tests one after another
def pytest_xdist_auto_num_workers(config) -> int:
    """One process a core; none beside this one on a GPU, which engines measure before they take memory."""
    return 0 if torch.cuda.is_available() else min(4, os.cpu_count() or 1)


def pytest_collection_modifyitems(items):
    """Quick tests first, those that start vLLM last; within both groups the order stays as collected."""
    items.sort(key=lambda item: "e2e" in item.path.parts)


def pytest_runtest_setup(item):
    """A real server starts as a user starts it, whatever the tests before it needed in this process."""
    if "e2e" in item.path.parts:
        for variable in ("TRITON_INTERPRET", "VLLM_PLUGINS"):
            os.environ.pop(variable, None)
