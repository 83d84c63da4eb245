"""Presets whose newest tokens have a cache of their own, in real vLLM: sequences that it holds whole are near-lossless.

The crowd (test_crowd.py) has one of them too: prefix hits, preemption, cancellations, faults.
"""

import pytest
import torch
from compare import distances
from engine import CUDA, GRAPHS, Phase, Request, run

PRESET, CODES_ALONE = "turboquant:k3v3-r128", "turboquant:k3v3"
pytestmark = pytest.mark.engine
CLOSE = 0.05  # nats, as in test_features.py


def _gemma():
    """Sliding layers, of a window that is longer than the newest tokens, and full layers by turns; soft cap."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=512, hidden_size=256, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=1, head_dim=256, sliding_window=200, attn_logit_softcapping=3.0,
        max_position_embeddings=1024, initializer_range=0.1, query_pre_attn_scalar=16,
    )  # fmt: skip
    return Gemma2ForCausalLM(config)


@pytest.mark.parametrize(
    "graphs",
    [False, pytest.param(True, marks=[pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="no CUDA device")])],
    ids=["eager", "CUDA graphs"],
)
def test_short_sequences_are_near_lossless_and_long_ones_better(text_ids, tmp_path, graphs):
    torch.manual_seed(0)
    _gemma().save_pretrained(tmp_path / "model")
    ids = [i % 512 for i in text_ids]
    lengths = {"short": 20, "just": 100, "long": 300, "longer": 450}
    requests = [Request(n, ids[k : 2 * k], forced=ids[2 * k : 2 * k + 24]) for n, k in lengths.items()]
    engine = {"max_num_batched_tokens": 64, "skip_tokenizer_init": True} | (GRAPHS if graphs else {})
    found = [
        run(str(tmp_path / "model"), engine | {"kv_cache_dtype": dtype}, [Phase("read", requests)], tmp_path)
        for dtype in ("auto", PRESET, CODES_ALONE)
    ]
    stock, ours, alone = (result.phases["read"] for result in found)
    near, far = distances(stock, ours), distances(stock, alone)
    print(near, far)
    for name in ("short", "just"):
        assert near[name] < CLOSE < far[name]
    for name in ("long", "longer"):
        assert near[name] < 0.8 * far[name]
