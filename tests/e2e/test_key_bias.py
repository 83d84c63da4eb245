"""A model whose key projection has a strong bias, as Qwen2's has: without the key offset its 4-bit keys are useless.

The default model with such a bias added to every layer. It stands on the rotary pairs that turn slowest, so that it
adds nearly the same to the score of every position: the model stays as good as it was, and its keys are all but equal.
"""

import json
import math
from pathlib import Path

import pytest
import torch
from engine import Phase, Request, Result, run
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.engine

SIZE = 60.0  # of a biased coordinate; a whole key of this model is 17 long
SLOW_PAIRS = 4  # of 32: the last ones turn by less than 0.06 radians in 1000 tokens
TOKENS = 513


@pytest.fixture(scope="module")
def biased_model(model, tmp_path_factory) -> str:
    """The default model as a Qwen2, whose attention is a Llama's with biases."""
    source, target = Path(model), tmp_path_factory.mktemp("biased")
    config = json.loads((source / "config.json").read_text())
    num_kv_heads, head_dim = config["num_key_value_heads"], config["head_dim"]
    weights = load_file(source / "model.safetensors")
    signs = torch.Generator().manual_seed(0)
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}.self_attn.{{}}_proj.bias"
        bias = torch.zeros(num_kv_heads, 2, head_dim // 2)  # pair i is coordinates i and i + head_dim / 2
        biased = bias[:, :, -SLOW_PAIRS:]
        biased += SIZE * (2 * torch.randint(0, 2, biased.shape, generator=signs) - 1)
        weights[name.format("q")] = torch.zeros(config["num_attention_heads"] * head_dim)
        weights[name.format("k")] = bias.flatten()
        weights[name.format("v")] = torch.zeros(num_kv_heads * head_dim)
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    config |= {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "use_sliding_window": False}
    (target / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (target / name).symlink_to(source / name)
    return str(target)


def _perplexity(result: Result) -> float:
    logprobs = result.phases["read"]["r"].prompt_logprobs
    return math.exp(-sum(logprobs) / len(logprobs))


def test_the_offset_saves_a_model_with_a_key_bias(biased_model, text_ids, tmp_path):
    phases = [Phase("read", [Request("r", text_ids[:TOKENS], max_tokens=1, prompt_logprobs=True)])]
    engine = {"max_num_batched_tokens": 64}
    uncompressed = _perplexity(run(biased_model, engine, phases, tmp_path))
    centred = _perplexity(run(biased_model, engine | {"kv_cache_dtype": "turboquant"}, phases, tmp_path))
    assert "keys centred: by the bias of the key projection" in (tmp_path / "engine.log").read_text()
    without = _perplexity(run(biased_model, engine | {"kv_cache_dtype": "turboquant"}, phases, tmp_path, centred=False))
    print(f"perplexity {uncompressed:.2f} uncompressed, {centred:.2f} turboquant, {without:.1f} without its key offset")
    assert centred < 1.05 * uncompressed
    assert without > 2 * centred
