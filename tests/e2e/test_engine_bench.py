"""bench/throughput.py as a user runs it: real vLLM, the default model, two cache dtypes, tiny requests."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.engine

SCRIPT = Path(__file__).parents[2] / "bench" / "throughput.py"


def test_throughput_of_auto_and_turboquant(tmp_path):
    command = [
        sys.executable, str(SCRIPT), "--dtypes", "auto,turboquant", "--kv-cache-memory", "64MiB",
        "--out", str(tmp_path), "--", "--dtype", "bfloat16", "--max-model-len", "256",
        "--num-prompts", "4", "--random-input-len", "64", "--random-output-len", "8",
    ]  # fmt: skip
    env = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    run = json.loads((tmp_path / "throughput-custom.json").read_text())
    auto, ours = run["rows"]
    assert auto["dtype"] == "auto" and "TurboQuant" not in auto["engine"]["attention"]
    assert ours["engine"]["attention"] == "TurboQuantImpl on 30 of 30 layers"
    for row in run["rows"]:
        assert "Paris" in row["engine"]["answer"]
        assert row["engine"]["output_lens"] == [8] * 4
        assert row["output_tokens_per_s"] > 0
        assert row["kv_tokens"] == row["kv_tokens_predicted"] > 0
        assert f"--kv-cache-dtype {row['dtype']} " in row["command"]
    assert ours["kv_tokens"] > 3 * auto["kv_tokens"]
    assert ours["ratios"]["output_tokens_per_s"]["auto"] > 0
    assert "x auto" in done.stdout and "predicted" in done.stdout
