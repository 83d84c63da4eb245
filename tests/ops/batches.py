"""Paged batches and what dense attention on the same codes says about them."""

import math
from dataclasses import dataclass

import torch

import tq_vllm.ops  # noqa: F401  registers torch.ops.tq_vllm
from tq_vllm.config import PRESETS, RECENT_PRESET, get_config
from tq_vllm.core.attention import attention_reference
from tq_vllm.core.cache import kv_roundtrip
from tq_vllm.format import TurboQuantPage, head_dims_of
from tq_vllm.ops import torch_ops

store_kv = torch.ops.tq_vllm.store_kv
attention = torch.ops.tq_vllm.attention
store_and_attend = torch.ops.tq_vllm.store_and_attend

FORMATS = [name for name, config in PRESETS.items() if not config.recent_tokens]  # of one cache
ONE_LAUNCH = [name for name in FORMATS if not (PRESETS[name].trellis or PRESETS[name].key_sketch)]
PAGES = [(preset, head_dim) for preset in FORMATS for head_dim in head_dims_of(get_config(preset))]


@dataclass
class Batch:
    """A step over a paged cache: request r has seq_lens[r] tokens, the last query_lens[r] of them are of this step."""

    preset: str = "turboquant"
    seq_lens: tuple[int, ...] = (40, 7, 100)
    query_lens: tuple[int, ...] = (1, 7, 30)
    head_dim: int = 64
    num_kv_heads: int = 2
    group: int = 3
    block_size: int = 16
    sliding_window: int = 0
    logits_soft_cap: float = 0.0
    with_sinks: bool = False
    with_offset: bool = False
    fresh: bool = True
    recent_block_size: int = 32
    padding: int = 0
    share: tuple[tuple[int, int], ...] = ()  # (request, tokens): leading tokens, whole blocks, shared with request 0
    seed: int = 0
    dtype: torch.dtype = torch.float32

    def __post_init__(self):
        self.random = torch.Generator().manual_seed(self.seed)
        self.num_heads = self.num_kv_heads * self.group
        self.softmax_scale = 1.3 / math.sqrt(self.head_dim)
        self.config = get_config(self.preset)
        self.keys = [self.normal(n, self.num_kv_heads, self.head_dim) for n in self.seq_lens]
        self.values = [self.normal(n, self.num_kv_heads, self.head_dim) for n in self.seq_lens]
        for request, n in self.share:
            self.keys[request][:n], self.values[request][:n] = self.keys[0][:n], self.values[0][:n]
        num_tokens = sum(self.query_lens) + self.padding
        self.query = self.normal(num_tokens, self.num_heads, self.head_dim)
        self.sinks = self.normal(self.num_heads) if self.with_sinks else None
        segments = max(1, -(-max(self.seq_lens) // 64) - 1)  # one too few: the last one serves the rest
        self.key_offset = 5 * self.normal(segments, self.num_kv_heads, self.head_dim) if self.with_offset else None
        if self.with_offset:
            self.keys = [k + self.offset_of(torch.arange(len(k))) for k in self.keys]
        self.query_start_loc = torch.tensor((0, *self.query_lens)).cumsum(0).to(torch.int32)
        self.make_cache()

    def normal(self, *shape):
        return torch.randn(*shape, generator=self.random).to(self.dtype)

    def offset_of(self, positions):
        return self.key_offset[(positions // 64).clamp(max=len(self.key_offset) - 1)]

    def make_cache(self):
        """The cache and, for presets that have one, that of the newest tokens, whose older blocks were given back."""
        self.kv_cache, self.block_table, self.unused = self.pages(self.config, self.block_size)
        for request, n in self.share:
            self.block_table[request, : n // self.block_size] = self.block_table[0, : n // self.block_size]
        self.recent = ()
        if self.config.recent_tokens:
            cache, self.recent_table, unused = self.pages(get_config(RECENT_PRESET), self.recent_block_size)
            older = torch.tensor([max(n - self.config.recent_tokens, 0) for n in self.seq_lens], dtype=torch.int32)
            left = self.left_behind(self.recent_table, self.recent_block_size, self.config.recent_tokens, unused)
            self.recent = cache, left, older

    def left_behind(self, table, block_size, window, unused):
        """The table of a sliding window, which may name any block where the window has left one behind."""
        table = table.clone()
        for row, (n, query_len) in enumerate(zip(self.seq_lens, self.query_lens, strict=True)):
            table[row, : max(n - query_len - window + 1, 0) // block_size] = unused
        return table

    def pages(self, config, block_size):
        """A cache full of garbage, strided and not at the start of its storage, a table of shuffled blocks, and a block
        that it does not name."""
        slot_bytes = TurboQuantPage(config, self.head_dim).slot_bytes
        blocks_of = [-(-n // block_size) for n in self.seq_lens]
        num_blocks, region = sum(blocks_of) + 3, block_size * slot_bytes
        storage = torch.randint(0, 256, (num_blocks + 1, self.num_kv_heads + 1, region + 48), dtype=torch.uint8,
                                generator=self.random)  # fmt: skip
        storage[torch.rand(storage.shape, generator=self.random) < 0.3] = 0xFF  # f16 NaN among the scales
        order = torch.randperm(num_blocks, generator=self.random).tolist()
        table = torch.full((len(blocks_of), max(blocks_of, default=0) + 2), -7, dtype=torch.int32)
        for row, n in enumerate(blocks_of):
            table[row, :n] = torch.tensor([order.pop() for _ in range(n)], dtype=torch.int32)
        return storage[1:, 1:, 32 : 32 + region].unflatten(2, (block_size, slot_bytes)), table, order[0]

    def slots(self, request, positions):
        return self.slots_of(self.block_table, self.block_size, request, positions)

    @staticmethod
    def slots_of(table, block_size, request, positions):
        return table[request, positions // block_size].long() * block_size + positions % block_size

    def store(self, request, start, end):
        """Write tokens start..end of a request."""
        positions = torch.arange(start, end)
        store_kv(self.keys[request][start:end], self.values[request][start:end], self.kv_cache,
                 self.slots(request, positions), positions, self.key_offset, self.preset)  # fmt: skip
        if self.recent:
            slots = self.slots_of(self.recent_table, self.recent_block_size, request, positions)
            store_kv(self.keys[request][start:end], self.values[request][start:end], self.recent[0], slots, positions,
                     self.key_offset, RECENT_PRESET)  # fmt: skip

    def this_step(self, sequences):
        """Concatenate this step's tokens of per-request sequences, padding rows after them."""
        rows = [x[len(x) - n :] for x, n in zip(sequences, self.query_lens, strict=True)]
        return torch.cat((*rows, torch.full((self.padding, *sequences[0].shape[1:]), math.nan, dtype=self.dtype)))

    def fill(self):
        """Write every token that is not shared, one call a request."""
        for request, n in enumerate(self.seq_lens):
            self.store(request, dict(self.share).get(request, 0), n)
        return self

    def attend(self, lse=True):
        """Run the operation; padding rows come back as they were (7 and 9)."""
        out = torch.full(self.query.shape, 7.0, dtype=self.dtype)
        lse = torch.full((self.num_heads, len(self.query)), 9.0) if lse else None
        table = self.block_table
        if self.sliding_window:
            table = self.left_behind(table, self.block_size, self.sliding_window, self.unused)
        key, value = (self.this_step(self.keys), self.this_step(self.values)) if self.fresh else (None, None)
        attention(
            self.query, key, value, self.kv_cache, table, torch.tensor(self.seq_lens, dtype=torch.int32),
            self.query_start_loc, self.key_offset, self.sinks, out, lse, self.softmax_scale,
            max(self.query_lens, default=0), max(self.seq_lens, default=0), sum(self.seq_lens), self.sliding_window,
            self.logits_soft_cap, self.preset, *self.recent,
        )  # fmt: skip
        return out, lse

    def expected(self):
        """Dense float64 attention over what the queries should see."""
        keys, values, starts = [], [], [0]
        each_row = bool(self.recent) and not self.fresh  # its newest tokens are its own: a request of its own here
        for request, (seq_len, query_len) in enumerate(zip(self.seq_lens, self.query_lens, strict=True)):
            codes = self.roundtrip(request, self.config)
            finer = self.roundtrip(request, get_config(RECENT_PRESET)) if self.recent else codes
            context = seq_len - query_len
            for end in range(context + 1, seq_len + 1) if each_row else [seq_len]:
                raw = newest = context if self.fresh else end
                if self.recent:
                    newest = max(raw + self.fresh - self.config.recent_tokens, 0)
                for seen, old, fine, x in zip((keys, values), codes, finer, (self.keys, self.values), strict=True):
                    seen.append(torch.cat((old[:newest], fine[newest:raw], x[request][raw:end])))
                starts.append(starts[-1] + (1 if each_row else query_len))
        return attention_reference(
            self.query, keys, values, torch.tensor(starts), self.softmax_scale, self.sliding_window,
            self.logits_soft_cap, self.sinks,
        )  # fmt: skip

    def roundtrip(self, request, config):
        """Keys and values of a request after a trip through a cache."""
        positions = torch.arange(self.seq_lens[request])
        return kv_roundtrip(self.keys[request], self.values[request], config, positions, self.key_offset)

    def check(self, tolerance=1e-5):
        """Compare the operation with the dense computation, padding rows with what they held."""
        out, lse = self.attend()
        expected_out, expected_lse = self.expected()
        used = sum(self.query_lens)
        torch.testing.assert_close(out[:used].double(), expected_out[:used], rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(lse[:, :used].double(), expected_lse[:, :used], rtol=tolerance, atol=tolerance)
        assert (out[used:] == 7.0).all() and (lse[:, used:] == 9.0).all()


def check_store_and_attend(operation, tolerance, device="cpu", not_stored=(), **fields):
    """A step of decodes: pages against those that PyTorch writes, attention against the dense computation.

    The tokens of requests `not_stored` are in the cache already, and NaN in this step.
    """
    b = Batch(**fields | {"fresh": False, "padding": 2})
    key, value = b.this_step(b.keys), b.this_step(b.values)
    no_token = torch.full((len(b.query) - len(key), *key.shape[1:]), math.nan, dtype=b.dtype)  # of an empty sequence
    key, value = torch.cat((key, no_token)), torch.cat((value, no_token))
    positions = torch.zeros(len(key), dtype=torch.int32)
    caches = [(b.kv_cache, b.block_table, b.block_size, b.preset)]
    caches += [(b.recent[0], b.recent_table, b.recent_block_size, RECENT_PRESET)] if b.recent else []
    on_device, slots, wanted = [], [], []
    for cache, table, block_size, preset in caches:
        new = torch.full((len(key),), -1)
        for r, n in enumerate(b.seq_lens):
            rows, newest = slice(*b.query_start_loc[r : r + 2]), torch.arange(n - b.query_lens[r], n)
            if r in not_stored:
                key[rows], value[rows] = math.nan, math.nan
            else:
                new[rows], positions[rows] = b.slots_of(table, block_size, r, newest), newest.int()
        for r, n in enumerate(b.seq_lens):  # all other tokens
            at = torch.arange(n)
            older = b.slots_of(table, block_size, r, at)
            older[torch.isin(older, new)] = -1
            torch_ops.store_kv(b.keys[r], b.values[r], cache, older, at, b.key_offset, preset)
        on_device.append(torch.empty_strided(cache.shape, cache.stride(), dtype=torch.uint8, device=device))
        on_device[-1].copy_(cache)
        slots.append(new)
        before = cache.clone()
        torch_ops.store_kv(key, value, cache, new, positions, b.key_offset, preset)
        wanted.append((before, cache))
    out = torch.full(b.query.shape, 7.0, dtype=b.dtype, device=device)
    lse = torch.full((b.num_heads, len(b.query)), 9.0, device=device)
    there = lambda x: None if x is None else x.to(device)  # noqa: E731
    recent = (on_device[1], there(slots[1]), there(b.recent[1]), there(b.recent[2])) if b.recent else ()
    operation(
        there(b.query), there(key), there(value), on_device[0], there(slots[0]), there(positions),
        there(b.block_table), there(torch.tensor(b.seq_lens, dtype=torch.int32)), there(b.query_start_loc),
        there(b.key_offset), there(b.sinks), out, lse, b.softmax_scale, max(b.query_lens), max(b.seq_lens),
        sum(b.seq_lens), b.sliding_window, b.logits_soft_cap, b.preset, *recent,
    )  # fmt: skip
    for found, new, (before, expected) in zip(on_device, slots, wanted, strict=True):
        written, different = (expected != before).sum(), (found.cpu() != expected).sum()
        assert written >= (new >= 0).sum() * b.num_kv_heads * b.head_dim // 4
        assert different <= 0.01 * written, f"{different} of {written} bytes"  # near-ties
    expected_out, expected_lse = b.expected()
    used = sum(b.query_lens)
    torch.testing.assert_close(out[:used].cpu().double(), expected_out[:used], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse[:, :used].cpu().double(), expected_lse[:, :used], rtol=tolerance, atol=tolerance)
    assert (out[used:] == 7.0).all() and (lse[:, used:] == 9.0).all()
