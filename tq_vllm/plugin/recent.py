"""The newest tokens' own cache: a second KV cache of a layer, which vLLM manages as that of a sliding window.

vLLM gives it blocks of its own in the same pool, frees those that the window leaves behind, and brings its last blocks
back on a prefix hit. Nothing else about it is special: the layer's own implementation writes and reads both.
"""

from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.kv_cache_interface import KVQuantMode, SlidingWindowSpec

from tq_vllm.config import RECENT_PRESET
from tq_vllm.format import recent_block_size
from tq_vllm.plugin.checks import check_recent_blocks
from tq_vllm.plugin.dtype import STORAGE_DTYPE


class RecentTokens(AttentionLayerBase):
    """The entry beside an attention layer in vLLM's list of layers with a cache.

    Attributes:
        name: the layer's name and ".recent".
        impl: TurboQuantImpl of the layer.
        kv_cache: uint8 [num_blocks, num_kv_heads, block_size, slot_bytes] of RECENT_PRESET, bound by vLLM.
    """

    def __init__(self, layer_name: str, impl):
        self.name, self.impl = f"{layer_name}.recent", impl

    def get_attn_backend(self) -> type[AttentionBackend]:
        from tq_vllm.plugin.backend import TurboQuantBackend  # which imports this package's implementation

        return TurboQuantBackend

    def get_kv_cache_spec(self, vllm_config) -> SlidingWindowSpec:
        page, block_size = self.impl.page, vllm_config.cache_config.block_size
        check_recent_blocks(page, block_size)
        return SlidingWindowSpec(
            block_size=recent_block_size(page, block_size),
            num_kv_heads=self.impl.num_kv_heads,
            head_size=page.head_dim,
            dtype=STORAGE_DTYPE,
            kv_quant_mode=KVQuantMode[RECENT_PRESET],
            sliding_window=page.config.recent_tokens,
        )
