"""Attention of prefills by FlashAttention: the prefix is dequantized once, into a bounded buffer, and read densely.

Keys and values of the prefix come out of their codes in the model's own space, key offset included, so FlashAttention
needs to know nothing of the format. Where prefixes and this step's tokens fit the buffer together, one causal pass does
it; else the line of all prefixes is cut into slices of the buffer's size, and the passes are merged by their LSE.

FlashAttention is vLLM's: the plugin hands it over with `provide`, this package imports none.
"""

from collections.abc import Callable

import torch

from tq_vllm.config import RECENT_PRESET
from tq_vllm.format import TurboQuantPage, recent_block_size
from tq_vllm.ops.flash_workspace import line_tokens, temporaries, workspace
from tq_vllm.ops.select import Call
from tq_vllm.ops.torch_pages import get_page

DTYPES = (torch.float16, torch.bfloat16)

# f(query, keys, values, query_start_loc, key_start_loc, max_query_len, max_key_len, softmax_scale, causal, window,
#   soft_cap, out) -> (out, lse f32 [num_heads, num_tokens]); window (left, right), -1: unbounded.
_flash_attention: Callable | None = None
_warm: set[tuple] = set()  # kinds of layers whose kernels are compiled


def provide(flash_attention: Callable) -> None:
    """Use `flash_attention` from now on; its signature is above."""
    global _flash_attention
    _flash_attention = flash_attention


def supports(call: Call) -> str | None:
    """Return None, or why FlashAttention can't serve the call."""
    if call.op != "attention":
        return f"got operation {call.op}, allowed attention"
    if _flash_attention is None:
        return "no FlashAttention was provided (the plugin hands over vLLM's when an engine starts)"
    if not call.fresh:
        return "it serves steps with raw keys and values, and this one reads everything from codes"
    if call.dtype not in DTYPES:
        return f"got query dtype {call.dtype}, allowed {', '.join(map(str, DTYPES))}"
    if call.long and call.sliding_window:
        return "a sliding window over more tokens than its buffer holds at once"
    return None


def warm_up(
    query: torch.Tensor, num_kv_heads: int, block_size: int, max_num_reqs: int, key_offset, sinks, sliding_window: int,
    preset: str,
) -> None:  # fmt: skip
    """Allocate what steps of this query's size take, so that a memory profile sees it, and compile their kernels.

    Args:
        query: [num_tokens, num_heads, head_dim], of the largest step.
        max_num_reqs: requests of a step at most.
        key_offset, sinks, sliding_window, preset: as in the calls to come.
    """
    if _flash_attention is None or query.dtype not in DTYPES:
        return
    num_tokens, num_heads, head_dim = query.shape
    keys, _ = workspace(num_tokens, num_kv_heads, head_dim, query.dtype, query.device)
    temporaries(query)
    layer = num_heads, num_kv_heads, head_dim, block_size, preset, key_offset is None, sinks is None, sliding_window > 0
    if (kind := (query.device, query.dtype, *layer)) in _warm:
        return
    _warm.add(kind)
    from tq_vllm.triton_kernels.dequantize import REQUEST_SIZES

    def cache(page: TurboQuantPage, size: int) -> torch.Tensor:
        return torch.zeros(1, num_kv_heads, size, page.slot_bytes, dtype=torch.uint8, device=query.device)

    page = get_page(preset, head_dim)
    kv_cache, recent = cache(page, block_size), None
    if page.config.recent_tokens:
        recent = cache(get_page(RECENT_PRESET, head_dim), recent_block_size(page, block_size))
    for num_reqs in [n for i, n in enumerate(REQUEST_SIZES) if i == 0 or REQUEST_SIZES[i - 1] < max_num_reqs]:
        ints = torch.arange(num_reqs + 1, dtype=torch.int32, device=query.device)
        table, seq_lens = torch.zeros_like(ints)[:-1, None], torch.full_like(ints[:-1], 2)
        key = query.new_zeros(num_reqs, num_kv_heads, head_dim)
        one = query.new_zeros(num_reqs, num_heads, head_dim)
        for total_seq_len in [2 * num_reqs] + ([] if sliding_window > 0 else [len(keys) + num_reqs + 1]):
            attention(one, key, key, kv_cache, table, seq_lens, ints, key_offset, sinks, torch.empty_like(one), None,
                      1.0, 1, 2, total_seq_len, sliding_window, 0.0, preset, recent, table)  # fmt: skip


