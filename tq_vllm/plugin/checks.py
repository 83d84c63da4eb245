"""Startup refusals: what a TurboQuant cache cannot serve ends in one sentence before any weight is loaded.

Every sentence says what, got, allowed, and what to use instead.
"""

import functools

import torch
import vllm
from vllm.config import get_current_vllm_config_or_none
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention.chunked_local_attention import ChunkedLocalAttention
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionType
from vllm.v1.kv_cache_interface import AttentionSpec

from tq_vllm import MIN_CUDA_CAPABILITY, TESTED_VLLM
from tq_vllm.config import PRESETS, TurboQuantConfig, get_config
from tq_vllm.format import TILE_TOKENS, TurboQuantPage, head_dims_of, recent_block_size
from tq_vllm.plugin.compat import BACKEND_NAME, logger

SUPPORTED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OTHER_DTYPE = "--kv-cache-dtype auto"

# Kernels load whole runs of tiles: pages of 64 tokens read faster than pages of 16, and a segment of the key offset
# never cuts a page.
PREFERRED_BLOCK_SIZE = 64


class UnsupportedByTurboQuantError(ValueError):
    """The model, the device or an option needs something that a TurboQuant cache does not have."""


def _refuse(what: str, got: object, allowed: object, instead: str = OTHER_DTYPE) -> None:
    raise UnsupportedByTurboQuantError(
        f"{what} with a TurboQuant KV cache: got {got}, allowed {allowed}; use {instead} instead."
    )


def check_selection(selected_backend, selector_config) -> None:
    """Refuse what the attention selector knows of a layer whose cache dtype is a preset.

    Args:
        selected_backend: AttentionBackendEnum of --attention-backend, or None.
        selector_config: vllm.v1.attention.selector.AttentionSelectorConfig.

    Raises:
        UnsupportedByTurboQuantError, UnsupportedHeadDimError, UnknownPresetError.
    """
    config = get_config(selector_config.kv_cache_dtype)
    warn_about_version(vllm.__version__)
    if selected_backend is not None and selected_backend.name != BACKEND_NAME:
        _refuse("Attention backend", selected_backend.name, f"{BACKEND_NAME} or none", "no --attention-backend")
    if selector_config.use_mla:
        _refuse("Attention", "multi-head latent attention (MLA)", "multi-head, grouped or multi-query attention")
    if selector_config.attn_type != AttentionType.DECODER:
        _refuse("Attention", f"{AttentionType(selector_config.attn_type).value} attention", "decoder attention")
    if selector_config.head_size not in head_dims_of(config):
        _refuse("Head size", selector_config.head_size, head_dims_of(config))
    if selector_config.dtype not in SUPPORTED_DTYPES:
        _refuse("Model dtype", selector_config.dtype, SUPPORTED_DTYPES, "--dtype bfloat16")
    if selector_config.block_size is not None and selector_config.block_size % TILE_TOKENS:
        _refuse("--block-size", selector_config.block_size, f"multiples of {TILE_TOKENS}", "64")
    for what, is_set, instead in (
        ("Sparse attention", selector_config.use_sparse, OTHER_DTYPE),
        ("Bidirectional attention between image tokens", selector_config.use_mm_prefix, OTHER_DTYPE),
        ("Non-causal attention", selector_config.use_non_causal, OTHER_DTYPE),
        ("Reference sliding window attention", selector_config.use_rswa, OTHER_DTYPE),
        ("Per-head KV scales of the checkpoint", selector_config.use_per_head_quant_scales, OTHER_DTYPE),
        ("Batch invariance (VLLM_BATCH_INVARIANT)", selector_config.use_batch_invariant, OTHER_DTYPE),
        ("Decode context parallelism", selector_config.use_dcp, "--tensor-parallel-size"),
        ("Prefill context parallelism", selector_config.use_pcp, "--tensor-parallel-size"),
    ):
        if is_set:
            _refuse(what, "on", "off", instead)
    check_platform()


def check_stock_layer(selector_config) -> None:
    """Refuse a layer that would stay uncompressed although nobody left it out.

    Some models (Falcon, in 0.32 and 0.33) do not hand --kv-cache-dtype on to their layers; vLLM ignores it there.
    """
    config = get_current_vllm_config_or_none()
    cache = config and config.cache_config
    if not cache or cache.cache_dtype not in PRESETS or cache.kv_cache_dtype_skip_layers:
        return
    drafts = config.speculative_config
    if selector_config.attn_type != AttentionType.DECODER or (drafts and drafts.kv_cache_dtype):
        return
    model = getattr(config.model_config, "architecture", None) or "a model"
    _refuse("Model", f"{model}, whose layers vLLM gives no cache dtype", "models that take --kv-cache-dtype")


