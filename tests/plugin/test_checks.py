"""Bad input: one sentence at startup with what, got, allowed and what to use instead."""

import itertools

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention.chunked_local_attention import ChunkedLocalAttention
from vllm.platforms import current_platform
from vllm.platforms.interface import DeviceCapability
from vllm.v1.attention import selector
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.selector import AttentionSelectorConfig, get_attn_backend

from tq_vllm.format import UnsupportedHeadDimError
from tq_vllm.plugin import checks
from tq_vllm.plugin.checks import UnsupportedByTurboQuantError, check_selection

GOOD = dict(head_size=64, dtype=torch.bfloat16, kv_cache_dtype="turboquant", block_size=None)


def _refusal(selected_backend=None, **changes) -> str:
    with pytest.raises(UnsupportedByTurboQuantError) as caught:
        check_selection(selected_backend, AttentionSelectorConfig(**{**GOOD, **changes}))
    return str(caught.value)


def _check_form(sentence: str) -> None:
    assert sentence.count("got ") == 1 and ", allowed " in sentence and "; use " in sentence and "\n" not in sentence


@pytest.mark.parametrize(
    "changes, got",
    [
        (dict(head_size=72), "Head size with a TurboQuant KV cache: got 72"),
        (dict(head_size=576, use_mla=True), "got multi-head latent attention (MLA)"),
        (dict(attn_type="encoder_only"), "got encoder_only attention"),
        (dict(attn_type="encoder_decoder"), "got encoder_decoder attention"),
        (dict(dtype=torch.float64), "got torch.float64"),
        (dict(block_size=40), "--block-size with a TurboQuant KV cache: got 40, allowed multiples of 16"),
        (dict(use_sparse=True), "Sparse attention"),
        (dict(use_mm_prefix=True), "Bidirectional attention between image tokens"),
        (dict(use_non_causal=True), "Non-causal attention"),
        (dict(use_rswa=True), "Reference sliding window"),
        (dict(use_per_head_quant_scales=True), "Per-head KV scales"),
        (dict(use_batch_invariant=True), "VLLM_BATCH_INVARIANT"),
        (dict(use_dcp=True), "Decode context parallelism"),
        (dict(use_pcp=True), "Prefill context parallelism"),
    ],
)
def test_what_the_selector_knows(changes, got):
    sentence = _refusal(**changes)
    assert got in sentence
    _check_form(sentence)


def test_another_backend_cannot_serve_the_cache():
    sentence = _refusal(AttentionBackendEnum.FLASH_ATTN)
    assert "got FLASH_ATTN, allowed TQ_VLLM" in sentence
    _check_form(sentence)
    check_selection(AttentionBackendEnum["TQ_VLLM"], AttentionSelectorConfig(**GOOD))


@pytest.mark.parametrize("feature", ["has_sink", "has_sliding_window", "use_kv_connector"])
def test_supported_features_pass(feature):
    check_selection(None, AttentionSelectorConfig(**GOOD, **{feature: True}))


def test_old_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(type(current_platform), "is_cuda", lambda self: True)
    monkeypatch.setattr(type(current_platform), "get_device_capability", lambda *_: DeviceCapability(7, 5))
    assert _refusal() == (
        "GPU compute capability with a TurboQuant KV cache: got 7.5, allowed 8.0 (Ampere) and later; "
        "use --kv-cache-dtype auto instead."
    )
    monkeypatch.setattr(type(current_platform), "get_device_capability", lambda *_: DeviceCapability(8, 0))
    check_selection(None, AttentionSelectorConfig(**GOOD))


def test_other_platforms_are_refused(monkeypatch):
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: False)
    _check_form(_refusal())


def test_vllms_selector_ends_in_the_sentence():
    with (
        set_current_vllm_config(VllmConfig()),
        pytest.raises(UnsupportedByTurboQuantError, match="got multi-head latent attention"),
    ):
        get_attn_backend(576, torch.bfloat16, "turboquant", use_mla=True)


def test_untested_vllm_is_told_once(monkeypatch):
    told = []
    monkeypatch.setattr(checks.logger, "warning", lambda message, *args: told.append(message % args))
    checks.warn_about_version.cache_clear()
    for version in ("0.32.0", "0.33.1rc1", "0.40.0", "0.40.0"):
        checks.warn_about_version(version)
    checks.warn_about_version.cache_clear()
    assert told == [
        "vLLM version with a TurboQuant KV cache: got 0.40.0, tested 0.32, 0.33; use one of those if something fails."
    ]


def test_a_model_that_does_not_hand_the_cache_dtype_on_is_refused(tiny_config):
    """As vLLM's Falcon builds its layers; without this it would be served uncompressed, without a word."""

    def layer(config):
        with set_current_vllm_config(config):
            return Attention(4, 64, 0.1, num_kv_heads=2, prefix="model.layers.0.self_attn.attn")

    selector._cached_get_attn_backend.cache_clear()  # of other tests; an engine's process has one model
    with pytest.raises(UnsupportedByTurboQuantError) as caught:
        layer(tiny_config())
    assert "got Qwen2ForCausalLM, whose layers vLLM gives no cache dtype" in str(caught.value)
    _check_form(str(caught.value))
    layer(tiny_config(kv_cache_dtype="auto"))
    layer(tiny_config(kv_cache_dtype_skip_layers=["0"]))


