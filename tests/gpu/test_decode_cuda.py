"""The compiled attention kernel against dense float64 attention on the same codes; needs a GPU and the library."""

import itertools
import math

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

from tests.ops.batches import FORMATS, ONE_LAUNCH, Batch, check_store_and_attend  # noqa: E402
from tq_vllm.ops import cuda_attention  # noqa: E402
from tq_vllm.ops.cuda_library import why_missing  # noqa: E402

LENGTHS = (1, 5, 16, 17, 63, 64, 65, 130, 1000)


@pytest.fixture(autouse=True)
def _built():
    if (missing := why_missing()) is not None:
        pytest.skip(missing)


def check(tolerance=2e-4, dtype=torch.float32, offset_dtype=None, **batch):
    """Run a batch on the GPU and compare; garbage in unused slots, padding rows and strides come with Batch."""
    b = Batch(fresh=False, padding=2, **batch)
    b.key_offset = None if b.key_offset is None else b.key_offset.to(dtype).float()
    b.fill()
    used = sum(b.query_lens)
    query = b.query.to("cuda", dtype)
    b.query = query.cpu().float()
    kv_cache = torch.empty_strided(b.kv_cache.shape, b.kv_cache.stride(), dtype=torch.uint8, device="cuda")
    kv_cache.copy_(b.kv_cache)
    out = torch.full_like(query, 7.0)
    lse = torch.full((b.num_heads, len(query)), 9.0, device="cuda")
    move = lambda x: None if x is None else x.cuda()  # noqa: E731
    offset = None if b.key_offset is None else b.key_offset.to("cuda", offset_dtype or dtype)
    cuda_attention.attention(
        query, None, None, kv_cache, b.block_table.cuda(), torch.tensor(b.seq_lens, dtype=torch.int32).cuda(),
        b.query_start_loc.cuda(), offset, move(b.sinks), out, lse, b.softmax_scale, max(b.query_lens),
        max(b.seq_lens), sum(b.seq_lens), b.sliding_window, b.logits_soft_cap, b.preset,
    )  # fmt: skip
    expected_out, expected_lse = b.expected()
    rounding = {torch.float32: 0.0, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    got, want = out[:used].cpu().double(), expected_out[:used]
    assert torch.isfinite(got).all()
    error = (got - want).norm() / want.norm().clamp(min=1e-30)
    assert error < tolerance + rounding, f"relative error {error:.2e}"
    torch.testing.assert_close(got, want, rtol=1e-2 + rounding, atol=2e-3 + rounding)
    torch.testing.assert_close(lse[:, :used].cpu().double(), expected_lse[:, :used], rtol=1e-5, atol=1e-3)
    assert (out[used:] == 7.0).all() and (lse[:, used:] == 9.0).all()


@pytest.mark.parametrize("preset", FORMATS)
def test_presets(preset):
    check(preset=preset, head_dim=128, group=4, seq_lens=LENGTHS, query_lens=(1,) * len(LENGTHS))


@pytest.mark.parametrize("head_dim, preset", list(itertools.product(cuda_attention.ROWS, FORMATS)))
def test_head_dims(head_dim, preset):
    check(preset=preset, head_dim=head_dim, group=4, seq_lens=(300, 17, 1, 64), query_lens=(1, 1, 1, 1))


@pytest.mark.parametrize("block_size", (16, 32, 48, 64, 128))
def test_block_sizes(block_size):
    check(head_dim=128, group=4, block_size=block_size, seq_lens=LENGTHS, query_lens=(1,) * len(LENGTHS))


@pytest.mark.parametrize("group", (1, 2, 3, 4, 5, 8, 16))
def test_groups(group):
    check(head_dim=128, group=group, seq_lens=(1, 100, 700), query_lens=(1, 1, 1))


@pytest.mark.parametrize("query_lens", ((2, 1, 3), (4, 4, 4), (1, 0, 7), (10, 5, 16)))
def test_several_query_tokens(query_lens):
    check(tolerance=5e-4, head_dim=128, group=4, seq_lens=(10, 100, 700), query_lens=query_lens)


@pytest.mark.parametrize("query_len", (4, 6, 8))
@pytest.mark.parametrize("head_dim, preset", list(itertools.product(cuda_attention.ROWS, FORMATS)))
def test_many_rows(head_dim, preset, query_len):
    """16, 24 and 32 query rows in a warp (16 of head size 256), with every option at once."""
    check(tolerance=5e-4, preset=preset, head_dim=head_dim, group=4, num_kv_heads=2, seq_lens=(2100, 17, 64, 700),
          query_lens=(query_len, 3, 2, query_len), sliding_window=600, logits_soft_cap=5.0, with_sinks=True,
          with_offset=True)  # fmt: skip


@pytest.mark.parametrize(
    "head_dim, group, query_lens",
    ((64, 16, (1, 1, 4)), (256, 3, (4, 2, 7)), (128, 8, (8, 1, 5)), (128, 4, (6, 3, 11))),
)
def test_many_rows_of_other_shapes(head_dim, group, query_lens):
    check(tolerance=5e-4, head_dim=head_dim, group=group, seq_lens=(40, 900, 3000), query_lens=query_lens)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_dtypes(dtype):
    check(dtype=dtype, head_dim=128, group=4, seq_lens=LENGTHS, query_lens=(1,) * len(LENGTHS))


@pytest.mark.parametrize("head_dim, group, query_len", ((128, 4, 1), (64, 8, 1), (128, 4, 2), (256, 2, 3)))
def test_options(head_dim, group, query_len):
    """Window, soft cap, sinks and key offset, one at a time and all together."""
    options = dict(sliding_window=50, logits_soft_cap=2.0, with_sinks=True, with_offset=True)
    for chosen in ({name: value} for name, value in options.items()):
        check(head_dim=head_dim, group=group, seq_lens=LENGTHS[4:], query_lens=(query_len,) * 5, **chosen)
    check(head_dim=head_dim, group=group, seq_lens=LENGTHS[4:], query_lens=(query_len,) * 5, **options)


@pytest.mark.parametrize(
    "dtype, offset_dtype", [(torch.bfloat16, None), (torch.float16, None), (torch.bfloat16, torch.float32)]
)
@pytest.mark.parametrize("head_dim, group, query_len", ((128, 4, 1), (64, 8, 1), (256, 2, 3)))
def test_key_offset(dtype, offset_dtype, head_dim, group, query_len):
    """More than 32 segments, which are scored at a time, and positions beyond the last one."""
    check(dtype=dtype, offset_dtype=offset_dtype, head_dim=head_dim, group=group, num_kv_heads=2,
          seq_lens=(1300, 5000, 70), query_lens=(query_len,) * 3, with_offset=True)  # fmt: skip


def test_empty_and_many_requests():
    check(head_dim=64, group=4, num_kv_heads=1, seq_lens=(0, 3, 0, 40), query_lens=(1, 1, 1, 1))
    lengths = tuple(1 + 7 * i % 97 for i in range(300))
    check(head_dim=64, group=3, num_kv_heads=1, seq_lens=lengths, query_lens=(1,) * len(lengths))


def test_long():
    check(head_dim=128, group=4, num_kv_heads=1, seq_lens=(20000, 3, 9000), query_lens=(1, 1, 1))


def test_rising_scores():
    """The reference of the softmax moves many times, and weights of early tokens vanish."""
    b = Batch(preset="turboquant:k8v8", head_dim=128, group=4, seq_lens=(600,), query_lens=(1,), fresh=False)
    b.keys = [b.query[0, ::4][None] * torch.linspace(-40, 40, 600)[:, None, None] / math.sqrt(128)]
    b.fill()
    out = torch.empty_like(b.query, device="cuda")
    cuda_attention.attention(
        b.query.cuda(), None, None, b.kv_cache.cuda(), b.block_table.cuda(), torch.tensor(b.seq_lens).int().cuda(),
        b.query_start_loc.cuda(), None, None, out, None, b.softmax_scale, 1, 600, sum(b.seq_lens), 0, 0.0, b.preset,
    )  # fmt: skip
    torch.testing.assert_close(out.cpu().double(), b.expected()[0], rtol=1e-2, atol=2e-3)


def check_newest(**fields):
    """The kernel writes the newest token of every request before it reads it."""
    fields = {"seq_lens": LENGTHS, "head_dim": 128, "group": 4} | fields
    lengths = {"query_lens": (1,) * len(fields["seq_lens"])} | fields
    check_store_and_attend(cuda_attention.store_and_attend, 2e-2 if "dtype" in fields else 5e-3, "cuda", **lengths)


@pytest.mark.parametrize("head_dim, preset", list(itertools.product(cuda_attention.ROWS, ONE_LAUNCH)))
@pytest.mark.parametrize("with_offset", (False, True))
def test_newest_tokens(preset, head_dim, with_offset):
    check_newest(preset=preset, head_dim=head_dim, with_offset=with_offset)


@pytest.mark.parametrize("seq_lens", ((30_000,), tuple(1 + 7 * i % 97 for i in range(700)), (5000, 3, 9000, 1)))
def test_newest_tokens_of_any_share(seq_lens):
    check_newest(seq_lens=seq_lens)


@pytest.mark.parametrize("block_size, group, head_dim", [(48, 16, 64), (64, 24, 128), (64, 64, 128), (16, 3, 256)])
def test_newest_tokens_of_other_shapes(block_size, group, head_dim):
    """Several blocks of query rows have the same newest token."""
    check_newest(block_size=block_size, group=group, head_dim=head_dim, seq_lens=(5, 48, 64, 130))


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_newest_tokens_with_options(dtype):
    for options in ({"sliding_window": 50}, {"logits_soft_cap": 2.0, "with_sinks": True, "with_offset": True}):
        check_newest(dtype=dtype, **options)


def test_newest_tokens_that_are_not_stored():
    """No slot, no token (padding of a CUDA graph), no length."""
    check_newest(seq_lens=(30, 17, 20, 0), query_lens=(1, 1, 0, 1), not_stored=(1, 3))


def test_a_block_that_this_step_completes_is_read_by_another_request():
    """A prefix cache gives a request a block whose last token is written in the same step, by any CTA."""
    for seed in range(20):
        lengths = [4096 + 1, 4096, *(64 + 1, 64) * 20]
        check_newest(seq_lens=lengths, block_size=64, share=((1, 4096),), seed=seed)
