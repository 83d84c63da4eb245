"""What vLLM does with a cache beside plain decoding, in real vLLM: the near-lossless preset against the stock cache."""

import json
from pathlib import Path

import pytest
import torch
from compare import distances, worst
from engine import CUDA, GRAPHS, Phase, Request, Result, run

pytestmark = pytest.mark.engine

NEAR_LOSSLESS = "turboquant:k8v8"
TWO_CACHES = "turboquant:k4v4-r128"
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


def _llama4():
    """Chunks of 128 tokens that see only themselves, and full attention without positions, by turns."""
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    config = Llama4TextConfig(
        vocab_size=512, hidden_size=256, intermediate_size=256, intermediate_size_mlp=256, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, max_position_embeddings=1024, initializer_range=0.07,
        attention_chunk_size=128, no_rope_layers=[1, 0] * 2, num_local_experts=1, num_experts_per_tok=1,
        interleave_moe_layer_step=2,
    )  # fmt: skip
    return Llama4ForCausalLM(config)


def _gemma3n():
    """The last layers read the caches of layers before them."""
    from transformers import Gemma3nForCausalLM, Gemma3nTextConfig

    config = Gemma3nTextConfig(
        vocab_size=512, vocab_size_per_layer_input=512, hidden_size=256, hidden_size_per_layer_input=32, laurel_rank=16,
        intermediate_size=[256] * 5, num_hidden_layers=5, num_attention_heads=4, num_key_value_heads=2, head_dim=64,
        num_kv_shared_layers=2, sliding_window=32, layer_types=["sliding_attention"] * 2 + ["full_attention"]
        + ["sliding_attention", "full_attention"], activation_sparsity_pattern=[0.0] * 5,
        max_position_embeddings=1024, initializer_range=0.1,
    )  # fmt: skip
    return Gemma3nForCausalLM(config)


MODELS = {
    "sliding windows and soft cap": _gemma, "hybrid": _lfm, "chunked local attention": _llama4,
    "shared caches": _gemma3n,
}  # fmt: skip


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
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


def _save_eagle_head(directory, model: str) -> str:
    """An EAGLE head of random weights for a Llama: its drafts are wrong, and must be seen to be."""
    from safetensors.torch import save_file

    config = json.loads((Path(model) / "config.json").read_text())
    config |= {"architectures": ["EagleLlamaForCausalLM"], "num_hidden_layers": 1}
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    keys = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes = {"self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (keys, hidden),
              "self_attn.v_proj": (keys, hidden), "self_attn.o_proj": (hidden, hidden),
              "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
              "mlp.down_proj": (hidden, inner)}  # fmt: skip
    random = torch.Generator().manual_seed(0)
    weights = {f"layers.0.{name}.weight": torch.randn(shape, generator=random) / 50 for name, shape in shapes.items()}
    weights["layers.0.post_attention_layernorm.weight"] = torch.ones(hidden)
    weights["fc.weight"] = torch.randn(hidden, 2 * hidden, generator=random) / 50
    directory.mkdir()
    save_file(weights, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config))
    return str(directory)


@pytest.mark.parametrize(
    "method, preset", [("draft_model", NEAR_LOSSLESS), ("eagle", NEAR_LOSSLESS), ("eagle", TWO_CACHES)]
)
def test_drafts_of_a_model(first_layers, text_ids, tmp_path, method, preset):
    """A drafter's layers have a TurboQuant cache too; its drafts are verified against codes, and the text stays."""
    drafter = first_layers if method == "draft_model" else _save_eagle_head(tmp_path / "head", first_layers)
    drafts = {"method": method, "model": drafter, "num_speculative_tokens": 3}
    phases = [Phase("read", [Request(f"r{n}", text_ids[n : n + n], max_tokens=24) for n in (20, 170)])]
    engine = {"kv_cache_dtype": preset, "max_num_batched_tokens": 64}
    plain = run(first_layers, engine, phases, tmp_path)
    drafted = run(first_layers, engine | {"speculative_config": drafts}, phases, tmp_path)
    assert _farthest(plain, drafted) < CLOSE
    if method == "draft_model":  # the model drafts for itself
        assert drafted.accepted_drafts >= 20


@pytest.mark.parametrize(
    "graphs",
    [False, pytest.param(True, marks=[pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="no CUDA device")])],
    ids=["eager", "CUDA graphs"],
)
def test_ngram_speculation(first_layers, text_ids, tmp_path, graphs):
    """Drafts that the model accepts and drafts that it does not leave the text what it is without them."""
    prompts = [text_ids[i : i + 60] * 3 + text_ids[i : i + 8] for i in (0, 300)]
    phases = [Phase("read", [Request(f"r{i}", p, max_tokens=40) for i, p in enumerate(prompts)])]
    drafts = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}
    engine = {"kv_cache_dtype": NEAR_LOSSLESS} | (GRAPHS if graphs else {})
    plain = run(first_layers, engine, phases, tmp_path)
    drafted = run(first_layers, engine | {"speculative_config": drafts}, phases, tmp_path)
    assert drafted.accepted_drafts >= 10
    assert _farthest(plain, drafted) < CLOSE
