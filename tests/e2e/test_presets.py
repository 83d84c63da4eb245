"""Every preset in real vLLM, beside the stock formats: the tokens that fit, and perplexity on fixed text."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from engine import CUDA, Phase, Request, run

from tq_vllm.cli.capacity import capacity_report
from tq_vllm.config import PRESETS

pytestmark = pytest.mark.engine

MEMORY = 192 << 20
TOKENS = 1025

# Perplexity of the default model on TOKENS tokens of the debugger's documentation, read in chunks of 64 tokens, so that
# a token sees 32 raw ones on average and the rest through the cache. As measured by this test; float noise moves it.
PERPLEXITY = {
    "auto": 13.80,
    "fp8": 14.45,
    "turboquant": 13.88,
    "turboquant:k8v8": 13.81,
    "turboquant:k8v4": 13.84,
    "turboquant:k5v4": 13.84,
    "turboquant:k4v3": 13.99,
    "turboquant:k3v3": 14.42,
    "turboquant:k3v2": 14.75,
    "turboquant:k2v2": 16.11,
    "turboquant:prod": 13.99,
    "turboquant:t3": 14.02,
    "turboquant:t2": 15.08,
    "turboquant:k4v4-r128": 13.87,
    "turboquant:k3v3-r128": 14.08,
}
NOISE = 1.02


def test_every_preset_has_a_gate():
    assert set(PERPLEXITY) == {"auto", "fp8", *PRESETS} - {"turboquant:k4v4"}
    assert replace(PRESETS["turboquant:k4v4"], name="turboquant") == PRESETS["turboquant"]


no_fp8 = pytest.mark.skipif(
    not CUDA and "AVX512" not in torch.backends.cpu.get_cpu_capability(),
    reason="vLLM's fp8 cache on a CPU needs AVX-512",
)


@pytest.mark.parametrize("name", [pytest.param(name, marks=no_fp8 if name == "fp8" else ()) for name in PERPLEXITY])
def test_capacity_and_perplexity(name, model, text_ids, tmp_path):
    request = Request("r", text_ids[:TOKENS], max_tokens=1, prompt_logprobs=True)
    engine = {"max_num_batched_tokens": 64, "max_model_len": 1280, "kv_cache_memory_bytes": MEMORY}
    result = run(model, {"kv_cache_dtype": name} | engine, [Phase("read", [request])], tmp_path)
    config = json.loads((Path(model) / "config.json").read_text())
    device = "cuda" if CUDA else "cpu"
    report = capacity_report(config, MEMORY, device=device, max_model_len=1280, max_num_batched_tokens=64)
    for predicted in (row for row in report["formats"] if row["name"] == name):  # auto has no row of that name
        assert result.capacity == predicted["num_blocks"] * result.block_size
        assert f"KV cache size: {predicted['num_tokens']:,} tokens" in (tmp_path / "engine.log").read_text()
    logprobs = result.phases["read"]["r"].prompt_logprobs
    perplexity = math.exp(-sum(logprobs) / len(logprobs))
    print(f"{name}: perplexity {perplexity:.3f}, {result.capacity // result.block_size} blocks in {MEMORY >> 20} MiB")
    assert perplexity <= PERPLEXITY[name] * NOISE
