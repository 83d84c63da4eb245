"""The CUDA attention kernel run on a CPU, lane by lane (simt.h), against dense float64 attention on the same codes.

Shows the kernel's logic: layouts, masks, splits, merges. Instructions are modelled, so nothing here speaks of a device.
"""

import contextlib
import ctypes
import shutil
from dataclasses import replace

import pytest
import torch

from tests.ops.batches import FORMATS, ONE_LAUNCH, Batch, check_store_and_attend
from tq_vllm.ops import cuda_attention, torch_ops

CTAS, WARPS = 3, 2
LENGTHS = (1, 5, 16, 17, 63, 64, 65, 130, 1000)

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")


@pytest.fixture(scope="module")
def simulator(compile_simt):
    return compile_simt("decode")


@pytest.fixture(autouse=True)
def on_cpu(simulator, monkeypatch):
    """Let cuda_attention launch on the simulator."""

    class Library:
        num_ctas, num_warps = CTAS, WARPS

        def tq_decode_params_bytes(self):
            return simulator.simt_params_bytes()

        def tq_attention(self, params, launch, stream):
            launch = launch._obj
            launch.num_ctas = self.num_ctas
            launch.workspace_bytes = 4 * launch.rows * (launch.head_dim + 4) * 2 * self.num_ctas * self.num_warps
            return 0 if params is None else simulator.simt_attention(params, ctypes.byref(launch), self.num_warps)

    library = Library()
    monkeypatch.setattr(cuda_attention, "library", lambda: library)
    monkeypatch.setattr(cuda_attention, "stream_of", lambda tensor: ctypes.c_void_p(0))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(cuda_attention, "_workspaces", {})
    return library


def strided(x, aligned):
    """The same rows, a multiple of 16 bytes apart or not."""
    return torch.cat([x, x[..., : 8 if aligned else 1]], dim=-1)[..., : x.shape[-1]]


