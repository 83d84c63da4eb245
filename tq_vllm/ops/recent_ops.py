"""Attention to codes and to a cache of the newest tokens, each read by the kernel that serves it alone, then merged.

Row p of a decode sees positions up to p - recent_tokens in codes: those of a sequence that is recent_tokens shorter,
with the same query tokens at its end. A step with raw keys and values comes here only where FlashAttention can't serve
it (flash_ops.supports); its own tokens are then read from the two caches, like those of a decode.
"""

import torch

from tq_vllm.config import RECENT_PRESET, get_config
from tq_vllm.ops import select
from tq_vllm.ops.select import Call


def supports(call: Call) -> str | None:
    """Say why a call can't be served; None when it can."""
    if not call.recent:
        return "the call reads one cache"
    for part in _parts(call):
        select.select(part)
    return None


def _parts(call: Call) -> tuple[Call, Call]:
    alone = call._replace(op="attention", recent=False, fresh=False, sinks=False, long=False)
    return alone, alone._replace(preset=RECENT_PRESET, sliding_window=True)


def attention(
    query, key, value, kv_cache, block_table, seq_lens, query_start_loc, key_offset, sinks, out, lse,
    softmax_scale: float, max_query_len: int, max_seq_len: int, total_seq_len: int, sliding_window: int,
    logits_soft_cap: float, preset: str, recent_cache, recent_table, older_lens,
) -> None:  # fmt: skip
    """Attend queries to both caches; arguments in schema.py. Safe in a CUDA graph if both kernels are."""

    def read_newest(*args) -> None:
        select.attention(query, None, None, recent_cache, recent_table, *args)

    _attend(
        read_newest, query, kv_cache, block_table, seq_lens, query_start_loc, key_offset, sinks, out, lse,
        softmax_scale, max_query_len, max_seq_len, total_seq_len, sliding_window, logits_soft_cap, preset, older_lens,
    )  # fmt: skip


def store_and_attend(
    query, key, value, kv_cache, slot_mapping, positions, block_table, seq_lens, query_start_loc, key_offset, sinks,
    out, lse, softmax_scale: float, max_query_len: int, max_seq_len: int, total_seq_len: int, sliding_window: int,
    logits_soft_cap: float, preset: str, recent_cache, recent_slots, recent_table, older_lens,
) -> None:  # fmt: skip
    """The same after writing this step's tokens to both caches; what reads the newest ones may write them too."""

    def store_and_read_newest(*args) -> None:
        select.store_and_attend(query, key, value, recent_cache, recent_slots, positions, recent_table, *args)

    select.store_kv(key, value, kv_cache, slot_mapping, positions, key_offset, preset)
    _attend(
        store_and_read_newest, query, kv_cache, block_table, seq_lens, query_start_loc, key_offset, sinks, out, lse,
        softmax_scale, max_query_len, max_seq_len, total_seq_len, sliding_window, logits_soft_cap, preset, older_lens,
    )  # fmt: skip


def _attend(
    read_newest, query, kv_cache, block_table, seq_lens, query_start_loc, key_offset, sinks, out, lse,
    softmax_scale: float, max_query_len: int, max_seq_len: int, total_seq_len: int, sliding_window: int,
    logits_soft_cap: float, preset: str, older_lens,
) -> None:  # fmt: skip
    """Attend to the newest tokens by `read_newest`, which takes the arguments of an attention from seq_lens on."""
    from tq_vllm.triton_kernels.merge_passes import merge_pass

    if len(seq_lens) == 0 or max_query_len == 0:
        return
    recent = get_config(preset).recent_tokens

    def rest(lens, window: int, of_preset: str, into, into_lse) -> tuple:
        return (lens, query_start_loc, key_offset, None, into, into_lse, softmax_scale, max_query_len, max_seq_len,
                total_seq_len, window, logits_soft_cap, of_preset)  # fmt: skip

    newest = query.new_empty(query.shape)
    newest_lse = query.new_empty(query.shape[1::-1], dtype=torch.float32) if lse is None else lse
    window = min(recent, sliding_window) if sliding_window > 0 else recent
    read_newest(*rest(seq_lens, window, RECENT_PRESET, newest, newest_lse))
    if 0 < sliding_window <= recent:
        merge_pass(newest, newest_lse, None, newest_lse, sinks, out, query_start_loc, first=True)
        return
    older, older_lse = torch.empty_like(newest), torch.empty_like(newest_lse)
    of_older = rest(older_lens, max(sliding_window - recent, 0), preset, older, older_lse)
    select.attention(query, None, None, kv_cache, block_table, *of_older)
    merge_pass(older, older_lse, newest, newest_lse, sinks, out, query_start_loc, first=False)