def check_platform() -> None:
    """Refuse devices that no kernel of this package is written for."""
    if current_platform.is_cuda():
        capability = current_platform.get_device_capability()
        if capability is not None and tuple(capability) < MIN_CUDA_CAPABILITY:
            _refuse("GPU compute capability", "{}.{}".format(*capability), "8.0 (Ampere) and later")
    elif not current_platform.is_cpu():
        _refuse("Platform", current_platform.device_name, "NVIDIA GPUs and CPUs")


def check_layer(*, alibi_slopes: list[float] | None, head_dim: int, kv_cache_dtype: str, extra: dict) -> TurboQuantPage:
    """Refuse what an attention layer tells its implementation only; return the page that the layer is stored in.

    Args:
        extra: keyword arguments of the layer that a plain decoder layer does not have.
    """
    page = TurboQuantPage(get_config(kv_cache_dtype), head_dim)
    if alibi_slopes is not None:
        _refuse("Position encoding", "ALiBi", "rotary or none")
    unknown = [name for name, value in extra.items() if value is not None]
    if unknown:
        _refuse("Attention feature", ", ".join(unknown), "sinks, sliding window, logits soft cap")
    return page


def check_recent_tokens(config: TurboQuantConfig, vllm_config) -> None:
    """Refuse a cache of the newest tokens where vLLM keeps one kind of blocks: it would keep them for all tokens.

    And where a drafter has so many layers that vLLM would spread them over several caches and stop in an assertion: it
    pads kinds of layers to the same number only below 1.5 times the smaller one.
    """
    if not config.recent_tokens:
        return
    plain = config.name.rsplit("-r", 1)[0]
    if vllm_config.scheduler_config.disable_hybrid_kv_cache_manager:
        got = f"{config.name} with the hybrid KV cache manager off (by flag, or for a KV connector that needs it off)"
        _refuse("--kv-cache-dtype", got, plain, plain)
    if vllm_config.cache_config.kv_sharing_fast_prefill:  # its layers see other tokens than the cache beside them
        _refuse("--kv-cache-dtype", f"{config.name} with --kv-sharing-fast-prefill", plain, plain)
    drafts = vllm_config.speculative_config
    if drafts is not None and (drafts.uses_draft_model() or drafts.use_eagle()):
        layers = drafts.target_model_config.get_total_num_hidden_layers()
        of_drafter = drafts.draft_model_config.get_total_num_hidden_layers()
        if 2 * of_drafter >= layers:
            allowed = f"{plain}, or a draft model of fewer than half of the model's {layers} layers"
            _refuse("--kv-cache-dtype", f"{config.name} with a draft model of {of_drafter} layers", allowed, plain)


def check_layer_class(layer, config: TurboQuantConfig) -> None:
    """Refuse layers of a class that changes the batch in a way of its own before it comes here.

    Chunked local attention makes a request of every chunk, which a cache of the newest tokens beside it would not see.
    """
    if type(layer) is ChunkedLocalAttention and config.recent_tokens:
        plain = config.name.rsplit("-r", 1)[0]
        _refuse("--kv-cache-dtype", f"{config.name} with chunked local attention", plain, plain)
    if type(layer) not in (Attention, ChunkedLocalAttention):
        _refuse("Attention layer", type(layer).__name__, "Attention, ChunkedLocalAttention")


def check_recent_blocks(page: TurboQuantPage, block_size: int) -> None:
    """Refuse blocks that hold no tile of the newest tokens' cache."""
    if not recent_block_size(page, block_size):
        least = next(n for n in range(TILE_TOKENS, 1024, TILE_TOKENS) if recent_block_size(page, n))
        _refuse(f"--block-size of {page.config.name}", block_size, f"multiples of {TILE_TOKENS} from {least} on", "64")


def check_spec(spec: AttentionSpec) -> None:
    """Refuse layers whose keys and values differ in width."""
    if spec.head_size_v != spec.head_size:
        _refuse("Head size of values", spec.head_size_v, f"that of keys, {spec.head_size}")


@functools.cache
def warn_about_version(version: str) -> None:
    """Say once that this vLLM is not one the package is tested with; what it misses is refused where it is missed."""
    if not version.startswith(tuple(f"{tested}." for tested in TESTED_VLLM)):
        logger.warning(
            "vLLM version with a TurboQuant KV cache: got %s, tested %s; use one of those if something fails.",
            version, ", ".join(TESTED_VLLM),
        )  # fmt: skip
