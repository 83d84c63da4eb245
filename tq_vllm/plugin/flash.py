"""vLLM's FlashAttention for ops/flash_ops.py: which build serves this device, behind the signature that it asks for."""

import functools

from vllm.platforms import current_platform

from tq_vllm.ops import flash_ops
from tq_vllm.plugin.compat import logger

VERSIONS = (3, 2)  # FlashAttention 3 on Hopper, 2 on everything else from Ampere on


@functools.cache
def provide_flash_attention() -> None:
    """Hand over the first of VERSIONS that runs on this GPU; without one prefills go to Triton, and the log says so."""
    if not current_platform.is_cuda():
        return
    from vllm.vllm_flash_attn.flash_attn_interface import (
        fa_version_unsupported_reason,
        flash_attn_varlen_func,
        is_fa_version_supported,
    )

    version = next((v for v in VERSIONS if is_fa_version_supported(v)), None)
    if version is None:
        reasons = "; ".join(str(fa_version_unsupported_reason(v)) for v in VERSIONS)
        logger.warning("TurboQuant prefills run in Triton: vLLM's FlashAttention is not available (%s).", reasons)
        return

    def flash_attention(
        query, keys, values, query_start_loc, key_start_loc, max_query_len, max_key_len, softmax_scale, causal, window,
        soft_cap, out,
    ):  # fmt: skip
        return flash_attn_varlen_func(
            query, keys, values, max_query_len, query_start_loc, max_key_len, cu_seqlens_k=key_start_loc,
            softmax_scale=softmax_scale, causal=causal, window_size=list(window), softcap=soft_cap, out=out,
            return_softmax_lse=True, fa_version=version,
        )  # fmt: skip

    flash_ops.provide(flash_attention)
