"""A model whose norms favour some channels of queries and others of keys, in real vLLM, is served as a balanced one."""

import pytest
import torch
from compare import distances
from engine import CUDA, Phase, Request, Result, run

pytestmark = pytest.mark.engine


def _save(directory, factors: torch.Tensor) -> str:
    """A small Qwen3 of random weights; queries are multiplied and keys divided by `factors` [head_dim / 2] of pairs."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=512, hidden_size=256, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=1024, initializer_range=0.1,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config)
    for layer in model.model.layers:
        layer.self_attn.q_norm.weight.data = torch.cat([factors, factors]) * 2
        layer.self_attn.k_norm.weight.data = 1 / torch.cat([factors, factors])
    model.save_pretrained(directory)
    return str(directory)


def _farthest(a: Result, b: Result) -> float:
    return max(distances(a.phases["read"], b.phases["read"]).values())


def test_unbalanced_norms_are_served_like_balanced_ones(text_ids, tmp_path):
    ids = [i % 512 for i in text_ids]
    phases = [
        Phase("read", [Request(f"r{i}", ids[40 * i :][:n], forced=ids[600:624]) for i, n in enumerate((40, 150, 300))])
    ]
    factors = 10 ** (2 * torch.rand(32, generator=torch.Generator().manual_seed(1)) - 1)
    balanced, unbalanced = _save(tmp_path / "a", torch.ones(32)), _save(tmp_path / "b", factors)

    def served(model: str, dtype: str) -> Result:
        engine = {"max_num_batched_tokens": 64, "skip_tokenizer_init": True}
        engine |= {"kv_cache_dtype": dtype, "dtype": "float32"}
        return run(model, engine, phases, tmp_path)

    exact = served(balanced, "auto")
    last_digits = 1e-2 if CUDA else 1e-3  # products of float32 are rounded to fewer bits on a GPU
    assert _farthest(exact, served(unbalanced, "auto")) < last_digits, "the same model, but for the last digits"
    coded = served(balanced, "turboquant:k3v3")
    assert "scaled by the weights of the norms" in (tmp_path / "engine.log").read_text()
    error, difference = _farthest(exact, coded), _farthest(coded, served(unbalanced, "turboquant:k3v3"))
    print(f"3 bits: {error:.4f} nats from the uncompressed cache; balanced and not: {difference:.4f} apart")
    assert difference < error / 2  # 1.7 times `error` where keys are not scaled
