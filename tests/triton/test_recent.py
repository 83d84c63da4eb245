"""Caches of the newest tokens on a GPU: two kernels and a merge, and FlashAttention, against dense attention."""

import pytest
import torch

from tests.ops.batches import Batch, check_store_and_attend
from tests.triton.test_attention import DEVICE, TOLERANCE, moved
from tests.triton.test_flash import check as check_flash
from tests.triton.test_flash import flash, shrink_workspace  # noqa: F401  flash is a fixture
from tq_vllm.ops import select as select_module
from tq_vllm.ops.cuda_library import why_missing

PRESET = "turboquant:k3v3-r128"
EVERYTHING = {"with_sinks": True, "with_offset": True, "logits_soft_cap": 5.0}
LENGTHS = {"seq_lens": (300, 130, 127, 5), "query_lens": (4, 4, 3, 4)}  # also rows without an older token
CUDA_TOLERANCE = (2e-4, 1e-3)  # of out and lse: its weights are two bytes (tests/gpu/test_decode_cuda.py)


@pytest.fixture
def through_select(triton_ops, monkeypatch):
    """Batches go where `select` sends them; without a GPU as it would in Triton alone."""
    if DEVICE == "cpu":
        monkeypatch.setitem(select_module.KERNELS, "cpu", ("triton", "recent", "torch"))
    select_module.select.cache_clear()
    select_module.select_joint.cache_clear()

    def attend(*args):
        on_device = [moved(x) for x in args]
        select_module.attention(*on_device)
        for x, y in zip(args[9:11], on_device[9:11], strict=True):  # out and lse
            if x is not None:
                x.copy_(y)

    monkeypatch.setattr("tests.ops.batches.attention", attend)
    yield
    select_module.select.cache_clear()
    select_module.select_joint.cache_clear()


def check(**fields):
    batch = Batch(preset=PRESET, fresh=False, **fields).fill()
    out, lse = batch.attend()
    expected, expected_lse = batch.expected()
    used, least = sum(batch.query_lens), CUDA_TOLERANCE if DEVICE == "cuda" and why_missing() is None else (0, 0)
    of_out, of_lse = (2 * max(x, TOLERANCE[batch.dtype]) for x in least)  # each part is rounded
    error = ((out[:used].double() - expected[:used]).norm() / expected[:used].norm()).item()
    assert error <= of_out, f"{error:.2e}"
    torch.testing.assert_close(lse[:, :used].double(), expected_lse[:, :used], rtol=of_lse, atol=of_lse)
    assert (out[used:] == 7.0).all() and (lse[:, used:] == 9.0).all()
    assert torch.equal(batch.attend(lse=False)[0], out)


@pytest.mark.parametrize("window", [0, 100, 190])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decode_and_verify(through_select, dtype, window):
    check(**LENGTHS, dtype=dtype, sliding_window=window, num_kv_heads=1, padding=2)


@pytest.mark.parametrize("window", [0, 190])
def test_decode_that_writes_its_tokens(through_select, window):
    lengths = {"seq_lens": (300, 130, 127, 5), "query_lens": (1, 1, 1, 1)}
    check_store_and_attend(select_module.store_and_attend, 2e-2, DEVICE, preset=PRESET, dtype=torch.bfloat16,
                           head_dim=128, sliding_window=window, with_offset=True, **lengths)  # fmt: skip


def test_decode_of_everything(through_select):
    check(**LENGTHS, **EVERYTHING, dtype=torch.bfloat16, head_dim=128, group=4, num_kv_heads=1)


def test_a_prefill_that_flash_attention_cannot_serve_reads_all_from_the_caches(through_select, monkeypatch):
    batch = Batch(preset=PRESET, seq_lens=(200, 40), query_lens=(60, 40), num_kv_heads=1).fill()
    out, _ = batch.attend()
    batch.fresh = False
    expected, _ = batch.expected()
    assert (out.double() - expected).norm() <= 2 * TOLERANCE[batch.dtype] * expected.norm()


@pytest.mark.parametrize("fields", [EVERYTHING, {"sliding_window": 100}, {"sliding_window": 190}])
def test_prefill(flash, fields):  # noqa: F811
    check_flash(preset=PRESET, seq_lens=(300, 60, 150, 128), query_lens=(50, 60, 7, 1), **fields)


def test_prefill_in_passes(flash, monkeypatch):  # noqa: F811
    shrink_workspace(monkeypatch, 128, 2, 64)
    check_flash(preset=PRESET, seq_lens=(303, 8, 193), query_lens=(50, 8, 7))
