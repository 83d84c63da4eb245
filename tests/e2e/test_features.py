"""What vLLM does with a cache beside plain decoding, in real vLLM: the near-lossless preset against the stock cache."""

import pytest
import torch
from compare import distances, worst
from engine import CUDA, GRAPHS, Phase, Request, Result, run

pytestmark = pytest.mark.engine

NEAR_LOSSLESS = "turboquant:k8v8"
CLOSE = 0.05  # nats


def _requests(ids: list[int], vocab_size: int, lengths: tuple[int, ...], decoded: int = 24) -> list[Request]:
    ids = [i % vocab_size for i in ids]
    return [
        Request(f"r{i}", ids[40 * i : 40 * i + n], forced=ids[40 * i + n : 40 * i + n + decoded])
        for i, n in enumerate(lengths)
    ]


def _farthest(a: Result, b: Result) -> float:
    found = distances(a.phases["read"], b.phases["read"])
    print(worst(found))
    return max(found.values())


def _gemma():
    """Sliding and full layers by turns, soft cap, head size 256."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=512, hidden_size=256, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=1, head_dim=256, sliding_window=32, attn_logit_softcapping=3.0,
        max_position_embeddings=1024, initializer_range=0.1, query_pre_attn_scalar=16,
    )  # fmt: skip
    return Gemma2ForCausalLM(config)


def _lfm():
    """A hybrid: short convolutions with a state of their own, and attention, by turns."""
    from transformers import Lfm2Config, Lfm2ForCausalLM

    config = Lfm2Config(
        vocab_size=512, hidden_size=256, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, layer_types=["conv", "full_attention"] * 2, max_position_embeddings=1024,
        initializer_range=0.1, conv_dim=256, block_dim=256, block_ff_dim=256, block_multiple_of=256,
        block_ffn_dim_multiplier=1.0, block_auto_adjust_ff_dim=False,
    )  # fmt: skip
    return Lfm2ForCausalLM(config)


@pytest.mark.parametrize("make", [_gemma, _lfm], ids=["sliding windows and soft cap", "hybrid"])
def test_small_models_with_random_weights(make, text_ids, tmp_path):
    torch.manual_seed(0)
    make().save_pretrained(tmp_path / "model")
    phases = [Phase("read", _requests(text_ids, 512, (7, 40, 150, 300)))]
    engine = {"max_num_batched_tokens": 64, "skip_tokenizer_init": True}
    stock, ours, coarse = (
        run(str(tmp_path / "model"), engine | {"kv_cache_dtype": dtype}, phases, tmp_path)
        for dtype in ("auto", NEAR_LOSSLESS, "turboquant:k2v2")
    )
    assert _farthest(stock, ours) < CLOSE
    assert _farthest(stock, coarse) > 3 * CLOSE  # what is read from the cache shows in these numbers


def test_layers_left_in_the_stock_format(model, text_ids, tmp_path):
    phases = [Phase("read", _requests(text_ids, 1 << 16, (9, 100, 200)))]
    engine = {"max_num_batched_tokens": 64}
    stock = run(model, engine, phases, tmp_path)
    mixed = run(
        model,
        engine | {"kv_cache_dtype": NEAR_LOSSLESS, "kv_cache_dtype_skip_layers": ["0", "29"]},
        phases,
        tmp_path,
    )
    assert _farthest(stock, mixed) < CLOSE


@pytest.mark.parametrize(
    "graphs",
    [False, pytest.param(True, marks=[pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="no CUDA device")])],
    ids=["eager", "CUDA graphs"],
)
def test_ngram_speculation(model, text_ids, tmp_path, graphs):
    """Drafts that the model accepts and drafts that it does not leave the text what it is without them."""
    prompts = [text_ids[i : i + 60] * 3 + text_ids[i : i + 8] for i in (0, 300)]
    phases = [Phase("read", [Request(f"r{i}", p, max_tokens=40) for i, p in enumerate(prompts)])]
    drafts = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}
    engine = {"kv_cache_dtype": NEAR_LOSSLESS} | (GRAPHS if graphs else {})
    plain = run(model, engine, phases, tmp_path)
    drafted = run(model, engine | {"speculative_config": drafts}, phases, tmp_path)
    assert drafted.accepted_drafts >= 10
    assert _farthest(plain, drafted) < CLOSE
