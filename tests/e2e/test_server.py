"""The OpenAI-compatible server, as a user runs it: one real process, real HTTP."""

import json
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    command = [
        sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", model, "--served-model-name", "demo",
        "--kv-cache-dtype", "turboquant", "--host", "127.0.0.1", "--port", str(port), "--enforce-eager",
        "--max-model-len", "1024", "--kv-cache-memory-bytes", str(128 << 20),
    ]  # fmt: skip
    env = os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with log.open("w") as out:
        process = subprocess.Popen(command, env=env, stdout=out, stderr=subprocess.STDOUT)
    client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120)
    try:
        deadline = time.monotonic() + 240
        while True:
            try:
                if client.get("/health").status_code == 200:
                    break
            except httpx.TransportError:
                pass
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(1)
        client.log = log
        yield client
    finally:
        client.close()
        process.terminate()
        process.wait(60)


def chat(client, content, **extra):
    body = {"model": "demo", "messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": 32}
    return client.post("/v1/chat/completions", json=body | extra)


def test_answers_a_question(server):
    answer = chat(server, "What is the capital of France?").json()["choices"][0]["message"]["content"]
    assert "Paris" in answer


def test_startup_names_the_cache(server):
    """The line comes from the attention implementation itself: proof of what computes the answers below."""
    text = server.log.read_text()
    assert "TurboQuant KV cache turboquant: K4V4, 204 bytes per token and layer (3 KV heads of 64)" in text
    assert all(f"{step} by torch (" in text for step in ("decode", "prefill", "store")) and "KV cache size" in text


def test_streams_and_survives_a_client_that_leaves(server):
    body = {"model": "demo", "prompt": "Once upon a time", "max_tokens": 200, "stream": True, "ignore_eos": True}
    with server.stream("POST", "/v1/completions", json=body) as response:
        lines = (line for line in response.iter_lines() if line.startswith("data: "))
        for _ in range(5):
            assert json.loads(next(lines)[6:])["choices"][0]["text"] is not None
    assert "Paris" in chat(server, "What is the capital of France?").json()["choices"][0]["message"]["content"]


def test_several_samples_with_logprobs(server):
    reply = chat(server, "Name a colour.", n=3, temperature=1.0, seed=3, logprobs=True, top_logprobs=2).json()
    assert len(reply["choices"]) == 3
    for choice in reply["choices"]:
        assert choice["logprobs"]["content"] and all(t["logprob"] <= 0 for t in choice["logprobs"]["content"])


def test_a_crowd_gets_the_answers_that_one_gets(server):
    question = "What is the capital of Italy? Answer in one word."
    alone = chat(server, question).json()["choices"][0]["message"]["content"]
    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda i: chat(server, question if i % 2 else f"Count to {i}."), range(12)))
    assert all(r.status_code == 200 for r in replies)
    assert all(r.json()["choices"][0]["message"]["content"][:4] == alone[:4] for r in replies[1::2])


def test_an_unknown_model_length_is_one_clear_error(server):
    reply = server.post("/v1/completions", json={"model": "demo", "prompt": "a " * 3000, "max_tokens": 10})
    assert reply.status_code == 400 and "1024" in reply.text
