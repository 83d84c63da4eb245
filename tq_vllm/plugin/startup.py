"""The line that a server prints about its TurboQuant cache when the weights are loaded."""

import torch
from vllm.platforms import current_platform

from tq_vllm.config import RECENT_PRESET
from tq_vllm.ops.select import Call, NoKernelError, select
from tq_vllm.plugin.compat import logger


def report_layer(impl, dtype: torch.dtype, centring: str) -> None:
    """Log format, size, kernels and centring of a layer; layers that are alike are logged once a process.

    Args:
        impl: TurboQuantImpl.
        dtype: of queries, keys and values.
        centring: why its keys are centred, or not.

    Raises:
        NoKernelError: no kernel serves the layer on this device.
    """
    page, config = impl.page, impl.page.config
    logger.info_once(
        "TurboQuant KV cache %s: K%sV%d, %d bytes per token and layer (%d KV heads of %d), "
        "%.2f times smaller than bf16; decode by %s, prefill by %s, store by %s; keys %s: %s%s%s.",
        config.name,
        config.key_label,
        config.value_bits,
        page.slot_bytes * impl.num_kv_heads,
        impl.num_kv_heads,
        page.head_dim,
        4 * page.head_dim / page.slot_bytes,  # bf16 keys and values take 4 bytes a coordinate
        _kernel("attention", impl, dtype),
        _kernel("attention", impl, dtype, max_query_len=impl.max_model_len, fresh=True),
        _kernel("store_kv", impl, dtype),
        "not centred" if impl.key_offset is None else "centred",
        centring,
        "" if impl.key_scale is None else "; key channels scaled by the weights of the norms",
        f"; the newest {config.recent_tokens} tokens also in {RECENT_PRESET}" if config.recent_tokens else "",
    )


def _kernel(op: str, impl, dtype: torch.dtype, **step) -> str:
    """Name of the kernel that serves a call of this layer, and why; step: fields of Call, a decode's if none."""
    capability = current_platform.get_device_capability() if current_platform.is_cuda() else None
    call = Call(
        op,
        current_platform.device_type,
        None if capability is None else tuple(capability),
        impl.page.config.name,
        impl.page.head_dim,
        dtype,
        impl.block_size,
        group=impl.num_heads // impl.num_kv_heads,
        key_offset=impl.key_offset is not None,
        sinks=impl.sinks is not None,
        sliding_window=bool(impl.sliding_window),
        logits_soft_cap=bool(impl.logits_soft_cap),
        recent=op == "attention" and impl.page.config.recent_tokens > 0,
        **step,
    )
    try:
        choice = select(call)
    except NoKernelError as error:
        raise NoKernelError(f"{error} Or use --kv-cache-dtype auto.") from None
    return f"{choice.name} ({choice.reason})"