def test_a_cache_of_the_newest_tokens_needs_blocks_of_its_own_kind(tiny_config, attention_layer):
    config = tiny_config(kv_cache_dtype="turboquant:k4v4-r128", disable_hybrid_kv_cache_manager=True)
    with pytest.raises(UnsupportedByTurboQuantError) as caught:
        attention_layer(config)
    assert "allowed turboquant:k4v4; use turboquant:k4v4 instead" in str(caught.value)
    _check_form(str(caught.value))


def test_a_cache_of_the_newest_tokens_needs_layers_that_see_every_token(tiny_config, attention_layer):
    config = tiny_config(kv_cache_dtype="turboquant:k4v4-r128")
    config.cache_config.kv_sharing_fast_prefill = True
    with pytest.raises(UnsupportedByTurboQuantError) as caught:
        attention_layer(config)
    assert "with --kv-sharing-fast-prefill, allowed turboquant:k4v4" in str(caught.value)
    _check_form(str(caught.value))


@pytest.mark.parametrize("preset, refused", [("turboquant", False), ("turboquant:k4v4-r128", True)])
def test_a_cache_of_the_newest_tokens_does_not_know_local_chunks(tiny_config, preset, refused):
    config = tiny_config(kv_cache_dtype=preset)
    with set_current_vllm_config(config):
        prefix = "model.layers.0.self_attn.attn"
        layer = ChunkedLocalAttention(4, 64, 0.1, 128, num_kv_heads=2, cache_config=config.cache_config, prefix=prefix)
    if not refused:
        layer.process_weights_after_loading(torch.float32)
        return
    with pytest.raises(UnsupportedByTurboQuantError) as caught:
        layer.process_weights_after_loading(torch.float32)
    assert "got turboquant:k4v4-r128 with chunked local attention" in str(caught.value)
    _check_form(str(caught.value))


def test_layers_of_unknown_classes_are_refused(tiny_config):
    class OtherAttention(Attention):
        pass

    config = tiny_config()
    with set_current_vllm_config(config):
        layer = OtherAttention(4, 64, 0.1, num_kv_heads=2, cache_config=config.cache_config, prefix="model.layers.0.a")
    with pytest.raises(UnsupportedByTurboQuantError) as caught:
        layer.process_weights_after_loading(torch.float32)
    assert "got OtherAttention, allowed Attention, ChunkedLocalAttention" in str(caught.value)
    _check_form(str(caught.value))


@pytest.mark.parametrize("layers_of_drafter, refused", [(3, False), (4, True)])
def test_a_cache_of_the_newest_tokens_needs_a_small_draft_model(
    tiny_config, attention_layer, tmp_path, layers_of_drafter, refused
):
    tiny_config({"num_hidden_layers": layers_of_drafter})
    (tmp_path / "drafter").mkdir()
    (tmp_path / "config.json").rename(tmp_path / "drafter" / "config.json")
    drafts = {"method": "draft_model", "model": str(tmp_path / "drafter"), "num_speculative_tokens": 2}
    config = tiny_config({"num_hidden_layers": 8}, kv_cache_dtype="turboquant:k4v4-r128", speculative_config=drafts)
    if not refused:
        attention_layer(config)
        return
    with pytest.raises(UnsupportedByTurboQuantError) as caught:
        attention_layer(config)
    assert "got turboquant:k4v4-r128 with a draft model of 4 layers" in str(caught.value)
    _check_form(str(caught.value))


def test_a_cache_of_the_newest_tokens_needs_blocks_that_hold_a_tile_of_it(tiny_config, attention_layer):
    config = tiny_config(kv_cache_dtype="turboquant:k4v4-r128", block_size=16)
    attention_layer(config).process_weights_after_loading(torch.float32)
    (recent,) = (layer for name, layer in layers_of(config).items() if name.endswith(".recent"))
    with pytest.raises(UnsupportedByTurboQuantError) as caught:
        recent.get_kv_cache_spec(config)
    assert "got 16, allowed multiples of 16 from 32 on; use 64 instead" in str(caught.value)
    _check_form(str(caught.value))
    config.cache_config.block_size = 64
    spec = recent.get_kv_cache_spec(config)
    assert (spec.block_size, spec.sliding_window) == (32, 128)


def layers_of(config):
    return config.compilation_config.static_forward_context


def test_alibi_is_refused(tiny_config, attention_layer):
    with pytest.raises(UnsupportedByTurboQuantError) as caught:
        attention_layer(tiny_config(), alibi_slopes=[0.5, 0.25, 0.125, 0.0625])
    assert "got ALiBi" in str(caught.value)
    _check_form(str(caught.value))


def test_unknown_layer_features_are_refused(tiny_config, attention_layer):
    with pytest.raises(UnsupportedByTurboQuantError) as caught:
        attention_layer(tiny_config(), dual_chunk_attention_config={"chunk_size": 8})
    assert "got dual_chunk_attention_config" in str(caught.value)
    _check_form(str(caught.value))


def test_trellis_presets_take_whole_blocks():
    for head_size, preset in itertools.product((80, 112), ("turboquant:t3", "turboquant:t2")):
        refusal = _refusal(head_size=head_size, kv_cache_dtype=preset)
        _check_form(refusal)
        assert f"got {head_size}, allowed (64, 96, 128, 192, 256)" in refusal


def test_head_size_is_refused_by_the_format_too():
    with pytest.raises(UnsupportedHeadDimError):
        checks.check_layer(alibi_slopes=None, head_dim=72, kv_cache_dtype="turboquant", extra={})
