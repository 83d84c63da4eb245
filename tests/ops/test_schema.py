"""Both operations as torch.library sees them: schema, mutation, fake tensors, tracing."""

import torch

from tests.ops.batches import Batch, attention, store_kv


def test_opcheck_store_kv():
    batch = Batch(with_offset=True)
    positions = torch.arange(100)
    for offset in (None, batch.key_offset):
        args = (batch.keys[2], batch.values[2], batch.kv_cache, batch.slots(2, positions), positions, offset)
        torch.library.opcheck(store_kv, (*args, batch.preset))


def test_opcheck_attention():
    # In float64: outputs of two calls are compared, and float32's noise may show where offsets are long.
    batch = Batch(with_offset=True, with_sinks=True, dtype=torch.float64).fill()
    fresh = batch.this_step(batch.keys), batch.this_step(batch.values)
    with_fresh, without = (*fresh, batch.key_offset, None, True), (None, None, None, batch.sinks, False)
    for key, value, offset, sinks, with_lse in (with_fresh, without):
        args = (
            batch.query, key, value, batch.kv_cache, batch.block_table, torch.tensor(batch.seq_lens, dtype=torch.int32),
            batch.query_start_loc, offset, sinks, torch.zeros_like(batch.query),
            torch.zeros(batch.num_heads, len(batch.query)) if with_lse else None, batch.softmax_scale, 30, 100,
            147, 0, 0.0,
        )  # fmt: skip
        torch.library.opcheck(attention, (*args, batch.preset))


def test_operations_say_what_they_write():
    written = {
        op._schema.name: [a.name for a in op._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        for op in (store_kv.default, attention.default)
    }
    assert written == {"tq_vllm::store_kv": ["kv_cache"], "tq_vllm::attention": ["out", "lse"]}
