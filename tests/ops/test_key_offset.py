"""Keys stored without their offset score as if they had been stored with it."""

import pytest
import torch

from tests.ops.batches import Batch
from tq_vllm.core.attention import attention_reference
from tq_vllm.core.cache import kv_roundtrip
from tq_vllm.format import SEGMENT_TOKENS

MIXED = {"seq_lens": (300, 70, 130), "query_lens": (1, 7, 30)}


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("block_size", [16, 64, 128])
def test_scores_get_the_offset_of_each_position_back(block_size, fresh):
    """Keys that are their offset and nothing else: what is stored is zero, so the scores are the offset's alone."""
    batch = Batch(preset="turboquant:k2v2", with_offset=True, block_size=block_size, fresh=fresh, **MIXED)
    batch.keys = [batch.offset_of(torch.arange(n)) for n in batch.seq_lens]
    out, lse = batch.fill().attend()
    values = [kv_roundtrip(k, v, batch.config)[1] for k, v in zip(batch.keys, batch.values, strict=True)]
    if fresh:
        values = [
            torch.cat((v_hat[: len(v) - n], v[len(v) - n :]))
            for v_hat, v, n in zip(values, batch.values, batch.query_lens, strict=True)
        ]
    expected, expected_lse = attention_reference(
        batch.query, batch.keys, values, batch.query_start_loc, batch.softmax_scale
    )
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-4)


def test_at_8_bits_centred_attention_is_that_of_the_original_keys():
    """Offsets 25 times the size of the rest: 8 bits of the whole key are useless, 8 bits of the rest are plenty."""
    batch = Batch(preset="turboquant:k8v8", with_offset=True, fresh=False, **MIXED)
    batch.keys = [k + 4 * batch.offset_of(torch.arange(len(k))) for k in batch.keys]
    batch.key_offset *= 5
    exact, _ = attention_reference(batch.query, batch.keys, batch.values, batch.query_start_loc, batch.softmax_scale)
    centred = (batch.fill().attend()[0] - exact).abs().max()
    batch.key_offset = None
    uncentred = (batch.fill().attend()[0] - exact).abs().max()
    assert centred < 0.03 < uncentred


def test_the_last_segment_serves_later_positions():
    batch = Batch(with_offset=True, fresh=False, **MIXED).fill()
    segments = -(-300 // SEGMENT_TOKENS)
    assert len(batch.key_offset) == segments - 1
    out, lse = batch.attend()
    batch.key_offset = torch.cat((batch.key_offset, batch.key_offset[-1:]))
    again = batch.attend()
    torch.testing.assert_close(again, (out, lse), rtol=1e-5, atol=1e-5)


def test_offset_is_subtracted_before_the_rotation_and_added_after():
    """kv_roundtrip with an offset is the round trip of the rest, plus the offset."""
    batch = Batch(with_offset=True, seq_lens=(150,), query_lens=(1,))
    positions = torch.arange(150)
    rest = batch.keys[0] - batch.offset_of(positions)
    centred, _ = kv_roundtrip(batch.keys[0], batch.values[0], batch.config, positions, batch.key_offset)
    plain, _ = kv_roundtrip(rest, batch.values[0], batch.config)
    torch.testing.assert_close(centred, plain + batch.offset_of(positions))


def test_windows_caps_and_sinks_apply_to_restored_scores():
    Batch(with_offset=True, with_sinks=True, sliding_window=90, logits_soft_cap=4.0, **MIXED).fill().check()
