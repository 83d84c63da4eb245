"""Paged store and attention equal dense float64 attention on the same codes, whatever the batch."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from tests.ops.batches import PAGES, Batch, check_store_and_attend, store_and_attend
from tq_vllm.config import PRESETS
from tq_vllm.ops import torch_ops

# Ragged, mixed prefill and decode, an empty request, one that starts now, one that crosses blocks and segments.
MIXED = {"seq_lens": (300, 7, 0, 130, 1), "query_lens": (1, 7, 0, 30, 1)}


@pytest.mark.parametrize("preset, head_dim", PAGES)
def test_every_preset_and_head_size(preset, head_dim):
    Batch(preset=preset, head_dim=head_dim, with_offset=True, padding=2, **MIXED).fill().check()
    Batch(preset=preset, head_dim=head_dim, fresh=False, block_size=64, **MIXED).fill().check()


@pytest.mark.parametrize("group", [1, 2, 4, 7, 8, 16])
@pytest.mark.parametrize("num_kv_heads", [1, 3])
def test_grouped_query_heads(group, num_kv_heads):
    Batch(group=group, num_kv_heads=num_kv_heads, **MIXED).fill().check()


@pytest.mark.parametrize("block_size", [16, 32, 48, 64, 128, 1280])
@pytest.mark.parametrize("fresh", [True, False])
def test_block_sizes(block_size, fresh):
    Batch(block_size=block_size, fresh=fresh, seq_lens=(1500, 700, 3), query_lens=(130, 1, 3)).fill().check()


requests = st.lists(
    st.tuples(st.integers(0, 150), st.integers(0, 40)).map(lambda x: (x[0] + x[1], x[1])), min_size=1, max_size=6
)


@settings(max_examples=120, deadline=None)
@given(
    requests=requests,
    page=st.sampled_from(sorted(PAGES)),
    num_kv_heads=st.integers(1, 3),
    group=st.integers(1, 6),
    block_size=st.sampled_from([16, 32, 64, 128]),
    sliding_window=st.sampled_from([0, 0, 1, 5, 64]),
    logits_soft_cap=st.sampled_from([0.0, 0.0, 2.0]),
    with_sinks=st.booleans(),
    with_offset=st.booleans(),
    fresh=st.booleans(),
    padding=st.integers(0, 3),
    seed=st.integers(0, 2**31),
)
def test_any_batch(requests, page, **fields):
    fields |= {"preset": page[0], "head_dim": page[1]}
    batch = Batch(seq_lens=tuple(r[0] for r in requests), query_lens=tuple(r[1] for r in requests), **fields)
    batch.fill().check(3e-5 if batch.with_offset else 1e-5)  # offsets are several keys long, and so is float32's noise


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize(
    "feature",
    [{"sliding_window": 17}, {"sliding_window": 300}, {"logits_soft_cap": 1.5}, {"with_sinks": True},
     {"with_sinks": True, "sliding_window": 100, "logits_soft_cap": 3.0, "with_offset": True}],
    ids=lambda f: "+".join(f),
)  # fmt: skip
def test_features_over_several_tiles_and_chunks(feature, fresh):
    Batch(fresh=fresh, seq_lens=(1300, 400, 260), query_lens=(1, 300, 260), block_size=64, **feature).fill().check()


def test_each_feature_changes_the_result():
    """The comparisons above would notice a feature that is ignored on both sides."""
    plain, _ = Batch(**MIXED).fill().expected()
    for feature in ({"sliding_window": 17}, {"logits_soft_cap": 1.5}, {"with_sinks": True}, {"fresh": False}):
        batch = Batch(**MIXED).fill()
        changed = dataclasses.replace(batch, **feature)
        changed.query, changed.keys, changed.values = batch.query, batch.keys, batch.values
        assert (changed.expected()[0] - plain).abs().max() > 1e-2, feature


def test_a_wrong_block_or_a_lost_prefix_is_noticed():
    batch = Batch(**MIXED).fill()
    batch.block_table[0, 0] = batch.block_table[3, 0]
    with pytest.raises(AssertionError):
        batch.check()
    batch = Batch(**MIXED).fill()
    batch.seq_lens = (300, 7, 0, 30, 1)
    out, _ = batch.attend()
    batch.seq_lens = MIXED["seq_lens"]
    assert (out.double() - batch.expected()[0]).abs().max() > 1e-2


def test_shared_prefix_blocks():
    """Prefix hits, whole and partial, beside requests without one, in a mixed batch."""
    batch = Batch(seq_lens=(80, 81, 110, 20), query_lens=(80, 1, 62, 20), share=((1, 80), (2, 48))).fill()
    assert (batch.block_table[1, :5] == batch.block_table[0, :5]).all()
    batch.check()


def test_float64_inputs_are_computed_in_float64():
    for preset in PRESETS:
        batch = Batch(preset=preset, dtype=torch.float64, with_offset=True, with_sinks=True, **MIXED).fill()
        out, _ = batch.attend()
        torch.testing.assert_close(out, batch.expected()[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_inputs_are_computed_in_float32(dtype):
    batch = Batch(dtype=dtype, **MIXED).fill()
    out, lse = batch.attend()
    expected, expected_lse = batch.expected()
    torch.testing.assert_close(out, expected.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)


def test_without_lse():
    batch = Batch(**MIXED).fill()
    torch.testing.assert_close(batch.attend(lse=False)[0], batch.attend()[0], rtol=0, atol=0)


def test_rows_of_requests_of_length_0_are_0():
    """Captured graphs pad a batch with requests of seq_len 0 that have a query token."""
    for fresh in (True, False):
        batch = Batch(fresh=fresh, with_sinks=True, seq_lens=(50, 20), query_lens=(1, 1)).fill()
        batch.seq_lens = (50, 0)
        out, lse = batch.attend()
        assert (out[1] == 0).all() and (lse[:, 1] == -torch.inf).all()
        assert (out[0] != 0).all() and lse[:, 0].isfinite().all()


def test_no_requests_at_all():
    batch = Batch(padding=3)
    batch.seq_lens, batch.query_lens, batch.fresh = (), (), False
    batch.query_start_loc, batch.block_table = torch.zeros(1, dtype=torch.int32), batch.block_table[:0]
    out, lse = batch.attend()
    assert (out == 7.0).all() and (lse == 9.0).all()


def test_workspace_limits_do_not_change_the_result(monkeypatch):
    batch = Batch(seq_lens=(700, 40, 333), query_lens=(200, 1, 64), with_offset=True, block_size=32).fill()
    out, _ = batch.attend()
    monkeypatch.setattr(torch_ops, "WORKSPACE_BYTES", 1)
    monkeypatch.setattr(torch_ops, "KEY_CHUNKS", (32, 32))
    monkeypatch.setattr(torch_ops, "QUERY_TILE", 5)
    torch.testing.assert_close(batch.attend()[0], out, rtol=1e-5, atol=1e-5)


class LiveBytes(TorchDispatchMode):
    """The largest total of bytes in storages that operations under this mode made and that were alive together."""

    def __init__(self):
        super().__init__()
        self.live, self.peak = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.live = {k: v for k, v in self.live.items() if not v[0].expired()}
        for x in result if isinstance(result, tuple | list) else (result,):
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                self.live[storage.data_ptr()] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return result


def test_memory_does_not_grow_with_context_times_queries():
    """1024 queries over 3072 positions and 12 heads: dense scores would take 144 MiB."""
    batch = Batch(seq_lens=(3072, 600), query_lens=(1024, 1), num_kv_heads=2, group=6, block_size=128).fill()
    inputs = (
        batch.query, batch.this_step(batch.keys), batch.this_step(batch.values), batch.kv_cache, batch.block_table,
        torch.tensor(batch.seq_lens), batch.query_start_loc, None, None, torch.zeros_like(batch.query), None,
    )  # fmt: skip
    with LiveBytes() as memory:
        torch_ops.attention(*inputs, batch.softmax_scale, 1024, 3072, 3072, 0, 0.0, batch.preset)
    assert 1 << 20 < memory.peak < 32 << 20


@pytest.mark.parametrize(
    "fields",
    [
        {"seq_lens": (40, 7, 1), "query_lens": (1, 1, 1)},
        {"seq_lens": (40, 7, 100), "query_lens": (3, 7, 2), "with_offset": True, "with_sinks": True},
        {"seq_lens": (33, 32, 80), "query_lens": (1, 1, 0), "share": ((1, 32),), "sliding_window": 20},
        {"seq_lens": (30, 20, 0), "query_lens": (1, 1, 1), "not_stored": (0, 2)},
    ],
    ids=["decode", "verify", "a shared block", "not stored"],
)
def test_store_and_attend(fields):
    check_store_and_attend(store_and_attend, 1e-5, **fields)
