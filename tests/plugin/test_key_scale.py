"""Key scales: what the weights of the norms of queries and keys give, and that a model's layer gets it."""

import pytest
import torch
from torch import nn
from vllm.config import set_current_vllm_config
from vllm.model_executor.layers.layernorm import GemmaRMSNorm, RMSNorm
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.models.qwen2 import Qwen2Attention

from tests.plugin.rope import HEAD_DIM, NUM_KV_HEADS, ROPES
from tq_vllm.plugin import key_scale


@pytest.fixture
def config(tiny_config, single_rank):
    config = tiny_config(max_model_len=1000)
    with set_current_vllm_config(config):
        yield config


def _module(query: torch.Tensor, key: torch.Tensor, kind=RMSNorm, rope=None, neox=True) -> nn.Module:
    """What an attention module holds: two norms with these weights, and its RoPE."""
    module = nn.Module()
    for name, weight in (("q_norm", query), ("k_norm", key)):
        norm = kind(weight.numel())
        norm.weight.data = weight.clone()
        module.add_module(name, norm)
    if rope is not None:
        module.rotary_emb = get_rope(
            HEAD_DIM, 512, is_neox_style=neox, rope_parameters=dict(ROPES[rope]), dtype=torch.float32
        )
    return module


def _weights(seed: int) -> torch.Tensor:
    """Over two decades."""
    return 10 ** (2 * torch.rand(HEAD_DIM, generator=torch.Generator().manual_seed(seed)) - 1)


def test_equal_norms_scale_nothing(config):
    weight = _weights(0)
    torch.testing.assert_close(key_scale.compute(_module(weight, weight), HEAD_DIM), torch.ones(HEAD_DIM))


def test_without_rope_every_channel_is_balanced(config):
    query, key = _weights(0), _weights(1)
    scale = key_scale.compute(_module(query, key), HEAD_DIM)
    assert scale.dtype is torch.float32 and abs(scale.log().mean()) < 1e-6
    ratio = (query / scale) / (key * scale)  # what queries and keys are multiplied by: in proportion
    torch.testing.assert_close(ratio, ratio.mean().expand(HEAD_DIM), rtol=5e-2, atol=0)  # a floor for dead channels


PAIRS = {
    "halves": ("plain", True, [(i, i + 32) for i in range(32)]),
    "neighbours": ("plain", False, [(2 * i, 2 * i + 1) for i in range(32)]),
    "partial": ("partial", True, [(i, i + 16) for i in range(16)] + [(i, i) for i in range(32, 64)]),
}


@pytest.mark.parametrize("rope, neox, pairs", PAIRS.values(), ids=PAIRS)
def test_channels_that_rope_turns_into_each_other_share_a_scale(config, rope, neox, pairs):
    query, key = _weights(0), _weights(1)
    scale = key_scale.compute(_module(query, key, rope=rope, neox=neox), HEAD_DIM)
    a, b = torch.tensor(pairs).T
    assert torch.equal(scale[a], scale[b])
    expected = ((query[a] ** 2 + query[b] ** 2) / (key[a] ** 2 + key[b] ** 2)) ** 0.25
    ratio = scale[a] / expected
    assert ratio.std() / ratio.mean() < 0.02


def test_the_weights_of_a_gemma_norm_are_counted_from_one(config):
    query, key = _weights(0), _weights(1)
    plain = key_scale.compute(_module(query, key), HEAD_DIM)
    torch.testing.assert_close(key_scale.compute(_module(query - 1, key - 1, kind=GemmaRMSNorm), HEAD_DIM), plain)


def test_dead_channels_leave_all_finite(config):
    query, key = _weights(0), _weights(1)
    query[3] = key[5] = 0
    query[7] = key[7] = 0
    scale = key_scale.compute(_module(query, key), HEAD_DIM)
    assert scale.isfinite().all() and scale.min() > 0


def test_modules_that_say_nothing_about_channels(config):
    weight = torch.zeros(HEAD_DIM)
    assert key_scale.compute(None, HEAD_DIM) is None
    assert key_scale.compute(nn.Module(), HEAD_DIM) is None
    assert key_scale.compute(_module(_weights(0), _weights(1)), 2 * HEAD_DIM) is None, "a norm over all heads"
    assert key_scale.compute(_module(weight, weight), HEAD_DIM) is None


def test_a_layer_gets_its_scale_and_a_reload_keeps_the_address(config):
    attention = Qwen2Attention(
        256, 4, NUM_KV_HEADS, dict(ROPES["plain"]), cache_config=config.cache_config,
        prefix="model.layers.0.self_attn", qk_norm=True,
    )  # fmt: skip
    impl = attention.attn.impl
    addresses = set()
    for seed in (0, 2):
        attention.q_norm.weight.data, attention.k_norm.weight.data = _weights(seed), _weights(seed + 1)
        attention.attn.process_weights_after_loading(torch.float32)
        torch.testing.assert_close(impl.key_scale, key_scale.compute(attention, HEAD_DIM))
        addresses.add(impl.key_scale.data_ptr())
    assert len(addresses) == 1 and dict(attention.attn.named_buffers())["turboquant_key_scale"] is impl.key_scale


def test_the_offset_is_one_of_scaled_keys(config):
    attention = Qwen2Attention(
        256, 4, NUM_KV_HEADS, dict(ROPES["plain"]), cache_config=config.cache_config,
        prefix="model.layers.0.self_attn", qk_norm=True,
    )  # fmt: skip
    impl, keys = attention.attn.impl, torch.randn(9, NUM_KV_HEADS, HEAD_DIM) + 3
    offsets = []
    for weights in ((_weights(0), _weights(0)), (_weights(0), _weights(1))):
        attention.q_norm.weight.data, attention.k_norm.weight.data = weights
        attention.attn.process_weights_after_loading(torch.float32)
        impl.centre(keys, False)
        offsets.append(impl.key_offset.clone())
    torch.testing.assert_close(offsets[1], offsets[0] * impl.key_scale)
    assert (impl.key_scale - 1).abs().max() > 0.5
