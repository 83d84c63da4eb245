"""What holds for all tests: the order in which they run, and what their environment says to vLLM and Triton."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is first imported, which vLLM may do


def pytest_collection_modifyitems(items):
    """Quick tests first, those that start vLLM last; within both groups the order stays as collected."""
    items.sort(key=lambda item: "e2e" in item.path.parts)


def pytest_runtest_setup(item):
    """A real server starts as a user starts it, whatever the tests before it needed in this process."""
    if "e2e" in item.path.parts:
        for variable in ("TRITON_INTERPRET", "VLLM_PLUGINS"):
            os.environ.pop(variable, None)
