"""Pages: vLLM allocates exactly what format.py lays out, and its views reach every byte where the kernels look."""

import pytest
import torch
from vllm.config import set_current_vllm_config
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheLayout,
    KVCacheTensor,
    SlidingWindowSpec,
    create_kv_cache_views,
    get_kv_quant_mode,
)

from tests.ops.batches import PAGES
from tq_vllm.config import get_config
from tq_vllm.format import TILE_TOKENS, TurboQuantPage
from tq_vllm.plugin.backend import TurboQuantBackend
from tq_vllm.plugin.checks import UnsupportedByTurboQuantError


def _spec(dtype: str, head_dim: int = 64, block_size: int = 64, kind=FullAttentionSpec, **kwargs):
    return TurboQuantBackend.customize_spec(
        kind(
            block_size=block_size,
            num_kv_heads=3,
            head_size=head_dim,
            dtype=torch.uint8,
            kv_quant_mode=get_kv_quant_mode(dtype),
            **kwargs,
        )
    )


@pytest.mark.parametrize("preset, head_dim", PAGES)
def test_page_is_that_of_the_format(preset, head_dim):
    page = TurboQuantPage(get_config(preset), head_dim)
    for block_size in (16, 48, 128):
        assert _spec(preset, head_dim, block_size).page_size_bytes == 3 * block_size // TILE_TOKENS * page.tile_bytes
    window = _spec(preset, head_dim, kind=SlidingWindowSpec, sliding_window=128)
    assert window.page_size_bytes == _spec(preset, head_dim).page_size_bytes and window.sliding_window == 128


def test_spec_is_customized_once():
    spec = _spec("turboquant:k3v3")
    assert TurboQuantBackend.customize_spec(spec) is spec


@pytest.mark.parametrize("dtype", ["auto", "fp8", "turboquant_4bit_nc"])
def test_spec_of_other_dtypes_is_left_alone(dtype):
    assert _spec(dtype).state_content_bytes is None


def test_values_of_another_width_are_refused():
    with pytest.raises(UnsupportedByTurboQuantError, match="Head size of values .* got 128, allowed that of keys, 64"):
        _spec("turboquant", head_size_v=128)


def test_views_are_the_kernels_pages():
    """vLLM's own view of an allocation: one (block, head) is contiguous, as format.py demands."""
    spec = _spec("turboquant:k4v3", block_size=32)
    num_blocks, page_bytes = 5, spec.page_size_bytes
    raw = torch.zeros(2 * num_blocks * page_bytes, dtype=torch.int8)
    placement = KVCacheTensor(
        size=raw.numel(), layers=["a", "b"], layer_stride=num_blocks * page_bytes, block_stride=page_bytes
    )
    slot_bytes = TurboQuantPage(get_config("turboquant:k4v3"), 64).slot_bytes
    for view in create_kv_cache_views(raw, spec, num_blocks, KVCacheLayout.LBHNC, placement):
        assert view.dtype is torch.uint8 and view.shape == (num_blocks, 3, 32, slot_bytes)
        assert view[1, 2].is_contiguous()
        assert view.stride(0) % 16 == 0 and view.stride(1) % 16 == 0


def test_a_layer_asks_for_its_format(tiny_config, attention_layer):
    config = tiny_config(block_size=32)
    layer = attention_layer(config)
    assert layer.attn_backend is TurboQuantBackend
    with set_current_vllm_config(config):
        spec = layer.attn_backend.customize_spec(layer.get_kv_cache_spec(config))
    assert spec.page_size_bytes == 2 * 32 * TurboQuantPage(get_config("turboquant"), 64).slot_bytes


def test_a_sliding_window_layer_asks_for_its_format(tiny_config, attention_layer):
    config = tiny_config(block_size=32)
    layer = attention_layer(config, per_layer_sliding_window=100)
    with set_current_vllm_config(config):
        spec = layer.attn_backend.customize_spec(layer.get_kv_cache_spec(config))
    slot_bytes = TurboQuantPage(get_config("turboquant"), 64).slot_bytes
    assert isinstance(spec, SlidingWindowSpec) and spec.sliding_window == 100
    assert spec.block_size % TILE_TOKENS == 0 and spec.page_size_bytes == 2 * spec.block_size * slot_bytes


def test_skipped_layers_stay_stock(tiny_config, attention_layer):
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl

    config = tiny_config(kv_cache_dtype_skip_layers=["0", "sliding_window"])
    skipped = attention_layer(config)
    window = attention_layer(config, prefix="model.layers.1.self_attn.attn", per_layer_sliding_window=64)
    ours = attention_layer(config, prefix="model.layers.2.self_attn.attn")
    for layer in (skipped, window):
        assert layer.attn_backend is CPUAttentionBackend and type(layer.impl) is CPUAttentionBackendImpl
        assert layer.get_kv_cache_spec(config).dtype is torch.float32
    assert ours.attn_backend is TurboQuantBackend


def test_preferred_block_size():
    assert TurboQuantBackend.get_preferred_block_size(16) == 64
    assert TurboQuantBackend.get_preferred_block_size(128) == 128
    assert TurboQuantBackend.supports_block_size(48) and not TurboQuantBackend.supports_block_size(40)
