"""The two operations in PyTorch, for any device: the reference of every kernel, and the one that runs without any.

Attention takes query tokens in tiles of one request each and walks over the keys in chunks with an online softmax, so
that memory stays bounded whatever the batch; tiles are sorted by length and the finished ones dropped. Codes are scored in
rotated space: queries are rotated once, keys never, and the weighted sum of values is rotated back once a query.
"""

import math

import torch

from tq_vllm.core.cache import compute_dtype, encode_kv
from tq_vllm.core.rotations import get_rotation
from tq_vllm.format import SEGMENT_TOKENS
from tq_vllm.ops.select import Call
from tq_vllm.ops.torch_pages import get_page, read_tokens, write_tokens

QUERY_TILE = 128  # query tokens of a tile
KEY_CHUNK = 512  # keys of a chunk
WORKSPACE_BYTES = 64 << 20  # of the largest temporaries of one chunk, together


def store_kv(key, value, kv_cache, slot_mapping, positions, key_offset, preset: str) -> None:
    """Quantize keys and values and write them to their slots; arguments in schema.py."""
    page = get_page(preset, key.shape[-1])
    kept = (slot_mapping >= 0).nonzero().squeeze(1)  # [num_stored]
    if kept.numel() == 0:
        return
    if key_offset is not None:
        positions = positions[kept]
    encoded = encode_kv(key[kept], value[kept], page.config, positions, key_offset)
    write_tokens(kv_cache, page, slot_mapping[kept], encoded)


class _Softmax:
    """Online softmax of rows over chunks of keys: running maximum, sum of weights and weighted sum of values."""

    def __init__(self, rows: tuple[int, ...], head_dim: int, like: torch.Tensor):
        self.maximum = like.new_full((*rows, 1), -math.inf)  # [tiles, num_kv_heads, rows, 1]
        self.total = like.new_zeros((*rows, 1))
        self.output = like.new_zeros((*rows, head_dim))

    def add(self, n: int, scores: torch.Tensor, value_scale: torch.Tensor | None, value: torch.Tensor) -> None:
        """Take scores [n, num_kv_heads, rows, keys] (-inf: not seen) of the first n tiles and values [n, num_kv_heads, keys,
        head_dim], finite, times value_scale [n, num_kv_heads, 1, keys], finite."""
        maximum, total, output = self.maximum[:n], self.total[:n], self.output[:n]
        new_maximum = torch.maximum(maximum, scores.amax(-1, keepdim=True))
        pivot = new_maximum.masked_fill(new_maximum == -math.inf, 0.0)  # a row that has seen nothing yet
        weights = scores.sub_(pivot).exp_()
        old = (maximum - pivot).exp_()
        total.mul_(old).add_(weights.sum(-1, keepdim=True))
        if value_scale is not None:
            weights.mul_(value_scale)
        output.mul_(old).add_(weights @ value)
        maximum.copy_(new_maximum)


def _finite_vectors(x: torch.Tensor) -> torch.Tensor:
    """Replace vectors that the cache would store as zero (any NaN or inf) by zeros."""
    return x.masked_fill(~x.isfinite().all(-1, keepdim=True), 0.0)


