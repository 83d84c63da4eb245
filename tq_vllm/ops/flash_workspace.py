"""The buffer that a prefill's keys and values are dequantized into: bounded, one a stream, shared by all layers."""

import torch

from tq_vllm.format import SEGMENT_TOKENS

WORKSPACE_BYTES = 256 << 20  # for keys and values; more only where the tokens of one step alone need it

_buffers: dict[torch.device, dict[int, torch.Tensor]] = {}  # device -> stream -> bytes


def workspace_tokens(num_kv_heads: int, head_dim: int) -> int:
    """Tokens of 16-bit keys and values that the buffer holds, a multiple of 64."""
    return WORKSPACE_BYTES // (4 * num_kv_heads * head_dim) // 64 * 64


def line_tokens(num_reqs: int, num_tokens: int, total_seq_len: int, sliding_window: int) -> int:
    """Upper bound of the tokens of this step and of the prefixes that it still sees, which start at a segment."""
    if sliding_window <= 0:
        return total_seq_len
    return min(total_seq_len, num_tokens + num_reqs * (sliding_window + SEGMENT_TOKENS))


def is_long(num_kv_heads: int, head_dim: int, num_tokens: int) -> bool:
    """Whether so many tokens (line_tokens) may take more than one pass."""
    return num_tokens > workspace_tokens(num_kv_heads, head_dim)


def workspace(
    num_tokens: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return keys and values, 16-bit [tokens, num_kv_heads, head_dim] each, for num_tokens or more."""
    of_stream = _buffers.setdefault(device, {})
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    tokens = max(workspace_tokens(num_kv_heads, head_dim), num_tokens)
    size = 4 * tokens * num_kv_heads * head_dim
    if stream not in of_stream or of_stream[stream].numel() < size:
        of_stream[stream] = torch.empty(size, dtype=torch.uint8, device=device)
    keys, values = of_stream[stream][:size].view(dtype).view(2, tokens, num_kv_heads, head_dim).unbind(0)
    return keys, values


def temporaries(query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return what a pass over a part of the context gives and what the passes add up to: like query, f32 like query,
    f32 [num_heads, num_tokens]."""
    num_tokens, num_heads, _ = query.shape
    total = torch.empty(query.shape, dtype=torch.float32, device=query.device)
    return torch.empty_like(query), total, total.new_empty(num_heads, num_tokens)
