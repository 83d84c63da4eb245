"""The server of `make serve`, as a newcomer starts it: the ready line, the curl line it prints, Ctrl-C."""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys

from tq_vllm.cli.demo_model import NAME


def serve_demo(*arguments: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "tq_vllm.cli.serve_demo", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def test_ready_line_then_a_curl_line_that_answers(model):
    server = serve_demo("--port", free_port(), "--", "--max-model-len", "1024", "--kv-cache-memory-bytes", "128000000")
    try:
        lines = []
        for line in server.stdout:
            lines.append(line)
            if line.startswith("curl"):
                break
        ready = next(line for line in lines if "ready" in line)
        tokens = int(re.search(r"6,120 bytes per token, ([\d,]+) tokens fit, 3.76 times", ready)[1].replace(",", ""))
        assert tokens == 128_000_000 // (6120 * 128) * 128, "whole blocks of 128 tokens in the memory given"

        answer = subprocess.run(shlex.split(lines[-1]), capture_output=True, text=True, timeout=120, check=True).stdout
        answer = json.loads(answer)
        assert answer["model"] == NAME and "Paris" in answer["choices"][0]["message"]["content"]

        workers = subprocess.run(["pgrep", "-P", str(server.pid)], capture_output=True, text=True).stdout.split()
        assert workers
    finally:
        server.send_signal(signal.SIGINT)
        server.communicate(timeout=90)
    assert server.returncode == 0
    assert not any(os.path.exists(f"/proc/{pid}") for pid in workers), "vLLM stops with the command that started it"
