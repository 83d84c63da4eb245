"""The block arithmetic against vLLM's own functions, for uniform models and for mixtures with sliding windows."""

import importlib
import importlib.util
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tq_vllm.cli.kv_blocks import DEFAULT_BLOCK_SIZE, plan_blocks
from tq_vllm.cli.model_config import ModelShape
from tq_vllm.config import PRESETS, RECENT_PRESET
from tq_vllm.format import recent_block_size
from tq_vllm.ops.torch_pages import get_page

kv_cache_interface = pytest.importorskip("vllm.v1.kv_cache_interface", reason="the oracle is vLLM itself")
UTILS = importlib.import_module("vllm.v1.core.kv_cache_utils")
# 0.33 has the planning in a module of its own.
PLANNING = "vllm.v1.core.kv_cache_planning"
PLANNING = importlib.import_module(PLANNING) if importlib.util.find_spec(PLANNING) else UTILS


def shape_of(num_full_layers: int, num_sliding_layers: int, sliding_window: int, num_kv_heads: int) -> ModelShape:
    return ModelShape(
        "llama", num_full_layers, num_sliding_layers, sliding_window, 0, 0, 32, num_kv_heads, 128, 8192, False
    )


def vllm_blocks(shape, slot_bytes: int, block_size: int, memory: int, max_model_len: int, in_flight: int, recent=None):
    """(num_blocks, tokens, concurrency, blocks that vLLM says a longest sequence and the null block need), by vLLM."""
    vllm_config = SimpleNamespace(
        scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=False),
        attention_config=SimpleNamespace(hisparse_config=None),
        cache_config=SimpleNamespace(
            num_gpu_blocks_override=None,
            prefix_cache_retention_interval=None,
            get_resolved_kv_cache_layout=lambda: kv_cache_interface.KVCacheLayout.LBHNC,
        ),
        parallel_config=SimpleNamespace(decode_context_parallel_size=1),
        model_config=SimpleNamespace(max_model_len=max_model_len),
        speculative_config=None,
        max_in_flight_tokens=in_flight,
    )
    common = dict(
        block_size=block_size, num_kv_heads=shape.num_kv_heads, head_size=128, dtype=torch.uint8,
        state_content_bytes=slot_bytes,
    )  # fmt: skip
    full = kv_cache_interface.FullAttentionSpec(**common)
    sliding = kv_cache_interface.SlidingWindowSpec(**common, sliding_window=shape.sliding_window or 1)
    specs = {f"full.{i}": full for i in range(shape.num_full_layers)}
    specs |= {f"sliding.{i}": sliding for i in range(shape.num_sliding_layers)}
    if recent is not None:
        specs |= {f"{name}.recent": recent for name in list(specs)}
    specs = PLANNING.unify_kv_cache_spec_page_size(specs)
    groups = PLANNING.get_kv_cache_groups(vllm_config, specs)
    config = PLANNING.get_kv_cache_config_from_groups(vllm_config, groups, memory)
    tokens, concurrency = UTILS.get_kv_cache_capacity(vllm_config, config)
    bytes_per_block = PLANNING._pool_bytes_per_block(vllm_config, groups)
    needed = sum(
        -(-g.kv_cache_spec.max_memory_usage_bytes(vllm_config) // g.kv_cache_spec.page_size_bytes) for g in groups
    )
    return config.num_blocks, tokens, concurrency, (needed + 1) * bytes_per_block <= memory


@settings(max_examples=150, deadline=None)
@given(
    num_full_layers=st.integers(0, 40),
    num_sliding_layers=st.integers(0, 40),
    sliding_window=st.integers(1, 5000),
    num_kv_heads=st.integers(1, 16),
    slot_bytes=st.integers(36, 600),
    block_size=st.sampled_from((16, 32, 64, 128)),
    memory=st.integers(1, 2**36),
    max_model_len=st.integers(1, 200_000),
    in_flight=st.sampled_from((2048, 16384)),
)
def test_equals_vllm_to_the_block(
    num_full_layers, num_sliding_layers, sliding_window, num_kv_heads, slot_bytes, block_size, memory, max_model_len,
    in_flight,
):  # fmt: skip
    if num_full_layers + num_sliding_layers == 0:
        num_full_layers = 1
    shape = shape_of(num_full_layers, num_sliding_layers, sliding_window, num_kv_heads)
    got = plan_blocks(shape, num_kv_heads * slot_bytes, block_size, memory, max_model_len, in_flight)
    expected = vllm_blocks(shape, slot_bytes, block_size, memory, max_model_len, in_flight)
    assert (got.num_blocks, got.num_tokens, got.max_concurrency, got.fits) == expected


@settings(max_examples=100, deadline=None)
@given(
    num_full_layers=st.integers(0, 40),
    num_sliding_layers=st.integers(0, 40),
    sliding_window=st.sampled_from((129, 512, 4096)),
    num_kv_heads=st.integers(1, 16),
    preset=st.sampled_from([name for name, preset in PRESETS.items() if preset.recent_tokens]),
    block_size=st.sampled_from((64, 128)),
    memory=st.integers(2**24, 2**36),
    max_model_len=st.integers(1, 200_000),
    in_flight=st.sampled_from((2048, 16384)),
)
def test_a_cache_of_the_newest_tokens_equals_vllm_to_the_block(
    num_full_layers, num_sliding_layers, sliding_window, num_kv_heads, preset, block_size, memory, max_model_len,
    in_flight,
):  # fmt: skip
    if num_full_layers + num_sliding_layers == 0:
        num_full_layers = 1
    shape, page = shape_of(num_full_layers, num_sliding_layers, sliding_window, num_kv_heads), get_page(preset, 128)
    recent = page.config.recent_tokens, recent_block_size(page, block_size)
    sizes = block_size, memory, max_model_len, in_flight
    got = plan_blocks(shape, num_kv_heads * page.slot_bytes, *sizes, *recent)
    spec = kv_cache_interface.SlidingWindowSpec(
        block_size=recent[1], num_kv_heads=num_kv_heads, head_size=128, dtype=torch.uint8, sliding_window=recent[0],
        state_content_bytes=get_page(RECENT_PRESET, 128).slot_bytes,
    )  # fmt: skip
    expected = vllm_blocks(shape, page.slot_bytes, *sizes, spec)
    assert (got.num_blocks, got.num_tokens, got.max_concurrency, got.fits) == expected


def test_default_block_sizes_are_those_of_the_plugin():
    backend = pytest.importorskip("tq_vllm.plugin.backend").TurboQuantBackend
    for stock, turboquant in ((sizes["stock"], sizes["turboquant"]) for sizes in DEFAULT_BLOCK_SIZE.values()):
        assert backend.get_preferred_block_size(stock) == turboquant


def test_groups_of_every_mixture():
    for num_full_layers in range(13):
        for num_sliding_layers in range(13 if num_full_layers else 0):
            shape = shape_of(num_full_layers, num_sliding_layers, 100, 2)
            got = plan_blocks(shape, 2 * 132, 16, 10**8, 4096, 256)
            expected = vllm_blocks(shape, 132, 16, 10**8, 4096, 256)
            assert (got.num_blocks, got.num_tokens, got.max_concurrency, got.fits) == expected, shape


def test_tokens_carry_the_rounding_of_floats():
    shape = shape_of(1, 0, 0, 1)  # one block of 16 tokens is 1/49 of a sequence: vLLM says 15 tokens
    plan = plan_blocks(shape, 132, 16, 16 * 132, 49 * 16, 0)
    assert plan.num_tokens == vllm_blocks(shape, 132, 16, 16 * 132, 49 * 16, 0)[1] == 15


def test_longest_sequence_is_the_last_that_vllm_would_accept():
    shape = shape_of(4, 20, 1024, 8)
    plan = plan_blocks(shape, 8 * 132, 64, 2**28, 131072, 2048)
    assert not plan.fits and 0 < plan.longest_sequence < 131072
    accepted = [vllm_blocks(shape, 132, 64, 2**28, plan.longest_sequence + more, 2048)[3] for more in (0, 1)]
    assert accepted == [True, False]
