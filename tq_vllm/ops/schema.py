"""The operations on a TurboQuant cache, declared once: every kernel serves these schemas.

Shapes (all tensors of a call on one device):

    key, value       [num_tokens, num_kv_heads, head_dim] f32, bf16 or f16; last dimension contiguous
    query, out       [num_tokens, num_heads, head_dim]    likewise
    kv_cache         uint8 [num_blocks, num_kv_heads, block_size, slot_bytes], see format.py
    slot_mapping     int64 [num_slots <= num_tokens]: block * block_size + offset; -1 = do not store
    positions        int [num_tokens]: absolute index of the token in its sequence; needed with key_offset
    key_offset       [num_segments, num_kv_heads, head_dim], any float dtype, not rotated; the last one also serves
                     positions past its end
    block_table      int32 [num_reqs, max_blocks]
    seq_lens         int32 [num_reqs], this step's tokens included
    query_start_loc  int32 [num_reqs + 1]
    sinks            [num_heads] or None
    lse              f32 [num_heads, num_tokens] or None; natural logarithm, sinks not included
    recent_cache     uint8 [num_blocks, num_kv_heads, block_size, slot_bytes] of RECENT_PRESET, or None
    recent_table     int32 [num_reqs, max_blocks]: its blocks; entries before the newest tokens hold anything
    older_lens       int32 [num_reqs]: max(seq_lens - recent_tokens, 0)

Query token i of request r stands at position seq_lens[r] - query_len[r] + i and attends up to itself. With `key` and
`value` the tokens of this step are attended through these raw tensors and earlier ones through their codes; without,
everything is read from codes. `max_query_len`, `max_seq_len` and `total_seq_len` are upper bounds that the host knows:
of a request's tokens in this step, of its sequence, and of the sum of all sequences. A `sliding_window` of w > 0 lets
position p see p-w+1..p; a `logits_soft_cap` of c > 0 replaces a score s by c * tanh(s / c). Rows of `out` and `lse`
past query_start_loc[-1] stay untouched. A query with nothing to attend gives 0 and -inf.

`store_and_attend` is `store_kv`, then `attention` without raw keys and values: a step of decodes. Every row of `query`
has a slot, every slot that is not -1 belongs to a token of a request, and `positions` are those that follow from
`seq_lens`. `recent_slots` are the slots of the same tokens in the `recent_cache`, which is written too.

With a `recent_cache` (presets of recent_tokens = w > 0) position p reads p-w+1..p from it and what is older from
`kv_cache`. With `key` and `value` too, the tokens of this step are raw, the w-1 before them come from it for all rows.

A key or value vector whose squared norm is not finite in float32 (NaN, inf, or a norm above 1.8e19) counts as the zero
vector, stored or raw: it hurts no other token.
"""

import torch

LIBRARY = torch.library.Library("tq_vllm", "DEF")

LIBRARY.define(
    "store_kv(Tensor key, Tensor value, Tensor(a!) kv_cache, Tensor slot_mapping, Tensor? positions,"
    " Tensor? key_offset, str preset) -> ()"
)
LIBRARY.define(
    "attention(Tensor query, Tensor? key, Tensor? value, Tensor kv_cache, Tensor block_table, Tensor seq_lens,"
    " Tensor query_start_loc, Tensor? key_offset, Tensor? sinks, Tensor(a!) out, Tensor(b!)? lse, float softmax_scale,"
    " int max_query_len, int max_seq_len, int total_seq_len, int sliding_window, float logits_soft_cap,"
    " str preset, Tensor? recent_cache=None, Tensor? recent_table=None, Tensor? older_lens=None) -> ()"
)
LIBRARY.define(
    "store_and_attend(Tensor query, Tensor key, Tensor value, Tensor(a!) kv_cache, Tensor slot_mapping,"
    " Tensor? positions, Tensor block_table, Tensor seq_lens, Tensor query_start_loc, Tensor? key_offset,"
    " Tensor? sinks, Tensor(b!) out, Tensor(c!)? lse, float softmax_scale, int max_query_len, int max_seq_len,"
    " int total_seq_len, int sliding_window, float logits_soft_cap, str preset, Tensor(d!)? recent_cache=None,"
    " Tensor? recent_slots=None, Tensor? recent_table=None, Tensor? older_lens=None) -> ()"
)


@torch.library.register_fake("tq_vllm::store_kv", lib=LIBRARY)
def _(key, value, kv_cache, slot_mapping, positions, key_offset, preset):
    return None


@torch.library.register_fake("tq_vllm::attention", lib=LIBRARY)
def _(
    query, key, value, kv_cache, block_table, seq_lens, query_start_loc, key_offset, sinks, out, lse,
    softmax_scale, max_query_len, max_seq_len, total_seq_len, sliding_window, logits_soft_cap, preset,
    recent_cache=None, recent_table=None, older_lens=None,
):  # fmt: skip
    return None


@torch.library.register_fake("tq_vllm::store_and_attend", lib=LIBRARY)
def _(
    query, key, value, kv_cache, slot_mapping, positions, block_table, seq_lens, query_start_loc, key_offset, sinks,
    out, lse, softmax_scale, max_query_len, max_seq_len, total_seq_len, sliding_window, logits_soft_cap, preset,
    recent_cache=None, recent_slots=None, recent_table=None, older_lens=None,
):  # fmt: skip
    return None