def attention(
    query, key, value, kv_cache, block_table, seq_lens, query_start_loc, key_offset, sinks, out, lse,
    softmax_scale: float, max_query_len: int, max_seq_len: int, sliding_window: int, logits_soft_cap: float, preset: str,
) -> None:  # fmt: skip
    """Attend queries to the cache and, with key and value, to this step's raw tokens; arguments in schema.py."""
    num_heads, head_dim = query.shape[1:]
    num_kv_heads = kv_cache.shape[1]
    group = num_heads // num_kv_heads
    page = get_page(preset, head_dim)
    dtype = compute_dtype(query)
    rotation = get_rotation(head_dim)
    chunk_blocks = max(1, KEY_CHUNK // kv_cache.shape[2])
    chunk = chunk_blocks * kv_cache.shape[2]
    tile_tokens = max(1, min(max_query_len, QUERY_TILE * KEY_CHUNK // chunk))

    # Tiles of query tokens: request, tokens and positions of each, longest first.
    query_start, query_len = query_start_loc[:-1].long(), query_start_loc.diff().long()  # [num_reqs]
    tiles_of = (query_len + tile_tokens - 1) // tile_tokens
    request = torch.arange(len(tiles_of), device=query.device).repeat_interleave(tiles_of)  # [num_tiles]
    first = (torch.arange(len(request), device=query.device) - (tiles_of.cumsum(0) - tiles_of)[request]) * tile_tokens
    context_len = seq_lens.long() - query_len
    last = torch.minimum(first + tile_tokens, query_len[request])  # one past the tile's last token, in its request
    from_codes = context_len[request] + (last if key is None else 0)  # [num_tiles] keys read from codes
    order = from_codes.argsort(descending=True, stable=True)
    request, first, last, from_codes = request[order], first[order], last[order], from_codes[order]

    if len(request) == 0:
        return

    bytes_of_tile = dtype.itemsize * num_kv_heads * chunk * (2 * head_dim + 2 * group * tile_tokens)
    tiles_at_once = max(1, WORKSPACE_BYTES // bytes_of_tile)
    for request_t, first_t, last_t, codes_t in zip(
        *(x.split(tiles_at_once) for x in (request, first, last, from_codes)), strict=True
    ):
        n = len(request_t)
        index = first_t[:, None] + torch.arange(tile_tokens, device=query.device)  # [n, tile_tokens] token in its request
        real = index < last_t[:, None]
        token = (query_start[request_t, None] + index).clamp(max=len(query) - 1)
        position = (context_len[request_t, None] + index).repeat_interleave(group, 1)[:, None, :, None]  # [n, 1, rows, 1]
        q = query[token].to(dtype) * softmax_scale  # [n, tile_tokens, num_heads, head_dim]
        q = q.unflatten(2, (num_kv_heads, group)).transpose(1, 2).flatten(2, 3)  # [n, num_kv_heads, rows, head_dim]
        softmax = _Softmax(q.shape[:3], head_dim, q)

        def mask(scores, keys, limit, position):
            """Soft cap, then -inf where a row [n, 1, rows, 1] must not see a key [keys]; limit int64 [n]."""
            if logits_soft_cap > 0:
                scores = (scores / logits_soft_cap).tanh_().mul_(logits_soft_cap)
            seen = (keys <= position) & (keys < limit[:, None, None, None])
            if sliding_window > 0:
                seen &= keys > position - sliding_window
            return torch.where(seen, scores, -math.inf)

        lengths = codes_t.tolist()
        start = 0
        if sliding_window > 0:
            start = max(0, int(position[:, 0, 0].min()) - sliding_window + 1) // chunk * chunk
        q_rotated = rotation.forward(q)
        for start in range(start, max(lengths), chunk):
            m = sum(length > start for length in lengths)  # tiles with keys left
            keys = torch.arange(start, start + chunk, device=query.device)
            columns = torch.arange(start // chunk * chunk_blocks, (start // chunk + 1) * chunk_blocks, device=query.device)
            blocks = block_table[request_t[:m]][:, columns.clamp_(max=block_table.shape[1] - 1)]
            blocks = blocks.long().clamp_(0, kv_cache.shape[0] - 1)  # entries past a request's end hold anything
            k, v, key_scale, value_scale = read_tokens(kv_cache, page, blocks, dtype)
            written = (keys < codes_t[:m, None])[:, None]  # [m, 1, chunk]
            key_scale, value_scale = (torch.where(written, s, 0.0)[:, :, None] for s in (key_scale, value_scale))
            scores = (q_rotated[:m] @ k.transpose(2, 3)).mul_(key_scale)
            if key_offset is not None:
                segment = torch.div(keys, SEGMENT_TOKENS, rounding_mode="floor")
                offset = key_offset[segment[::1].unique().clamp(max=key_offset.shape[0] - 1)].to(dtype)
                of_segment = torch.einsum("nhrd,shd->nhrs", q[:m], offset)  # [m, num_kv_heads, rows, segments]
                scores += of_segment[..., segment - segment[0]]
            softmax.add(m, mask(scores, keys, codes_t[:m], position[:m]), value_scale, v)
        softmax.output = rotation.inverse(softmax.output)

        if key is not None:
            for start in range(0, int(last_t.max()), KEY_CHUNK):
                index = torch.arange(start, start + KEY_CHUNK, device=query.device)  # [keys], token in its request
                token_k = (query_start[request_t, None] + index).clamp(max=len(key) - 1)
                k, v = (_finite_vectors(x[token_k].to(dtype)).transpose(1, 2) for x in (key, value))
                scores = (q @ k.transpose(2, 3))  # [n, num_kv_heads, rows, keys]
                relative = position - context_len[request_t, None, None, None]
                limit = last_t * (seq_lens[request_t] > 0)
                softmax.add(n, mask(scores, index, limit, relative), None, v)

        logsumexp = softmax.maximum + softmax.total.log()  # [n, num_kv_heads, rows, 1]
        total = softmax.total
        if sinks is not None:
            sink = sinks.to(dtype).view(num_kv_heads, 1, group).expand(-1, tile_tokens, -1).reshape(num_kv_heads, -1, 1)
            pivot = softmax.maximum.masked_fill(softmax.maximum == -math.inf, 0.0)
            total = total + (sink - pivot).exp()
        result = torch.where(softmax.total == 0, 0.0, softmax.output / total)
        result = result.unflatten(2, (tile_tokens, group)).transpose(1, 2).flatten(2, 3)  # [n, tile_tokens, num_heads, d]
        out[token[real]] = result[real].to(out.dtype)
        if lse is not None:
            logsumexp = logsumexp[..., 0].unflatten(2, (tile_tokens, group)).transpose(1, 2).flatten(2, 3)
            lse[:, token[real]] = logsumexp[real].t().to(lse.dtype)


def supports(call: Call) -> None:
    """Serve every call."""
    return None
