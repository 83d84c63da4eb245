"""Key offsets: the model's own RoPE of the key bias, averaged over segments, against the formula in float64."""

import math

import pytest
import torch
from torch import nn
from vllm.config import set_current_vllm_config
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.models.llama import LlamaAttention
from vllm.model_executor.models.qwen2 import Qwen2Attention

from tests.plugin.rope import HEAD_DIM, LLAMA3, NUM_KV_HEADS, ROPES, YARN, segment_means
from tq_vllm.format import SEGMENT_TOKENS
from tq_vllm.plugin import key_offset

BIAS = torch.randn(NUM_KV_HEADS, HEAD_DIM, generator=torch.Generator().manual_seed(0)) * 30


@pytest.fixture
def config(tiny_config, single_rank):
    config = tiny_config(max_model_len=1000)
    with set_current_vllm_config(config):
        yield config


@pytest.mark.parametrize("rope", ROPES)
def test_means_are_those_of_the_formula(config, rope):
    rotary_emb = get_rope(HEAD_DIM, 2048, rope_parameters=dict(ROPES[rope]), dtype=torch.float32)
    means = key_offset.rotated_segment_means(rotary_emb, BIAS, 16)
    assert means.dtype is torch.float32 and means.shape == (16, NUM_KV_HEADS, HEAD_DIM)
    expected = segment_means(ROPES[rope], BIAS, 16)
    assert (means - expected).abs().max() < 1e-3 * BIAS.abs().max()
    # able to fail: another segment's mean is far away
    assert (means.roll(1, 0) - expected).abs().max() > 0.3 * BIAS.abs().max()


def test_chunks_make_no_difference(config, monkeypatch):
    rotary_emb = get_rope(HEAD_DIM, 2048, rope_parameters=dict(LLAMA3), dtype=torch.float32)
    whole = key_offset.rotated_segment_means(rotary_emb, BIAS, 7)
    monkeypatch.setattr(key_offset, "_POSITIONS_PER_CHUNK", 2 * SEGMENT_TOKENS)
    assert torch.equal(key_offset.rotated_segment_means(rotary_emb, BIAS, 7), whole)


def test_the_models_table_of_angles_is_left_as_it_was(config):
    rotary_emb = get_rope(HEAD_DIM, 2048, rope_parameters=dict(YARN), dtype=torch.bfloat16)
    table = rotary_emb.cos_sin_cache
    key_offset.rotated_segment_means(rotary_emb, BIAS.bfloat16(), 3)
    assert rotary_emb.cos_sin_cache is table and table.dtype is torch.bfloat16


def test_positions_past_the_table_are_its_last(config):
    rotary_emb = get_rope(HEAD_DIM, 128, rope_parameters=dict(ROPES["plain"]), dtype=torch.float32)
    means = key_offset.rotated_segment_means(rotary_emb, BIAS, 4)
    keys = BIAS.reshape(1, -1).clone()
    last, _ = rotary_emb.forward_native(torch.tensor([127]), keys, None)
    torch.testing.assert_close(means[3].flatten(), last[0])


def _loaded(attention: nn.Module, bias: torch.Tensor | None) -> object:
    """Give a model's attention module its weights; return the implementation of its layer."""
    for parameter in attention.parameters():
        nn.init.zeros_(parameter)
    if bias is not None:
        q_size = attention.num_heads * HEAD_DIM
        attention.qkv_proj.bias.data[q_size : q_size + bias.numel()] = bias.flatten()
        attention.qkv_proj.bias.data[:q_size] = 99.0
    attention.attn.process_weights_after_loading(torch.float32)
    return attention.attn.impl


def _qwen2(config, rope=ROPES["plain"], **kwargs) -> Qwen2Attention:
    return Qwen2Attention(
        256, 4, NUM_KV_HEADS, dict(rope), cache_config=config.cache_config, prefix="model.layers.0.self_attn", **kwargs
    )


@pytest.fixture(autouse=True)
def float32_default():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    yield
    torch.set_default_dtype(before)


@pytest.mark.parametrize("rope", ["plain", "llama3", "yarn"])
def test_a_qwen2_layer_is_centred_by_its_key_bias(config, rope):
    impl = _loaded(_qwen2(config, ROPES[rope]), BIAS)
    assert impl.key_offset.shape == (math.ceil(1000 / SEGMENT_TOKENS), NUM_KV_HEADS, HEAD_DIM)
    assert impl.key_offset.dtype is torch.float32
    expected = segment_means(ROPES[rope], BIAS, 16)
    assert (impl.key_offset - expected).abs().max() < 1e-3 * BIAS.abs().max()


def test_a_reload_keeps_the_address(config):
    attention = _qwen2(config)
    impl = _loaded(attention, BIAS)
    address, before = impl.key_offset.data_ptr(), impl.key_offset.clone()
    _loaded(attention, 2 * BIAS)
    assert impl.key_offset.data_ptr() == address
    torch.testing.assert_close(impl.key_offset, 2 * before)


def _why_not(attention: nn.Module, bias: torch.Tensor | None) -> str:
    impl = _loaded(attention, bias)
    offset, why = key_offset.compute(impl, torch.float32)
    assert offset is None and impl.key_offset is None
    return why


def test_keys_normalised_after_their_bias_wait_for_a_pass(config):
    attention = _qwen2(config, qk_norm=True)
    impl = _loaded(attention, BIAS)
    assert (impl.key_offset == 0).all()
    assert key_offset.compute(impl, torch.float32)[1] == "by their mean over a fixed pass, which follows"


def test_without_a_bias_keys_wait_for_a_pass(config):
    attention = LlamaAttention(
        config.model_config.hf_config,
        256,
        4,
        NUM_KV_HEADS,
        cache_config=config.cache_config,
        prefix="model.layers.0.attn",
    )
    assert (_loaded(attention, None).key_offset == 0).all()


def test_multimodal_rope_is_not_guessed(config):
    attention = _qwen2(config)
    mrope = dict(ROPES["plain"], mrope_section=[8, 12, 12])
    attention.rotary_emb = get_rope(HEAD_DIM, 2048, rope_parameters=mrope, dtype=torch.float32)
    assert type(attention.rotary_emb).__name__ in _why_not(attention, BIAS)


def test_a_module_without_rope_is_not_guessed(config):
    attention = _qwen2(config)
    del attention.rotary_emb
    assert "NoneType" in _why_not(attention, BIAS)


def test_a_separate_key_projection_is_found(config):
    attention = _qwen2(config)
    del attention.qkv_proj
    attention.k_proj = nn.Linear(256, NUM_KV_HEADS * HEAD_DIM)
    attention.k_proj.bias.data = BIAS.flatten()
    attention.attn.process_weights_after_loading(torch.float32)
    assert (attention.attn.impl.key_offset - segment_means(ROPES["plain"], BIAS, 16)).abs().max() < 0.05


def test_the_global_hook_goes_when_weights_are_loaded(config):
    from torch.nn.modules.module import _global_module_registration_hooks as hooks

    before = len(hooks)
    attention = _qwen2(config)
    assert len(hooks) == before + 1
    _loaded(attention, BIAS)
    assert len(hooks) == before
