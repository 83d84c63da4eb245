"""NaN, inf and huge numbers in one token, head or query never reach another one."""

import math

import pytest
import torch

from tests.ops.batches import Batch

BAD = [math.nan, math.inf, -math.inf, 3e38]


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("what", ["keys", "values"])
def test_a_bad_stored_vector_reads_as_zero_and_hurts_nobody(what, bad):
    """Token 10 of request 0, head 1, one coordinate; read back from codes by a later token and by other requests."""
    batch = Batch(seq_lens=(40, 30), query_lens=(1, 2), fresh=False)
    getattr(batch, what)[0][10, 1, 3] = bad
    clean = Batch(seq_lens=(40, 30), query_lens=(1, 2), fresh=False)
    getattr(clean, what)[0][10, 1] = 0.0
    out, lse = batch.fill().attend()
    expected_out, expected_lse = clean.fill().attend()
    assert torch.equal(out, expected_out) and torch.equal(lse, expected_lse) and out.isfinite().all()


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("what", ["keys", "values"])
def test_a_bad_fresh_vector_reads_as_zero_and_hurts_nobody(what, bad):
    """The same token in the raw chunk of a prefill: earlier tokens don't see it, later ones see it as zero."""
    batch = Batch(seq_lens=(40, 30), query_lens=(35, 2))
    getattr(batch, what)[0][10, 1, 3] = bad
    clean = Batch(seq_lens=(40, 30), query_lens=(35, 2))
    getattr(clean, what)[0][10, 1] = 0.0
    out, lse = batch.fill().attend()
    expected_out, expected_lse = clean.fill().attend()
    assert torch.equal(out, expected_out) and torch.equal(lse, expected_lse) and out.isfinite().all()


@pytest.mark.parametrize("fresh", [True, False])
def test_a_bad_query_spoils_its_own_row_only(fresh):
    batch = Batch(seq_lens=(40, 30), query_lens=(5, 2), fresh=fresh).fill()
    expected, _ = batch.attend()
    batch.query[2, 1, 0] = math.nan
    out, _ = batch.attend()
    assert out[2, 1].isnan().all()
    out[2, 1] = expected[2, 1]
    assert torch.equal(out, expected)


@pytest.mark.parametrize("preset", ["turboquant", "turboquant:k8v8", "turboquant:k2v2"])
@pytest.mark.parametrize("size", [1e-30, 1e-6, 1e3, 1e30])
def test_tiny_and_huge_vectors_stay_finite(preset, size):
    """Norms below f16's smallest number are stored as 0, norms above its largest are clamped; all stay finite."""
    batch = Batch(preset=preset, seq_lens=(40, 30), query_lens=(1, 2), fresh=False)
    batch.values[0] *= size
    batch.keys[1] *= size
    batch.fill()
    out, lse = batch.attend()
    assert out.isfinite().all() and lse.isfinite().all()
    if size < 1e4:
        batch.check(tolerance=1e-5 * max(1.0, size))


def test_one_unwritten_page_of_nan_scales_changes_nothing():
    """Whatever bytes the unused slots hold, the result is the same bit for bit."""
    results = []
    for filler in (0x00, 0xFF, 0x7C, 0x7E):
        batch = Batch(seq_lens=(40, 7, 65), query_lens=(1, 7, 30), block_size=64)
        batch.kv_cache.fill_(filler)
        results.append(batch.fill().attend())
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0]) and torch.equal(lse, results[0][1])
