"""Prefills by FlashAttention on dequantized prefixes, against dense float64 attention over the same codes.

On a GPU with vLLM it is vLLM's FlashAttention; in Triton's interpreter a dense stand-in with the same signature.
"""

import importlib.util
import math

import pytest
import torch

from tests.ops.batches import FORMATS, Batch
from tests.triton.test_attention import DEVICE, FEATURES, TOLERANCE, moved
from tq_vllm.format import SUPPORTED_HEAD_DIMS
from tq_vllm.ops import flash_ops, flash_workspace

DTYPE = torch.bfloat16
PREFILL = {"seq_lens": (200, 5, 130), "query_lens": (33, 5, 1), "num_kv_heads": 2, "dtype": DTYPE}
REAL = DEVICE == "cuda" and importlib.util.find_spec("vllm") is not None


def dense_flash_attention(
    query, keys, values, query_start_loc, key_start_loc, max_query_len, max_key_len, softmax_scale, causal, window,
    soft_cap, out,
):  # fmt: skip
    """FlashAttention's varlen interface in float64; rows that see nothing give 0 and, as version 2 does, +inf."""
    lse = torch.full((query.shape[1], query.shape[0]), 7.0, device=query.device)
    group = query.shape[1] // keys.shape[1]
    for r in range(len(query_start_loc) - 1):
        (q0, q1), (k0, k1) = query_start_loc[r : r + 2].tolist(), key_start_loc[r : r + 2].tolist()
        assert q1 - q0 <= max_query_len and k1 - k0 <= max_key_len
        q = query[q0:q1].double().transpose(0, 1)  # [num_heads, query_len, head_dim]
        k, v = (x[k0:k1].double().transpose(0, 1).repeat_interleave(group, 0) for x in (keys, values))
        scores = softmax_scale * q @ k.transpose(1, 2)
        if soft_cap:
            scores = soft_cap * torch.tanh(scores / soft_cap)
        row, column = torch.arange(q1 - q0)[:, None] + (k1 - k0) - (q1 - q0), torch.arange(k1 - k0)
        hidden = torch.zeros(q1 - q0, k1 - k0, dtype=torch.bool)
        if causal:
            hidden |= column > row
        if window[0] >= 0:
            hidden |= column < row - window[0]
        scores = scores.masked_fill(hidden.to(scores.device), -math.inf)
        found = scores.logsumexp(-1)
        lse[:, q0:q1] = torch.where(found > -math.inf, found, math.inf).float()
        out[q0:q1] = (scores.softmax(-1).nan_to_num(0.0) @ v).transpose(0, 1).to(out.dtype)
    return out, lse


@pytest.fixture(autouse=True)
def flash(monkeypatch):
    """Provide FlashAttention; batches go to flash_ops."""
    monkeypatch.setattr(flash_ops, "_flash_attention", dense_flash_attention)
    if REAL:
        from tq_vllm.plugin.flash import provide_flash_attention

        provide_flash_attention.__wrapped__()

    def attend(*args):
        on_device = [moved(x) for x in args]
        flash_ops.attention(*on_device)
        for x, y in zip(args[9:11], on_device[9:11], strict=True):  # out and lse
            if x is not None:
                x.copy_(y)

    monkeypatch.setattr("tests.ops.batches.attention", attend)


def shrink_workspace(monkeypatch, tokens, num_kv_heads, head_dim):
    monkeypatch.setattr(flash_workspace, "WORKSPACE_BYTES", tokens * 4 * num_kv_heads * head_dim)
    monkeypatch.setattr(flash_workspace, "_buffers", {})


def check(**fields):
    batch = Batch(**{**PREFILL, **fields}).fill()
    out, lse = batch.attend()
    expected, expected_lse = batch.expected()
    used = sum(batch.query_lens)
    error = ((out[:used].double() - expected[:used]).norm() / expected[:used].norm()).item()
    assert error <= (3 if batch.with_offset else 1) * TOLERANCE[batch.dtype], error  # offsets are several keys long
    # Keys are rounded to 16 bits with their offset, as a 16-bit cache would hold them.
    torch.testing.assert_close(lse[:, :used].double(), expected_lse[:, :used], rtol=0, atol=0.1)
    assert (out[used:] == 7.0).all() and (lse[:, used:] == 9.0).all()
    batch_out = batch.attend(lse=False)[0]
    assert torch.equal(batch_out[:used], out[:used])


@pytest.mark.parametrize("preset", FORMATS)
def test_preset(preset):
    check(preset=preset, head_dim=128, num_kv_heads=1, seq_lens=(200,), query_lens=(33,))


