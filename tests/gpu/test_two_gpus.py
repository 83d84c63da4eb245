"""Real vLLM on two GPUs of one host against one: tensor parallel with CUDA graphs, pipeline parallel, data parallel.

What is compared, and how it is shown that the comparison can fail: tests/e2e/parallel.py.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "e2e"))

from engine import GRAPHS  # noqa: E402
from parallel import CHUNKED, FAULT, OneWorker, make_requests  # noqa: E402

GPUS = torch.cuda.device_count()
pytestmark = [
    pytest.mark.engine,
    pytest.mark.gpu,
    pytest.mark.skipif(GPUS < 2, reason=f"needs two CUDA devices, found {GPUS}"),
]

# No NVLink multicast, in NCCL, PyTorch and vLLM: not every host that lends its GPUs has it.
TWO_GPUS = {
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",
    "VLLM_ALLREDUCE_USE_FLASHINFER": "0",
}
PRESET = "turboquant:k8v8"  # its noise floor is the lowest
START_SECONDS = 180  # of a server
_open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return OneWorker(PRESET, make_requests(), tmp_path_factory)


def _check_tensor_parallel(one: OneWorker) -> None:
    two = one.start(CHUNKED | GRAPHS | {"tensor_parallel_size": 2}, TWO_GPUS)
    assert two.workers == 2
    one.check(two.phases["read"])
    with pytest.raises(AssertionError, match="floor"):
        one.check(two.phases[FAULT])


def test_tensor_parallel(one):
    _check_tensor_parallel(one)


def test_tensor_parallel_with_the_default_preset(tmp_path_factory):
    _check_tensor_parallel(OneWorker("turboquant", make_requests(), tmp_path_factory))


def test_pipeline_parallel(one):
    two = one.start(CHUNKED | {"pipeline_parallel_size": 2}, TWO_GPUS)
    assert two.workers == 2
    one.check(two.phases["read"])


@contextmanager
def _server(model: str, log: Path):
    """`vllm serve` with two engines; yields its address."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{s.getsockname()[1]}"
    command = [
        sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", model, "--served-model-name", "random",
        "--kv-cache-dtype", PRESET, "--data-parallel-size", "2", "--api-server-count", "1",
        "--host", "127.0.0.1", "--port", address.rpartition(":")[2], "--dtype", "bfloat16", "--enforce-eager",
        "--max-model-len", "1024", "--max-num-seqs", "16", "--max-num-batched-tokens", "64",
        "--kv-cache-memory-bytes", str(256 << 20), "--no-enable-prefix-caching", "--gpu-memory-utilization", "0.1",
    ]  # fmt: skip
    env = os.environ | TWO_GPUS | {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with log.open("w") as out:
        process = subprocess.Popen(command, env=env, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        deadline = time.monotonic() + START_SECONDS
        while True:
            with suppress(OSError), _open(f"{address}/health", timeout=5):
                break
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-4000:]
            time.sleep(1)
        yield address
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(20)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def _prompt_logprobs(address: str, prompt: list[int], max_tokens: int) -> list[float]:
    """The server's log-probabilities of prompt[1:]; it must decode max_tokens tokens, too."""
    body = {"model": "random", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
    data = json.dumps(body | {"prompt_logprobs": 0}).encode()
    request = urllib.request.Request(f"{address}/v1/completions", data, {"Content-Type": "application/json"})
    with _open(request, timeout=120) as reply:
        answer = json.load(reply)
    assert answer["usage"]["completion_tokens"] == max_tokens
    seen = answer["choices"][0]["prompt_logprobs"]
    return [logprobs[str(token)]["logprob"] for token, logprobs in zip(prompt, seen, strict=True) if logprobs]


def test_data_parallel(one, tmp_path):
    """Both engines of the server answer, and as one GPU does."""
    with _server(one.model, tmp_path / "log") as address, ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda r: _prompt_logprobs(address, r.prompt, 16), one.requests))
        with _open(f"{address}/metrics", timeout=30) as reply:
            metrics = reply.read().decode()
    answered = Counter()
    for engine, count in re.findall(r'vllm:request_success_total{.*engine="(\d+)".*} ([\d.]+)', metrics):
        answered[engine] += float(count)
    assert set(+answered) == {"0", "1"} and answered.total() == len(one.requests), answered
    assert f"TurboQuant KV cache {PRESET}" in (tmp_path / "log").read_text()
    outputs = {r.id: replace(one.outputs[r.id], prompt_logprobs=p) for r, p in zip(one.requests, found, strict=True)}
    one.check(outputs, kinds=("prompt_logprobs",))
