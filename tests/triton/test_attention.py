"""The Triton kernels against dense float64 attention over the same codes: in the interpreter, or on a GPU."""

import pytest
import torch

from tests.ops.batches import FORMATS, Batch
from tq_vllm.format import SUPPORTED_HEAD_DIMS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = {"seq_lens": (70, 5), "num_kv_heads": 1}
DECODE = {"fresh": False, "query_lens": (1, 1)}
PREFILL = {"query_lens": (33, 5)}
# ||out - expected|| / ||expected||; the interpreter truncates to bf16 where a GPU rounds.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 4e-3}
if DEVICE == "cpu":
    TOLERANCE |= {torch.float16: 6e-3, torch.bfloat16: 1.2e-2}


def moved(x):
    """The tensor on DEVICE with its strides and what lies between them."""
    if not isinstance(x, torch.Tensor) or DEVICE == "cpu":
        return x
    flat = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage()).to(DEVICE)
    return flat.as_strided(x.shape, x.stride(), x.storage_offset())


def run(triton_ops, args):
    """Serve a call of Batch on DEVICE."""
    on_device = [moved(x) for x in args]
    triton_ops.attention(*on_device)
    for x, y in zip(args[9:11], on_device[9:11], strict=True):  # out and lse
        if x is not None:
            x.copy_(y)


def check(triton_ops, monkeypatch, **fields):
    batch = Batch(**fields).fill()
    monkeypatch.setattr("tests.ops.batches.attention", lambda *args: run(triton_ops, args))
    out, lse = batch.attend()
    expected_out, expected_lse = batch.expected()
    used, tolerance = sum(batch.query_lens), TOLERANCE[batch.dtype]
    error = (out[:used].double() - expected_out[:used]).norm()
    assert error <= tolerance * expected_out[:used].norm(), f"{error / expected_out[:used].norm():.2e}"
    torch.testing.assert_close(lse[:, :used].double(), expected_lse[:, :used], rtol=tolerance, atol=tolerance)
    assert (out[used:] == 7.0).all() and (lse[:, used:] == 9.0).all()


@pytest.mark.parametrize("step", [DECODE, PREFILL], ids=["decode", "prefill"])
@pytest.mark.parametrize("preset", FORMATS)
def test_preset(triton_ops, monkeypatch, preset, step):
    check(triton_ops, monkeypatch, preset=preset, **SMALL, **step)


@pytest.mark.parametrize("step", [DECODE, PREFILL], ids=["decode", "prefill"])
@pytest.mark.parametrize("head_dim", SUPPORTED_HEAD_DIMS)
def test_head_dim(triton_ops, monkeypatch, head_dim, step):
    check(triton_ops, monkeypatch, head_dim=head_dim, preset="turboquant:k4v3", **SMALL, **step)


@pytest.mark.parametrize("step", [DECODE, PREFILL], ids=["decode", "prefill"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("preset", [f"turboquant{name}" for name in ("", ":k3v3", ":k2v2", ":k5v4", ":t3", ":prod")])
def test_16_bit(triton_ops, monkeypatch, preset, dtype, step):
    check(triton_ops, monkeypatch, preset=preset, dtype=dtype, head_dim=128, **SMALL, **step)


@pytest.mark.parametrize("step", [DECODE, PREFILL], ids=["decode", "prefill"])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 256])
def test_key_sketches_of_other_head_sizes(triton_ops, monkeypatch, head_dim, step):
    check(triton_ops, monkeypatch, head_dim=head_dim, preset="turboquant:prod", with_offset=True, **SMALL, **step)


def test_the_comparison_sees_a_lost_sketch(triton_ops, monkeypatch):
    from tq_vllm.triton_kernels import rotation

    lost = lambda *args: torch.zeros_like(rotation.sketch_matrix(*args))  # noqa: E731
    monkeypatch.setattr(rotation, "transposed_sketch", lost)
    with pytest.raises(AssertionError):
        check(triton_ops, monkeypatch, preset="turboquant:prod", **SMALL, **DECODE)


