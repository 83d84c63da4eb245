"""Every Triton kernel compiles to machine code of every GPU generation, with no GPU there."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.triton.ahead_of_time import CASES, SHARED_MEMORY


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="the package triton is not installed")
@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_compiles(capability):
    """In its own process: the interpreter of the other tests can't be switched off once it is on."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "tests.triton.ahead_of_time", str(capability)],
        cwd=root, env=environment, capture_output=True, text=True, timeout=1200,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("merge_kernel") == done.stdout.count("decode_kernel") == 5
    assert done.stdout.count("prefill_kernel") == len(CASES) - 5