def check(dtype=torch.float32, offset_dtype=None, aligned=True, **batch):
    b = Batch(fresh=False, padding=2, **batch)
    key_offset = None if b.key_offset is None else strided(b.key_offset.to(offset_dtype or dtype), aligned)
    b.key_offset = None if key_offset is None else key_offset.float()
    b.fill()
    used = sum(b.query_lens)
    query = b.query.to(dtype)
    b.query = query.float()
    out, lse = torch.full_like(query, 7.0), torch.full((b.num_heads, len(query)), 9.0)
    cuda_attention.attention(
        query, None, None, b.kv_cache, b.block_table, torch.tensor(b.seq_lens, dtype=torch.int32),
        b.query_start_loc, key_offset, b.sinks, out, lse, b.softmax_scale, max(b.query_lens), max(b.seq_lens),
        sum(b.seq_lens), b.sliding_window, b.logits_soft_cap, b.preset,
    )  # fmt: skip
    expected_out, expected_lse = b.expected()
    rounding = {torch.float32: 0.0, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    torch.testing.assert_close(out[:used].double(), expected_out[:used], rtol=2e-3 + rounding, atol=1e-3 + rounding)
    torch.testing.assert_close(lse[:, :used].double(), expected_lse[:, :used], rtol=1e-5, atol=1e-3)
    assert (out[used:] == 7.0).all() and (lse[:, used:] == 9.0).all()


@pytest.mark.parametrize("preset", FORMATS)
@pytest.mark.parametrize("head_dim, group", [(128, 4), (64, 8), (256, 3)])
def test_presets(preset, head_dim, group):
    check(preset=preset, head_dim=head_dim, group=group, seq_lens=(1, 17, 64, 150), query_lens=(1,) * 4)


@pytest.mark.parametrize("ctas, warps", [(1, 1), (2, 3), (5, 2), (17, 1), (40, 1)])
def test_splits(on_cpu, ctas, warps):
    on_cpu.num_ctas, on_cpu.num_warps = ctas, warps
    check(head_dim=128, group=4, seq_lens=(1000, 3, 300), query_lens=(1, 1, 1))


@pytest.mark.parametrize("head_dim, query_len", [(128, 1), (64, 2)])
def test_many_parts(on_cpu, head_dim, query_len):
    """Several warps merge a row: of 60 shares, some of them empty."""
    on_cpu.num_ctas, on_cpu.num_warps = 60, 1
    check(head_dim=head_dim, group=4, num_kv_heads=1, seq_lens=(2900,), query_lens=(query_len,))


@pytest.mark.parametrize("order", ["1", "2"])
def test_lanes_in_another_order(monkeypatch, order):
    monkeypatch.setenv("SIMT_ORDER", order)
    check(head_dim=128, group=4, seq_lens=LENGTHS, query_lens=(1,) * 9, with_offset=True)


@pytest.mark.parametrize("block_size", (16, 48, 64, 128))
def test_block_sizes(block_size):
    check(head_dim=64, group=4, block_size=block_size, seq_lens=LENGTHS, query_lens=(1,) * 9)


@pytest.mark.parametrize("group", (1, 3, 5, 8, 16))
def test_groups(group):
    check(head_dim=128, group=group, seq_lens=(1, 100, 400), query_lens=(1, 1, 1))


@pytest.mark.parametrize("query_lens", ((2, 1, 3), (4, 4, 4), (1, 0, 7)))
def test_several_query_tokens(query_lens):
    check(head_dim=128, group=4, seq_lens=(10, 100, 400), query_lens=query_lens, with_offset=True)


@pytest.mark.parametrize("preset", ["turboquant", *(f"turboquant:{p}" for p in ("k8v8", "k5v4", "k3v3", "t3", "prod"))])
def test_many_rows(preset):
    """Up to 32 query rows in a warp."""
    check(preset=preset, head_dim=128, group=4, num_kv_heads=1, seq_lens=(12, 70, 150), query_lens=(8, 3, 5))


@pytest.mark.parametrize("preset", ["turboquant", "turboquant:t3"])
@pytest.mark.parametrize(
    "head_dim, group, query_lens",
    ((64, 16, (1, 1, 4)), (256, 3, (4, 2, 7)), (128, 4, (16, 1, 9)), (128, 4, (6, 3, 11))),
)
def test_many_rows_of_other_shapes(preset, head_dim, group, query_lens):
    """Blocks that are not full, and several of a request."""
    check(preset=preset, head_dim=head_dim, group=group, num_kv_heads=1, seq_lens=(40, 90, 170), query_lens=query_lens)


def test_many_rows_with_options():
    options = dict(sliding_window=50, logits_soft_cap=2.0, with_sinks=True, with_offset=True)
    for chosen in (*({name: value} for name, value in options.items()), options):
        check(head_dim=128, group=4, num_kv_heads=1, seq_lens=LENGTHS[4:], query_lens=(7,) * 5, **chosen)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_dtypes(dtype):
    check(dtype=dtype, head_dim=128, group=4, seq_lens=LENGTHS, query_lens=(1,) * 9)


@pytest.mark.parametrize("head_dim, group, query_len", ((128, 4, 1), (64, 8, 1), (128, 4, 2), (256, 2, 3)))
def test_options(head_dim, group, query_len):
    """Window, soft cap, sinks and key offset, one at a time and all together."""
    options = dict(sliding_window=50, logits_soft_cap=2.0, with_sinks=True, with_offset=True)
    for chosen in (*({name: value} for name, value in options.items()), options):
        check(head_dim=head_dim, group=group, seq_lens=LENGTHS[4:], query_lens=(query_len,) * 5, **chosen)


@pytest.mark.parametrize(
    "dtype, offset_dtype, head_dim, group, query_len, aligned",
    [
        (torch.bfloat16, torch.bfloat16, 128, 4, 1, True),
        (torch.float16, torch.float16, 64, 8, 1, True),
        (torch.bfloat16, torch.bfloat16, 256, 2, 3, True),
        (torch.bfloat16, torch.bfloat16, 128, 4, 1, False),
        (torch.bfloat16, torch.float32, 128, 4, 1, True),
        (torch.bfloat16, torch.bfloat16, 128, 4, 7, True),
    ],
)
def test_key_offset(dtype, offset_dtype, head_dim, group, query_len, aligned):
    """More than 32 segments, which are scored at a time, and positions beyond the last one."""
    check(dtype=dtype, offset_dtype=offset_dtype, aligned=aligned, head_dim=head_dim, group=group, num_kv_heads=1,
          seq_lens=(2090,), query_lens=(query_len,), with_offset=True)  # fmt: skip


@pytest.mark.parametrize("head_dim, group, query_len", ((128, 4, 1), (64, 8, 1), (256, 2, 3)))
def test_key_sketch(head_dim, group, query_len):
    """Nothing, and window, soft cap, sinks and key offset together."""
    options = dict(sliding_window=50, logits_soft_cap=2.0, with_sinks=True, with_offset=True)
    for chosen in ({}, options):
        check(preset="turboquant:prod", head_dim=head_dim, group=group, seq_lens=(63, 65, 130, 300),
              query_lens=(query_len,) * 4, **chosen)  # fmt: skip


def test_a_lost_sketch_would_be_seen():
    b = Batch(preset="turboquant:prod", head_dim=128, group=4, seq_lens=(130,), query_lens=(1,), fresh=False).fill()
    with_sketch, _ = b.expected()
    b.config = replace(b.config, key_sketch=False)
    assert (b.expected()[0] - with_sketch).abs().max() > 1e-2


def test_empty_and_many_requests():
    check(head_dim=64, group=4, num_kv_heads=1, seq_lens=(0, 3, 0, 40), query_lens=(1, 1, 1, 1))
    lengths = tuple(1 + 7 * i % 97 for i in range(80))
    check(head_dim=64, group=3, num_kv_heads=1, seq_lens=lengths, query_lens=(1,) * len(lengths))


def test_rising_scores():
    """The reference of the softmax moves many times, and weights of early tokens vanish."""
    b = Batch(preset="turboquant:k8v8", head_dim=128, group=4, seq_lens=(600,), query_lens=(1,), fresh=False)
    b.keys = [b.query[0, ::4][None] * torch.linspace(-40, 40, 600)[:, None, None] / 128**0.5]
    b.fill()
    out = torch.empty_like(b.query)
    cuda_attention.attention(
        b.query, None, None, b.kv_cache, b.block_table, torch.tensor(b.seq_lens).int(), b.query_start_loc, None, None,
        out, None, b.softmax_scale, 1, 600, sum(b.seq_lens), 0, 0.0, b.preset,
    )  # fmt: skip
    torch.testing.assert_close(out.double(), b.expected()[0], rtol=1e-2, atol=2e-3)


@pytest.mark.parametrize("group", [1, 4, 8])
@pytest.mark.parametrize("window", [0, 20])
def test_rows_before_the_first_token_see_nothing(group, window):
    """Codes that are older than the newest tokens: a sequence may have fewer of them than the step has rows."""
    b = Batch(fresh=False, seq_lens=(90, 90, 90, 90), query_lens=(4, 4, 4, 1), group=group, head_dim=128).fill()
    lens = torch.tensor((2, 0, 70, 0), dtype=torch.int32)
    found = []
    for attention in (cuda_attention.attention, torch_ops.attention):
        out, lse = torch.full_like(b.query, 7.0), torch.full((b.num_heads, len(b.query)), 9.0)
        attention(b.query, None, None, b.kv_cache, b.block_table, lens, b.query_start_loc, None, None, out, lse,
                  b.softmax_scale, 4, 90, 360, window, 0.0, b.preset)  # fmt: skip
        found += [out, lse]
    torch.testing.assert_close(found[0], found[2], rtol=2e-3, atol=1e-3)
    torch.testing.assert_close(found[1], found[3], rtol=1e-5, atol=1e-3)
    assert (found[0][:2] == 0).all() and (found[0][2] != 0).all()


def check_newest(**fields):
    """The kernel writes the newest token of every request before it reads it."""
    fields = {"seq_lens": LENGTHS, "head_dim": 128, "group": 4} | fields
    lengths = {"query_lens": (1,) * len(fields["seq_lens"])} | fields
    check_store_and_attend(cuda_attention.store_and_attend, 1e-2 if "dtype" in fields else 3e-3, **lengths)


@pytest.mark.parametrize("preset", ONE_LAUNCH)
@pytest.mark.parametrize("head_dim, group", [(128, 4), (64, 8), (256, 3)])
def test_newest_tokens(preset, head_dim, group):
    check_newest(preset=preset, head_dim=head_dim, group=group, seq_lens=(1, 17, 64, 150), with_offset=True)


@pytest.mark.parametrize("ctas, warps", [(1, 1), (2, 3), (5, 2), (17, 1), (40, 1)])
def test_newest_tokens_of_any_share(on_cpu, ctas, warps):
    on_cpu.num_ctas, on_cpu.num_warps = ctas, warps
    check_newest(seq_lens=(1000, 3, 300))


@pytest.mark.parametrize("order", ["1", "2"])
def test_newest_tokens_with_lanes_in_another_order(monkeypatch, order):
    monkeypatch.setenv("SIMT_ORDER", order)
    check_newest(with_offset=True)


@pytest.mark.parametrize("block_size, group, head_dim", [(48, 16, 64), (64, 24, 128), (16, 3, 256)])
def test_newest_tokens_of_other_shapes(block_size, group, head_dim):
    """Several blocks of query rows have the same newest token."""
    check_newest(block_size=block_size, group=group, head_dim=head_dim, seq_lens=(5, 48, 64, 130))


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_newest_tokens_with_options(dtype):
    for options in ({"sliding_window": 50}, {"logits_soft_cap": 2.0, "with_sinks": True, "with_offset": True}):
        check_newest(dtype=dtype, **options)


def test_a_token_without_a_slot_is_refused():
    def one_slot(query, key, value, kv_cache, slot_mapping, *rest):
        cuda_attention.store_and_attend(query, key, value, kv_cache, slot_mapping[:1], *rest)

    with pytest.raises(ValueError, match="got 1 slots, allowed one for each of 4 tokens"):
        check_store_and_attend(one_slot, 1e-2, head_dim=128, seq_lens=(30, 17), query_lens=(1, 1))


def test_newest_tokens_that_are_not_stored():
    """No slot, no token (padding of a CUDA graph), no length."""
    check_newest(seq_lens=(30, 17, 20, 0), query_lens=(1, 1, 0, 1), not_stored=(1, 3))


@pytest.mark.parametrize("ctas, warps", [(3, 2), (40, 1)])
@pytest.mark.parametrize("order", ["1", "2"])
def test_a_block_that_this_step_completes_is_read_by_another_request(on_cpu, monkeypatch, ctas, warps, order):
    """A prefix cache gives a request a block whose last token is written in the same step, by any CTA."""
    on_cpu.num_ctas, on_cpu.num_warps = ctas, warps
    monkeypatch.setenv("SIMT_ORDER", order)
    check_newest(seq_lens=(129, 128, 65, 64), share=((1, 128), (3, 64)))