FEATURES = {
    "window": {"sliding_window": 33},
    "window of one": {"sliding_window": 1},
    "cap": {"logits_soft_cap": 5.0},
    "sinks": {"with_sinks": True},
    "offset": {"with_offset": True},
    "all": {"sliding_window": 80, "logits_soft_cap": 9.0, "with_sinks": True, "with_offset": True},
    "block of 64": {"block_size": 64},
    "block of 48": {"block_size": 48},
    "one head": {"group": 1},
    "group of 16": {"group": 16, "num_kv_heads": 1},
    "padding": {"padding": 3},
}


@pytest.mark.parametrize("feature", FEATURES)
def test_decode(triton_ops, monkeypatch, feature):
    fields = {"seq_lens": (130, 0, 64, 17, 200), "query_lens": (1, 1, 1, 0, 1), "num_kv_heads": 2, "fresh": False}
    check(triton_ops, monkeypatch, **fields | FEATURES[feature])


@pytest.mark.parametrize("feature", FEATURES)
def test_verify(triton_ops, monkeypatch, feature):
    """A few query tokens a request, all of them in the cache."""
    fields = {"seq_lens": (130, 0, 3, 70), "query_lens": (4, 2, 3, 1), "num_kv_heads": 2, "fresh": False}
    check(triton_ops, monkeypatch, **fields | FEATURES[feature])


@pytest.mark.parametrize("fresh", [True, False], ids=["raw", "codes"])
@pytest.mark.parametrize("feature", FEATURES)
def test_prefill(triton_ops, monkeypatch, feature, fresh):
    """First chunks, chunks on a prefix, and requests without tokens, in one call."""
    fields = {"seq_lens": (130, 30, 0, 70, 9), "query_lens": (70, 30, 0, 1, 2), "num_kv_heads": 2, "fresh": fresh}
    check(triton_ops, monkeypatch, **fields | FEATURES[feature])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_long_prefill(triton_ops, monkeypatch, dtype):
    """The largest tiles of query rows, with whole tiles of codes and of raw tokens before the masked ones."""
    check(triton_ops, monkeypatch, seq_lens=(360, 300), query_lens=(150, 7), head_dim=128, num_kv_heads=1, group=4,
          block_size=64, dtype=dtype)  # fmt: skip


@pytest.mark.parametrize("step", [DECODE, PREFILL], ids=["decode", "prefill"])
def test_without_lse(triton_ops, monkeypatch, step):
    batch = Batch(**SMALL, **step).fill()
    monkeypatch.setattr("tests.ops.batches.attention", lambda *args: run(triton_ops, args))
    assert torch.equal(batch.attend(lse=False)[0], batch.attend()[0])


def test_broken_tokens(triton_ops, monkeypatch):
    """A NaN in one raw key or value of a request does no harm to others, nor to its earlier tokens."""
    batch = Batch(seq_lens=(40, 40), query_lens=(40, 40), num_kv_heads=1)
    batch.keys[0][30, 0, 3] = torch.nan
    batch.values[0][31, 0, 3] = torch.inf

    monkeypatch.setattr("tests.ops.batches.attention", lambda *args: run(triton_ops, args))
    out, _ = batch.attend()
    batch.keys[0][30] = 0
    batch.values[0][31] = 0
    expected, _ = batch.expected()
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-4)


def test_many_splits_and_few_agree(triton_ops, monkeypatch):
    """The plan changes with the device's size; the result doesn't."""
    from tq_vllm.triton_kernels import decode

    batch = Batch(seq_lens=(700, 65, 129, 1), query_lens=(1, 1, 1, 1), num_kv_heads=1, fresh=False).fill()
    monkeypatch.setattr("tests.ops.batches.attention", lambda *args: run(triton_ops, args))
    expected, _ = batch.expected()
    for programs in (1, 3, 40):
        monkeypatch.setattr(decode, "programs_of", lambda *_, programs=programs: programs)
        torch.testing.assert_close(batch.attend()[0].double(), expected, rtol=2e-5, atol=2e-5)
