"""Attention on CUDA devices in Triton: every preset, head size and query length; writes go to another kernel."""

import importlib.util

import torch

from tq_vllm.ops.select import Call
from tq_vllm.ops.torch_pages import get_page

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def supports(call: Call) -> str | None:
    """Say why a call can't be served; None when it can."""
    if call.op != "attention":
        return f"got operation {call.op}, allowed attention"
    if call.recent:
        return "it reads one cache at a time"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if call.capability is not None and call.capability < (8, 0):
        return f"got compute capability {call.capability[0]}.{call.capability[1]}, allowed 8.0 and later"
    if call.dtype not in DTYPES:
        return f"got query dtype {call.dtype}, allowed {', '.join(map(str, DTYPES))}"
    return None


def attention(
    query, key, value, kv_cache, block_table, seq_lens, query_start_loc, key_offset, sinks, out, lse,
    softmax_scale: float, max_query_len: int, max_seq_len: int, total_seq_len: int, sliding_window: int,
    logits_soft_cap: float, preset: str,
) -> None:  # fmt: skip
    """Attend queries to the cache and, with key and value, to this step's raw tokens; arguments in schema.py.

    Safe in a CUDA graph: nothing waits for the device, and grids and buffers follow from shapes and host numbers.
    """
    from tq_vllm.triton_kernels.decode import MAX_ROWS, decode
    from tq_vllm.triton_kernels.prefill import prefill

    if len(seq_lens) == 0 or max_query_len == 0:
        return
    page = get_page(preset, query.shape[-1])
    group = query.shape[1] // kv_cache.shape[1]
    if key is None and max_query_len * group <= MAX_ROWS:
        decode(query, kv_cache, block_table, seq_lens, query_start_loc, key_offset, sinks, out, lse, softmax_scale,
               max_query_len, sliding_window, logits_soft_cap, page)  # fmt: skip
    else:
        prefill(query, key, value, kv_cache, block_table, seq_lens, query_start_loc, key_offset, sinks, out, lse,
                softmax_scale, max_query_len, sliding_window, logits_soft_cap, page)  # fmt: skip