@pytest.mark.parametrize("head_dim", SUPPORTED_HEAD_DIMS)
def test_head_dim(head_dim):
    check(head_dim=head_dim, num_kv_heads=1, seq_lens=(90, 5), query_lens=(33, 5), with_offset=True)


@pytest.mark.parametrize("head_dim", [80, 256])
def test_key_sketches_of_other_head_sizes(head_dim):
    check(preset="turboquant:prod", head_dim=head_dim, num_kv_heads=1, seq_lens=(90, 5), query_lens=(33, 5),
          with_offset=True)  # fmt: skip


@pytest.mark.parametrize("fields", [{}, {"sliding_window": 20}, {"with_sinks": True}], ids=str)
def test_without_prefixes_nothing_is_laid_out(fields, monkeypatch):
    monkeypatch.delattr("tq_vllm.triton_kernels.dequantize.plan_kernel")
    check(seq_lens=(70, 5, 1), query_lens=(70, 5, 1), **fields)


@pytest.mark.parametrize("feature", FEATURES)
def test_one_pass(feature):
    check(**FEATURES[feature])


@pytest.mark.parametrize(
    "feature, tokens", [(f, 128) for f in FEATURES if "sliding_window" not in FEATURES[f]] + [("offset", 64)]
)
def test_passes(monkeypatch, feature, tokens):
    """A buffer of 64 or 128 tokens: the line of prefixes is cut inside requests and inside tiles."""
    fields = {"seq_lens": (300, 5, 130, 90), "query_lens": (33, 5, 1, 20)} | FEATURES[feature]
    fields["seq_lens"] = tuple(n + 3 for n in fields["seq_lens"])
    shrink_workspace(monkeypatch, tokens, 2, 64)
    check(**fields)


def test_first_chunks_have_no_prefix():
    check(seq_lens=(70, 5), query_lens=(70, 5))


def test_a_broken_token_of_this_step_hurts_no_other():
    """Key and value vectors that are not finite count as zero, as they are stored."""
    batch = Batch(**PREFILL).fill()
    batch.keys[0][170, 0, 3] = math.nan
    batch.values[0][171, 1, 5] = math.inf
    out, _ = batch.attend()
    batch.keys[0][170, 0] = 0
    batch.values[0][171, 1] = 0
    assert torch.isfinite(out[:39]).all()
    torch.testing.assert_close(out[:39].double(), batch.expected()[0][:39], rtol=0.05, atol=0.03)


def test_the_buffer_is_bounded_and_shared():
    flash_workspace._buffers.clear()
    check(seq_lens=(200,), query_lens=(50,))
    (buffers,) = flash_workspace._buffers.values()
    (before,) = buffers.values()
    check(seq_lens=(900,), query_lens=(300,))
    assert [b.data_ptr() for b in buffers.values()] == [before.data_ptr()]
    assert before.numel() <= flash_workspace.WORKSPACE_BYTES


def test_warm_up_compiles_what_steps_need():
    """Nothing is compiled in front of a user: later steps, of other sizes and alignments, bring no new kernel."""
    if DEVICE == "cpu":
        pytest.skip("nothing is compiled in Triton's interpreter")
    from tq_vllm.triton_kernels import dequantize, merge_passes

    kernels = [dequantize.plan_kernel, dequantize.dequantize_kernel, dequantize.place_kernel,
               merge_passes.merge_pass_kernel]  # fmt: skip

    def compiled():
        return sum(len(caches[0]) for kernel in kernels for caches in kernel.device_caches.values())

    flash_ops._warm.clear()
    query = torch.zeros(64, 6, 64, dtype=DTYPE, device=DEVICE)
    flash_ops.warm_up(query, 2, 16, 64, None, None, 0, "turboquant")
    before = compiled()
    for seq_lens, query_lens in (((70,), (33,)), ((40, 7, 100), (1, 7, 30)), ((20,) * 40, (3,) * 40)):
        Batch(seq_lens=seq_lens, query_lens=query_lens, dtype=DTYPE).fill().attend(lse=False)
    assert compiled() == before > 0


def test_what_it_refuses():
    from tq_vllm.ops.select import Call

    call = {"op": "attention", "device_type": "cuda", "capability": (9, 0), "preset": "turboquant", "head_dim": 128,
            "dtype": DTYPE, "block_size": 64, "fresh": True}  # fmt: skip
    assert flash_ops.supports(Call(**call)) is None
    assert flash_ops.supports(Call(**call, long=True)) is None
    assert "window" in flash_ops.supports(Call(**call, long=True, sliding_window=True))
    assert "codes" in flash_ops.supports(Call(**call | {"fresh": False}))
    assert "float32" in flash_ops.supports(Call(**call | {"dtype": torch.float32}))
