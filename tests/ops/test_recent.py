"""Presets with a cache of their newest tokens, against dense attention on what each row should see."""

import pytest
import torch

from tests.ops.batches import Batch, check_store_and_attend, store_and_attend

PRESET = "turboquant:k3v3-r128"
DECODES = {"fresh": False, "seq_lens": (400, 5, 128, 129, 200), "query_lens": (1, 1, 1, 1, 1)}
PREFILL = {"seq_lens": (400, 60, 300, 128), "query_lens": (150, 60, 7, 128)}
CASES = {
    "decode": DECODES,
    "verify, rows before and after the first old token": DECODES | {
        "seq_lens": (130, 127, 300, 133, 4), "query_lens": (4, 4, 3, 4, 4),
    },
    "long steps from codes": {"fresh": False, "seq_lens": (400, 150, 20), "query_lens": (200, 150, 20)},
    "padded graph": DECODES | {"seq_lens": (400, 0, 0), "query_lens": (1, 0, 0), "padding": 3},
    "prefill": PREFILL,
    "prefill of one token": {"seq_lens": (400, 128, 127), "query_lens": (1, 1, 1)},
    "decode, everything": DECODES | {"with_sinks": True, "with_offset": True, "logits_soft_cap": 5.0},
    "prefill, everything": PREFILL | {"with_sinks": True, "with_offset": True, "logits_soft_cap": 5.0},
}  # fmt: skip


@pytest.mark.parametrize("window", [0, 60, 127, 128, 129, 190])
@pytest.mark.parametrize("case", CASES)
def test_what_rows_see(case, window):
    Batch(preset=PRESET, sliding_window=window, **CASES[case]).fill().check()


@pytest.mark.parametrize("block_size, recent_block_size", [(16, 16), (64, 48), (128, 64)])
def test_block_sizes(block_size, recent_block_size):
    for fields in (DECODES, PREFILL):
        Batch(preset=PRESET, block_size=block_size, recent_block_size=recent_block_size, **fields).fill().check()


def test_the_newest_tokens_are_read_from_their_own_cache():
    """Codes of the newest tokens, and the other cache's older blocks, may hold anything."""
    batch = Batch(preset=PRESET, fresh=False, seq_lens=(192,), query_lens=(1,), block_size=64).fill()
    expected = batch.attend()[0]
    batch.kv_cache[batch.block_table[0, 1:3].long()] = 0xFF  # tokens 64 .. 191; 0 .. 63 are older
    batch.recent[0][batch.recent_table[0, :2].long()] = 0xFF
    assert torch.equal(batch.attend()[0], expected)
    batch.kv_cache[batch.block_table[0, 0].long()] = 0x11
    assert not torch.allclose(batch.attend()[0], expected, atol=1e-3)


@pytest.mark.parametrize("window", [0, 60, 190])
@pytest.mark.parametrize("case", [name for name in CASES if not CASES[name].get("fresh", True)])
def test_newest_tokens_are_written_to_both_caches(case, window):
    check_store_and_attend(store_and_attend, 1e-5, preset=PRESET, sliding_window=window, **CASES[case])
