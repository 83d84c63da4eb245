"""The images: that they are of the versions that were tested, and get what they copy."""

import re
from pathlib import Path

from tq_vllm.cli import bootstrap

REPO = Path(__file__).resolve().parents[2]
DOCKER = REPO / "docker"


def test_the_image_is_of_the_vllm_that_the_set_up_installs():
    tag = re.search(r"^ARG VLLM_IMAGE=vllm/vllm-openai:v(.*)$", (DOCKER / "Dockerfile").read_text(), re.MULTILINE)[1]
    assert tag == bootstrap.VLLM_CUDA


def test_the_context_has_all_that_a_wheel_is_made_of():
    """BuildKit looks for an ignore file of each Dockerfile's own."""
    lists = [path.read_text() for path in sorted(DOCKER.glob("*.dockerignore"))]
    assert len(lists) == 2 and lists[0] == lists[1]
    kept = [line[1:] for line in lists[0].splitlines() if line.startswith("!")]
    assert {"setup.py", "pyproject.toml", "csrc", "triton_kernels", "tq_vllm"} <= set(kept)
    assert all((REPO / name).exists() for name in kept)
