"""What `make serve` passes to vLLM, and what it makes of vLLM's log."""

import json
import shlex
import socket
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from tq_vllm.cli import serve_demo
from tq_vllm.cli.demo_model import demo_model
from tq_vllm.config import PRESETS


def test_vllm_gets_the_dtype_the_port_and_the_users_flags(monkeypatch):
    args = serve_demo.parse(["--kv-cache-dtype", "turboquant:k3v3", "--port", "9", "--", "--max-model-len", "512"])
    monkeypatch.setattr(serve_demo.importlib.metadata, "version", lambda _: "0.32.0+cpu")
    command = serve_demo.serve_command("/models/x", "x", args)
    assert command[1:3] == ["serve", "/models/x"]
    for flag, value in (("--kv-cache-dtype", "turboquant:k3v3"), ("--port", "9"), ("--max-model-len", "512")):
        assert command[command.index(flag) + 1] == value
    assert "--enforce-eager" in command and "--kv-cache-memory-bytes" in command

    monkeypatch.setattr(serve_demo.importlib.metadata, "version", lambda _: "0.33.0")
    on_gpu = serve_demo.serve_command("/models/x", "x", args)
    assert "--enforce-eager" not in on_gpu and "--kv-cache-memory-bytes" not in on_gpu


def test_a_taken_port_is_told_before_anything_starts(capsys, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("started"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert serve_demo.main(["--port", str(port)]) == 1
    assert f"port {port} cannot be used" in capsys.readouterr().err


def test_a_model_path_that_is_none_is_told_before_anything_starts(capsys, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("started"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    assert serve_demo.main(["--model", "./no/such", "--port", str(port)]) == 1
    assert "MODEL=./no/such is not a directory" in capsys.readouterr().err


def test_an_unknown_preset_is_told_before_anything_starts(capsys, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("started"))
    assert serve_demo.main(["--kv-cache-dtype", "turboquant:k9v9"]) == 1
    assert capsys.readouterr().err.splitlines() == [
        f"tq_vllm: Unknown TurboQuant preset: got 'turboquant:k9v9', allowed {', '.join(PRESETS)}. "
        "Use --kv-cache-dtype turboquant if in doubt.",
        "  What to do: choose a preset: `make serve KV_CACHE_DTYPE=turboquant`.",
    ]


@pytest.mark.parametrize(
    ("preset", "token_bytes", "ratio"),
    [("turboquant", "6,120", "3.76"), ("turboquant:k8v8", "11,880", "1.94"), ("turboquant:k2v2", "3,240", "7.11")],
)
def test_the_ready_line_counts_every_byte(preset, token_bytes, ratio):
    """30 layers of 3 KV heads of 64: codes and two f16 scales a head, and 23,040 bytes in bf16."""
    line = serve_demo.cache_line(str(demo_model()), preset, 175_360)
    assert f"{token_bytes} bytes per token, 175,360 tokens fit, {ratio} times as many as bf16" in line


def test_other_caches_are_not_called_turboquant():
    assert serve_demo.cache_line("no/model", "fp8", 1000) == "vLLM's own fp8 cache, 1,000 tokens fit"


def test_the_curl_line_is_one_that_a_shell_takes():
    words = shlex.split(serve_demo.curl_line(8000, "m"))
    assert words[0] == "curl" and "http://127.0.0.1:8000/v1/chat/completions" in words
    assert json.loads(words[-1])["model"] == "m"


@pytest.mark.parametrize(
    ("log", "said"),
    [
        (
            "(EngineCore pid=1) ERROR [core.py:1] ValueError: Head size of a TurboQuant cache: got 48, allowed (64,).\n"
            "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}\n",
            "Head size of a TurboQuant cache: got 48, allowed (64,).",
        ),
        (
            "usage: vllm serve [model_tag] [options]\nvllm serve: error: argument --port: invalid int value: 'x'\n",
            "argument --port: invalid int value: 'x'",
        ),
        (
            "pydantic_core.ValidationError: 1 validation error for ModelConfig\n"
            "  Value error, Invalid repository ID or local directory specified: 'nowhere'. [type=value_error]\n",
            "Invalid repository ID or local directory specified: 'nowhere'. [type=value_error]",
        ),
        ("INFO nothing wrong here\n", "it left with exit code 9"),
    ],
)
def test_finds_the_reason_in_vllms_log(tmp_path: Path, log, said):
    (tmp_path / "log").write_text(log)
    server = SimpleNamespace(log=tmp_path / "log", process=SimpleNamespace(returncode=9))
    assert serve_demo.Server.error(server) == said
