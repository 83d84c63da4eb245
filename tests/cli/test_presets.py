"""`tq-vllm presets`, and how tables look with and without a terminal."""

import json
import os
import pty
import subprocess
import sys

import pytest

from tq_vllm import __version__
from tq_vllm.cli.__main__ import main
from tq_vllm.config import PRESETS


def test_json_has_the_bytes_of_the_format(capsys):
    assert main(["presets", "--json"]) == 0
    presets = {row["name"]: row for row in json.loads(capsys.readouterr().out)["presets"]}
    assert list(presets) == list(PRESETS)
    for name, at_64, at_128 in (("turboquant", 68, 132), ("turboquant:k5v4", 76, 148), ("turboquant:k3v3", 52, 100)):
        assert presets[name]["bytes_per_token_and_head"] == {"64": at_64, "128": at_128}
        assert presets[name]["bits_per_coordinate"]["128"] == at_128 * 8 / 256
        assert presets[name]["ratio_to_bf16"]["64"] == pytest.approx(256 / at_64)


def test_plain_text_has_one_line_a_preset(capsys):
    assert main(["presets"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 + len(PRESETS)
    assert lines[2].split() == ["turboquant", "4/4", "68", "4.250", "3.76", "132", "4.125", "3.88", "default"]
    assert all(line.isascii() for line in lines)


def test_terminal_gets_a_drawn_table():
    leader, follower = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80"}
    command = [sys.executable, "-m", "tq_vllm.cli", "presets"]
    done = subprocess.run(command, stdout=follower, stderr=subprocess.PIPE, env=environment)
    os.close(follower)
    assert done.returncode == 0, done.stderr
    output = b""
    while True:
        try:
            chunk = os.read(leader, 65536)
        except OSError:  # Linux ends a pseudo-terminal so
            break
        if not chunk:
            break
        output += chunk
    os.close(leader)
    text = output.decode()
    assert "───" in text and all(name in text for name in PRESETS)


def test_a_reader_that_leaves_gets_no_traceback():
    script = f"{sys.executable} -m tq_vllm.cli presets --json | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "")


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0 and capsys.readouterr().out == f"tq-vllm {__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["frobnicate"], ["presets", "--frobnicate"]])
def test_usage_errors_are_one_sentence(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    captured = capsys.readouterr()
    assert stop.value.code == 2 and captured.out == "" and captured.err.count("\n") == 1
    assert captured.err.endswith("--help.\n")
