"""Dense attention in float64: the oracle of every kernel that reads the cache."""

import math

import torch


def attention_reference(
    query: torch.Tensor,
    keys: list[torch.Tensor],
    values: list[torch.Tensor],
    query_start_loc: torch.Tensor,
    softmax_scale: float,
    sliding_window: int = 0,
    logits_soft_cap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend the last query_len[r] positions of every request r to that request's keys, causally.

    Args:
        query: [num_tokens, num_heads, head_dim].
        keys, values: one [seq_len, num_kv_heads, head_dim] a request, as the queries see them, this step's tokens
            included; query token i of request r stands at position seq_len[r] - query_len[r] + i.
        query_start_loc: int [num_reqs + 1].
        sliding_window: 0, or how many positions a query sees, itself included.
        logits_soft_cap: 0, or c in c * tanh(score / c).
        sinks: [num_heads] or None; a score that takes weight and carries no value.

    Returns:
        out float64 [num_tokens, num_heads, head_dim] and lse float64 [num_heads, num_tokens] (natural logarithm, sinks
        not included); 0 and -inf for a query with nothing to attend and for rows past query_start_loc[-1].
    """
    num_tokens, num_heads, _ = query.shape
    out = torch.zeros(query.shape, dtype=torch.float64, device=query.device)
    lse = torch.full((num_heads, num_tokens), -math.inf, dtype=torch.float64, device=query.device)
    bounds = query_start_loc.tolist()
    for key, value, start, end in zip(keys, values, bounds[:-1], bounds[1:], strict=True):
        seq_len, num_kv_heads, _ = key.shape
        if seq_len == 0 or start == end:
            continue
        group = num_heads // num_kv_heads
        q = query[start:end].double().transpose(0, 1)  # [num_heads, query_len, head_dim]
        k = key.double().transpose(0, 1).repeat_interleave(group, 0)  # [num_heads, seq_len, head_dim]
        v = value.double().transpose(0, 1).repeat_interleave(group, 0)
        scores = softmax_scale * (q @ k.transpose(1, 2))  # [num_heads, query_len, seq_len]
        if logits_soft_cap > 0:
            scores = logits_soft_cap * torch.tanh(scores / logits_soft_cap)
        position = torch.arange(seq_len - (end - start), seq_len, device=query.device)[:, None]
        token = torch.arange(seq_len, device=query.device)
        seen = token <= position
        if sliding_window > 0:
            seen &= token > position - sliding_window
        scores = scores.masked_fill(~seen, -math.inf)
        lse[:, start:end] = scores.logsumexp(-1)
        if sinks is not None:
            scores = torch.cat((scores, sinks.double()[:, None, None].expand(-1, end - start, 1)), -1)
        out[start:end] = (scores.softmax(-1)[..., :seq_len] @ v).transpose(0, 1)
    return out, lse
