"""What vLLM asks about the attention backend before it runs it: page size, block sizes, layouts, what is supported."""

from dataclasses import replace

from vllm.v1.attention.backend import AttentionBackend, AttentionType, MultipleOf
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheLayout

from tq_vllm.config import PRESETS
from tq_vllm.format import SUPPORTED_HEAD_DIMS, TILE_TOKENS, TurboQuantPage
from tq_vllm.plugin.checks import PREFERRED_BLOCK_SIZE, SUPPORTED_DTYPES, check_spec
from tq_vllm.plugin.compat import BACKEND_NAME
from tq_vllm.plugin.dtype import config_of
from tq_vllm.plugin.impl import TurboQuantImpl
from tq_vllm.plugin.metadata import TurboQuantMetadataBuilder


class TurboQuantBackend(AttentionBackend):
    """Attention on a TurboQuant cache, uint8 [num_blocks, num_kv_heads, block_size, slot_bytes] (see format.py)."""

    forward_includes_kv_cache_update = True
    supported_dtypes = list(SUPPORTED_DTYPES)
    supported_kv_cache_dtypes = list(PRESETS)

    @staticmethod
    def get_name() -> str:
        return BACKEND_NAME

    @staticmethod
    def get_impl_cls() -> type[TurboQuantImpl]:
        return TurboQuantImpl

    @staticmethod
    def get_builder_cls() -> type[TurboQuantMetadataBuilder]:
        return TurboQuantMetadataBuilder

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """Size the pages of a preset's layers by format.py; leave every other spec alone.

        Raises:
            UnsupportedByTurboQuantError: values are not as wide as keys.
        """
        config = config_of(spec)
        if config is None or spec.state_content_bytes is not None:
            return spec
        check_spec(spec)
        return replace(spec, state_content_bytes=TurboQuantPage(config, spec.head_size).slot_bytes)

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec=None) -> list[int | MultipleOf]:
        return [MultipleOf(TILE_TOKENS)]

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        return default_block_size if default_block_size % PREFERRED_BLOCK_SIZE == 0 else PREFERRED_BLOCK_SIZE

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return (KVCacheLayout.LBHNC,)

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return list(SUPPORTED_HEAD_DIMS)

    @classmethod
    def supports_kv_cache_dtype(cls, kv_cache_dtype: str | None) -> bool:
        return kv_cache_dtype in PRESETS

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        return attn_type == AttentionType.DECODER

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True