def attention(
    query, key, value, kv_cache, block_table, seq_lens, query_start_loc, key_offset, sinks, out, lse,
    softmax_scale: float, max_query_len: int, max_seq_len: int, total_seq_len: int, sliding_window: int,
    logits_soft_cap: float, preset: str, recent_cache=None, recent_table=None, older_lens=None,
) -> None:  # fmt: skip
    """Attend this step's tokens to their prefixes' codes and to themselves; arguments in schema.py."""
    from tq_vllm.triton_kernels.dequantize import dequantize, place, plan
    from tq_vllm.triton_kernels.merge_passes import merge_pass

    num_tokens, num_kv_heads, head_dim = key.shape
    num_reqs = len(seq_lens)
    if num_reqs == 0 or max_query_len == 0:
        return
    page = get_page(preset, head_dim)
    context_tokens = max(line_tokens(num_reqs, num_tokens, total_seq_len, sliding_window) - num_tokens, 0)
    keys, values = workspace(num_tokens, num_kv_heads, head_dim, key.dtype, key.device)
    joined = context_tokens + num_tokens <= len(keys)
    slice_tokens = len(keys)
    num_passes = 1 if joined else -(-context_tokens // slice_tokens) + 1
    if total_seq_len == num_tokens:  # no request has a prefix: nothing to lay out
        starts, bounds = None, (query_start_loc,)
    else:
        starts, bounds = plan(seq_lens, query_start_loc, num_passes, slice_tokens, sliding_window)

    def fill(first: int, last: int) -> None:
        if context_tokens:
            dequantize(kv_cache, block_table, seq_lens, query_start_loc, starts, key_offset, keys, values, first, last,
                       context_tokens, sliding_window, page)  # fmt: skip
            if recent_cache is not None:  # over what the codes gave for the same tokens
                dequantize(recent_cache, recent_table, seq_lens, query_start_loc, starts, key_offset, keys, values,
                           first, last, context_tokens, sliding_window, get_page(RECENT_PRESET, head_dim),
                           page.config.recent_tokens - 1)  # fmt: skip

    def attend(i: int, max_key_len: int, causal: bool, into: torch.Tensor) -> torch.Tensor:
        """Run pass i into `into` and return its LSE."""
        window = (sliding_window - 1, 0) if sliding_window > 0 else (-1, -1)
        return _flash_attention(query, keys, values, query_start_loc, bounds[i], max_query_len,
                                max_key_len, softmax_scale, causal, window, logits_soft_cap, into)[1]  # fmt: skip

    if joined:
        fill(0, len(keys))
        place(key, value, seq_lens, query_start_loc, bounds[0], keys, values)
        found = attend(0, max_seq_len, True, out)
        if sinks is not None or lse is not None:
            lse = found if lse is None else lse
            merge_pass(out, found, None, lse, sinks, out, query_start_loc, first=True)
        return
    part, total, total_lse = temporaries(query)
    if lse is not None:
        total_lse = lse
    for i in range(num_passes - 1):
        fill(i * slice_tokens, (i + 1) * slice_tokens)
        found = attend(i, min(max_seq_len, slice_tokens), False, part)
        merge_pass(part, found, total, total_lse, None, None, query_start_loc, first=i == 0)
    place(key, value, seq_lens, query_start_loc, bounds[-1], keys, values)
    found = attend(num_passes - 1, max_query_len, True, part)
    merge_pass(part, found, total, total_lse, sinks, out, query_start_loc, first=False)
