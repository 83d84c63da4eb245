"""Two workers on one CPU, each with half of the heads, against one worker; tests/gpu/test_two_gpus.py has the GPUs."""

import pytest
from engine import CUDA
from parallel import CHUNKED, FAULT, OneWorker, make_requests

pytestmark = [pytest.mark.engine, pytest.mark.skipif(CUDA, reason="on GPUs: tests/gpu/test_two_gpus.py")]


def test_two_workers_give_the_log_probabilities_of_one(tmp_path_factory):
    one = OneWorker("turboquant", make_requests(4), tmp_path_factory)
    # Left alone, vLLM gives every worker a NUMA node of its own.
    two = one.start(CHUNKED | {"tensor_parallel_size": 2}, {"VLLM_CPU_OMP_THREADS_BIND": "nobind"})
    assert two.workers == 2
    one.check(two.phases["read"])
    with pytest.raises(AssertionError, match="floor"):
        one.check(two.phases[FAULT])
