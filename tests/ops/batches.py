"""Paged batches and what dense attention on the same codes says about them."""

import math
from dataclasses import dataclass

import torch

import tq_vllm.ops  # noqa: F401  registers torch.ops.tq_vllm
from tq_vllm.config import PRESETS, get_config
from tq_vllm.core.attention import attention_reference
from tq_vllm.core.cache import kv_roundtrip
from tq_vllm.format import TurboQuantPage, head_dims_of

store_kv = torch.ops.tq_vllm.store_kv
attention = torch.ops.tq_vllm.attention

PAGES = [(preset, head_dim) for preset, config in PRESETS.items() for head_dim in head_dims_of(config)]


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
        """A cache full of garbage, strided and not at the start of its storage, with shuffled blocks."""
        slot_bytes = TurboQuantPage(self.config, self.head_dim).slot_bytes
        blocks_of = [-(-n // self.block_size) for n in self.seq_lens]
        num_blocks, region = sum(blocks_of) + 3, self.block_size * slot_bytes
        storage = torch.randint(0, 256, (num_blocks + 1, self.num_kv_heads + 1, region + 48), dtype=torch.uint8,
                                generator=self.random)  # fmt: skip
        storage[torch.rand(storage.shape, generator=self.random) < 0.3] = 0xFF  # f16 NaN among the scales
        self.kv_cache = storage[1:, 1:, 32 : 32 + region].unflatten(2, (self.block_size, slot_bytes))
        order = torch.randperm(num_blocks, generator=self.random).tolist()
        self.block_table = torch.full((len(blocks_of), max(blocks_of, default=0) + 2), -7, dtype=torch.int32)
        for row, n in enumerate(blocks_of):
            self.block_table[row, :n] = torch.tensor([order.pop() for _ in range(n)], dtype=torch.int32)
        for request, n in self.share:
            self.block_table[request, : n // self.block_size] = self.block_table[0, : n // self.block_size]

    def slots(self, request, positions):
        return self.block_table[request, positions // self.block_size].long() * self.block_size + (
            positions % self.block_size
        )

    def store(self, request, start, end):
        """Write tokens start..end of a request."""
        positions = torch.arange(start, end)
        store_kv(self.keys[request][start:end], self.values[request][start:end], self.kv_cache,
                 self.slots(request, positions), positions, self.key_offset, self.preset)  # fmt: skip

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
        key, value = (self.this_step(self.keys), self.this_step(self.values)) if self.fresh else (None, None)
        attention(
            self.query, key, value, self.kv_cache, self.block_table, torch.tensor(self.seq_lens, dtype=torch.int32),
            self.query_start_loc, self.key_offset, self.sinks, out, lse, self.softmax_scale,
            max(self.query_lens, default=0), max(self.seq_lens, default=0), sum(self.seq_lens), self.sliding_window,
            self.logits_soft_cap, self.preset,
        )  # fmt: skip
        return out, lse

    def expected(self):
        """Dense float64 attention over what the queries should see."""
        keys, values = [], []
        for k, v, query_len in zip(self.keys, self.values, self.query_lens, strict=True):
            k_hat, v_hat = kv_roundtrip(k, v, self.config, torch.arange(len(k)), self.key_offset)
            context = len(k) - query_len
            if self.fresh:
                k_hat, v_hat = torch.cat((k_hat[:context], k[context:])), torch.cat((v_hat[:context], v[context:]))
            keys.append(k_hat)
            values.append(v_hat)
        return attention_reference(
            self.query, keys, values, self.query_start_loc, self.softmax_scale, self.sliding_window,
            self.logits_soft_cap, self.sinks,
        )  # fmt: skip

    def check(self, tolerance=1e-5):
        """Compare the operation with the dense computation, padding rows with what they held."""
        out, lse = self.attend()
        expected_out, expected_lse = self.expected()
        used = sum(self.query_lens)
        torch.testing.assert_close(out[:used].double(), expected_out[:used], rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(lse[:, :used].double(), expected_lse[:, :used], rtol=tolerance, atol=tolerance)
        assert (out[used:] == 7.0).all() and (lse[:, used:] == 9.0).all()
