"""The two operations in PyTorch, for any device: the reference of every kernel, and the one that needs none.

Attention cuts the queries into tiles, each of one request, and walks over the keys in chunks with an online softmax, so
that memory stays bounded whatever the batch. Tiles are sorted by length, and those that are done drop out. Codes are
scored in rotated space: queries are rotated once, keys never, and the weighted sum of values is rotated back once.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from tq_vllm.config import RECENT_PRESET
from tq_vllm.core.cache import compute_dtype, encode_kv
from tq_vllm.core.qjl import page_sketch
from tq_vllm.core.rotations import get_rotation
from tq_vllm.format import SEGMENT_TOKENS, TILE_TOKENS, TurboQuantPage
from tq_vllm.ops.select import Call
from tq_vllm.ops.torch_pages import get_page, read_sketches, read_tiles, write_tokens

QUERY_TILE = 128  # query tokens of a tile, at most
KEY_CHUNKS = (256, 1024)  # keys of a chunk: fewest and most
STORE_ELEMENTS = 1 << 17  # coordinates of keys encoded at once
WORKSPACE_BYTES = 4 << 20  # keys, values and scores of a chunk: what a CPU core's cache holds is also what is fastest


def supports(call: Call) -> None:
    """Serve every call."""
    return None


def store_kv(key, value, kv_cache, slot_mapping, positions, key_offset, preset: str) -> None:
    """Quantize keys and values and write them to their slots; arguments in schema.py."""
    page = get_page(preset, key.shape[-1])
    kept = (slot_mapping >= 0).nonzero().squeeze(1)  # [num_stored]
    for rows in kept.split(max(1, STORE_ELEMENTS // key[0].numel())) if len(kept) else ():
        at = positions[rows] if key_offset is not None and positions is not None else None
        encoded = encode_kv(key[rows], value[rows], page.config, at, key_offset)
        write_tokens(kv_cache, page, slot_mapping[rows], encoded)


def attention(
    query, key, value, kv_cache, block_table, seq_lens, query_start_loc, key_offset, sinks, out, lse,
    softmax_scale: float, max_query_len: int, max_seq_len: int, total_seq_len: int, sliding_window: int,
    logits_soft_cap: float, preset: str, recent_cache=None, recent_table=None, older_lens=None,
) -> None:  # fmt: skip
    """Attend queries to the cache and, with key and value, to this step's raw tokens; arguments in schema.py."""
    step = _Step(
        query, key, value, kv_cache, block_table, seq_lens, query_start_loc, key_offset, sinks, out, lse,
        softmax_scale, sliding_window, logits_soft_cap, preset, recent_cache, recent_table,
    )  # fmt: skip
    num_kv_heads = kv_cache.shape[1]
    tile_tokens = max(1, min(max_query_len, QUERY_TILE))
    tiles = _query_tiles(query_start_loc, seq_lens, tile_tokens, key is not None)
    rows = tile_tokens * query.shape[1] // num_kv_heads
    bytes_of_key = compute_dtype(query).itemsize * num_kv_heads * 2 * (query.shape[2] + rows)
    keys = WORKSPACE_BYTES // (bytes_of_key * max(1, len(tiles.request)))  # of a chunk, if all tiles go together
    chunk = min(max(keys // SEGMENT_TOKENS * SEGMENT_TOKENS, KEY_CHUNKS[0]), KEY_CHUNKS[1])
    tiles_at_once = max(1, WORKSPACE_BYTES // (bytes_of_key * min(chunk, max(1, max_seq_len))))
    for start in range(0, len(tiles.request), tiles_at_once):
        step.attend(_Tiles(*(x[start : start + tiles_at_once] for x in tiles)), tile_tokens, chunk)


class _Tiles(NamedTuple):
    """Query tiles; tokens are counted from the request's first token of this step."""

    request: torch.Tensor  # [num_tiles] int64
    first: torch.Tensor  # [num_tiles] int64, the tile's first token
    last: torch.Tensor  # [num_tiles] int64, one past its last token
    context: torch.Tensor  # [num_tiles] int64, tokens of the request before this step; negative for seq_len 0
    from_codes: torch.Tensor  # [num_tiles] int64, leading positions to read from codes


def _query_tiles(
    query_start_loc: torch.Tensor, seq_lens: torch.Tensor, tile_tokens: int, has_fresh_tokens: bool
) -> _Tiles:
    """Cut every request's query tokens into tiles, longest reads first."""
    query_len = query_start_loc.diff().long()  # [num_reqs]
    tiles_of = (query_len + tile_tokens - 1) // tile_tokens
    request = torch.arange(len(tiles_of), device=tiles_of.device).repeat_interleave(tiles_of)
    first = torch.arange(len(request), device=tiles_of.device) - (tiles_of.cumsum(0) - tiles_of)[request]
    first *= tile_tokens
    last = torch.minimum(first + tile_tokens, query_len[request])
    context = (seq_lens.long() - query_len)[request]
    from_codes = (context if has_fresh_tokens else context + last).clamp(min=0)
    order = (from_codes << 32 | last).argsort(descending=True)
    return _Tiles(request[order], first[order], last[order], context[order], from_codes[order])


class _Source(NamedTuple):
    """A cache, and what tiles of queries read of it."""

    kv_cache: torch.Tensor
    block_table: torch.Tensor
    page: TurboQuantPage
    tiles: _Tiles  # positions and ends moved, so that a row sees what this cache serves
    window: int  # 0, or how many positions a row sees
    oldest: torch.Tensor | None = None  # [num_tiles] int64: first position to read, may be negative


class _Softmax:
    """Online softmax of rows over chunks of keys: running maximum, sum of weights, weighted sum of values."""

    def __init__(self, queries: torch.Tensor):
        """Start with nothing seen for queries [num_tiles, num_kv_heads, rows, head_dim]."""
        self.maximum = queries.new_full((*queries.shape[:3], 1), -math.inf)
        self.total = queries.new_zeros((*queries.shape[:3], 1))
        self.output = torch.zeros_like(queries)

    def add(self, scores: torch.Tensor, value: torch.Tensor, value_scale: torch.Tensor | None = None) -> None:
        """Add a chunk to the first n tiles.

        Args:
            scores: [n, num_kv_heads, rows, keys], -inf where a key is not seen; overwritten.
            value: [n, num_kv_heads, keys, head_dim], finite.
            value_scale: [n, num_kv_heads, 1, keys], finite, or None for 1.
        """
        n = len(scores)
        maximum, total, output = self.maximum[:n], self.total[:n], self.output[:n]
        new_maximum = torch.maximum(maximum, scores.amax(-1, keepdim=True))
        pivot = new_maximum.masked_fill(new_maximum == -math.inf, 0.0)  # rows that have seen nothing yet
        weights = scores.sub_(pivot).exp_()
        old = (maximum - pivot).exp_()
        total.mul_(old).add_(weights.sum(-1, keepdim=True))
        if value_scale is not None:
            weights.mul_(value_scale)
        output.mul_(old).add_(weights @ value)
        maximum.copy_(new_maximum)


@dataclass
class _Step:
    """The arguments of `attention`, and the way of one group of tiles through them."""

    query: torch.Tensor
    key: torch.Tensor | None
    value: torch.Tensor | None
    kv_cache: torch.Tensor
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    query_start_loc: torch.Tensor
    key_offset: torch.Tensor | None
    sinks: torch.Tensor | None
    out: torch.Tensor
    lse: torch.Tensor | None
    softmax_scale: float
    sliding_window: int
    logits_soft_cap: float
    preset: str
    recent_cache: torch.Tensor | None
    recent_table: torch.Tensor | None

    def attend(self, tiles: _Tiles, tile_tokens: int, chunk: int) -> None:
        """Compute and write the rows of `tiles`."""
        _, num_heads, head_dim = self.query.shape
        num_kv_heads = self.kv_cache.shape[1]
        group = num_heads // num_kv_heads
        rotation = get_rotation(head_dim)
        index = tiles.first[:, None] + torch.arange(tile_tokens, device=self.query.device)  # [n, tile_tokens]
        token = self._rows_of(tiles, index)
        queries = self.query[token].to(compute_dtype(self.query)) * self.softmax_scale
        # A row is (query token, query head of the KV head's group): [n, num_kv_heads, rows, head_dim].
        queries = queries.unflatten(2, (num_kv_heads, group)).transpose(1, 2).flatten(2, 3)
        row_index = index.repeat_interleave(group, 1)[:, None, :, None]  # [n, 1, rows, 1]
        softmax = _Softmax(queries)
        rotated = rotation.forward(queries)
        for source in self._sources(tiles, head_dim):
            self._add_codes(softmax, source, row_index, queries, rotated, chunk)
        softmax.output = rotation.inverse(softmax.output)
        if self.key is not None:
            self._add_fresh(softmax, tiles, row_index, queries)

        total = softmax.total  # [n, num_kv_heads, rows, 1]
        lse = softmax.maximum + total.log()
        if self.sinks is not None:
            sinks = self.sinks.to(queries.dtype).view(num_kv_heads, 1, group).expand(-1, tile_tokens, -1)
            pivot = softmax.maximum.masked_fill(softmax.maximum == -math.inf, 0.0)
            total = total + (sinks.reshape(num_kv_heads, -1, 1) - pivot).exp()
        out = torch.where(total == 0, 0.0, softmax.output / total)
        out, lse = (x.unflatten(2, (tile_tokens, group)).transpose(1, 2).flatten(2, 3) for x in (out, lse))
        real = index < tiles.last[:, None]  # [n, tile_tokens]
        self.out[token[real]] = out[real].to(self.out.dtype)
        if self.lse is not None:
            self.lse[:, token[real]] = lse[real].squeeze(-1).t().to(self.lse.dtype)

    def _rows_of(self, tiles: _Tiles, index: torch.Tensor) -> torch.Tensor:
        """Return the rows of `query` and `key` of tokens [n or 1, tokens] of the tiles' requests: [n, tokens]."""
        return (self.query_start_loc[tiles.request, None] + index).clamp(max=len(self.query) - 1)

    def _sources(self, tiles: _Tiles, head_dim: int) -> list["_Source"]:
        """The caches that hold what the tiles see of earlier positions, each with its part of them."""
        page = get_page(self.preset, head_dim)
        everything = _Source(self.kv_cache, self.block_table, page, tiles, self.sliding_window)
        if self.recent_cache is None:
            return [everything]
        recent = page.config.recent_tokens
        decodes = self.key is None
        # A decode's newest tokens end at each row, a prefill's at the first.
        behind = recent if decodes else recent - 1
        newest = everything._replace(
            kv_cache=self.recent_cache,
            block_table=self.recent_table,
            page=get_page(RECENT_PRESET, head_dim),
            oldest=(tiles.context + tiles.first if decodes else tiles.context) - (recent - 1),
        )
        if decodes:
            newest = newest._replace(window=min(recent, self.sliding_window or recent))
        if 0 < self.sliding_window <= behind:
            return [newest]
        older = tiles._replace(context=tiles.context - behind, from_codes=(tiles.from_codes - behind).clamp(min=0))
        return [everything._replace(tiles=older, window=max(self.sliding_window - behind, 0)), newest]

    def _add_codes(self, softmax, source: "_Source", row_index, queries, rotated, chunk: int) -> None:
        """Add the source's positions, chunk by chunk; queries and rotated [n, num_kv_heads, rows, d]."""
        kv_cache, block_table, page, tiles, window, oldest = source
        sketched = page_sketch(queries.shape[-1]).forward(rotated) if page.config.key_sketch else None
        position = tiles.context[:, None, None, None] + row_index  # [n, 1, rows, 1]
        ends = tiles.from_codes.tolist()
        seen_by_all = torch.minimum(tiles.from_codes, tiles.context + tiles.first + 1).tolist()
        block_size = kv_cache.shape[2]
        if window > 0:
            of_window = tiles.context + tiles.first - window + 1
            oldest = of_window if oldest is None else torch.maximum(oldest, of_window)
        skipped = max(int(oldest.min()), 0) // chunk * chunk if oldest is not None and ends else 0
        for start in range(skipped, max(ends, default=0), chunk):
            n = sum(end > start for end in ends)
            stop = start + min(chunk, -(-(ends[0] - start) // TILE_TOKENS) * TILE_TOKENS)
            keys = torch.arange(start, stop, device=queries.device)
            end = tiles.from_codes[:n, None]  # [n, 1]
            tile = keys[::TILE_TOKENS]
            blocks = block_table[tiles.request[:n, None], tile // block_size]
            blocks = blocks.long().clamp_(0, len(kv_cache) - 1)  # entries past a request's end hold anything
            tile = tile % block_size // TILE_TOKENS
            k, v, key_scale, value_scale = read_tiles(kv_cache, page, blocks, tile, queries.dtype)
            written = (keys < end)[:, None]  # [n, 1, keys]
            if oldest is not None:
                written = written & (keys >= oldest[:n, None])[:, None]
            # Slots past a request's end, or before the oldest, hold anything, NaN scales included.
            if oldest is not None or stop > ends[n - 1]:
                key_scale, value_scale = (torch.where(written, s, 0.0) for s in (key_scale, value_scale))
            scores = (rotated[:n] @ k.transpose(2, 3)).mul_(key_scale[:, :, None])
            if sketched is not None:
                signs, sketch_scale = read_sketches(kv_cache, page, blocks, tile, queries.dtype)
                sketch_scale = torch.where(written, sketch_scale, 0.0)
                scores += (sketched[:n] @ signs.transpose(2, 3)).mul_(sketch_scale[:, :, None])
            if self.key_offset is not None:
                scores += self._offset_scores(queries[:n], start, stop - start)
            self._cap(scores)
            if window > 0 or stop > min(seen_by_all[:n]):
                self._hide(scores, keys, position[:n], end, window)
            if oldest is not None:
                scores.masked_fill_(~written[:, :, None], -math.inf)
            softmax.add(scores, v, value_scale[:, :, None])

    def _offset_scores(self, queries: torch.Tensor, start: int, num_keys: int) -> torch.Tensor:
        """Return q . key_offset of positions start .. start + num_keys - 1: [n, num_kv_heads, rows, num_keys]."""
        position = torch.arange(start, start + num_keys, device=queries.device)
        segment = torch.div(position, SEGMENT_TOKENS, rounding_mode="floor").clamp_(max=len(self.key_offset) - 1)
        first = min(start // SEGMENT_TOKENS, len(self.key_offset) - 1)
        last = min((start + num_keys - 1) // SEGMENT_TOKENS, len(self.key_offset) - 1)
        offset = self.key_offset[first : last + 1].to(queries.dtype)  # [segments, num_kv_heads, head_dim]
        return (queries @ offset.permute(1, 2, 0)).index_select(-1, segment - first)

    def _add_fresh(self, softmax: _Softmax, tiles: _Tiles, row_index, queries) -> None:
        """Add this step's raw tokens; what the cache would store as zero (squared norm not finite) counts as zero."""
        # A request of length 0 (padding of a captured graph) attends nothing, itself included.
        visible = torch.where(tiles.context + tiles.last > 0, tiles.last, 0)
        ends = visible.tolist()
        for start in range(0, max(ends), KEY_CHUNKS[0]):
            n = max(i for i, end in enumerate(ends) if end > start) + 1
            keys = torch.arange(start, min(start + KEY_CHUNKS[0], max(ends)), device=queries.device)
            row = self._rows_of(_Tiles(*(x[:n] for x in tiles)), keys)
            k, v = (x[row].to(queries.dtype) for x in (self.key, self.value))  # [n, keys, num_kv_heads, head_dim]
            k, v = (x.masked_fill(~x.square().sum(-1, keepdim=True).isfinite(), 0.0).transpose(1, 2) for x in (k, v))
            scores = queries[:n] @ k.transpose(2, 3)
            self._cap(scores)
            self._hide(scores, keys, row_index[:n], visible[:n, None], self.sliding_window)
            softmax.add(scores, v)

    def _cap(self, scores: torch.Tensor) -> None:
        """Apply the soft cap in place."""
        if self.logits_soft_cap > 0:
            scores.div_(self.logits_soft_cap).tanh_().mul_(self.logits_soft_cap)

    def _hide(self, scores: torch.Tensor, keys: torch.Tensor, rows: torch.Tensor, end: torch.Tensor, window: int):
        """Set scores [n, num_kv_heads, rows, keys] to -inf where keys [keys] are after rows [n, 1, rows, 1], at or past
        end [n, 1], or out of the window."""
        hidden = (keys > rows) | (keys >= end)[:, None, None]  # [n, 1, rows, keys]
        if window > 0:
            hidden |= keys <= rows - window
        scores.masked_fill_(hidden, -math.inf)
