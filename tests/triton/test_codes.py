"""Codes and scales come out of a page bit for bit as the PyTorch reader gets them."""

import pytest
import torch

from tests.ops.batches import PAGES, Batch
from tq_vllm.ops.torch_pages import get_page, read_sketches, read_tokens

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("preset, head_dim", PAGES)
def test_numbers(triton_ops, preset, head_dim):
    """By the plain way, and on a GPU by `prmt` in both orientations too."""
    import triton
    import triton.language as tl

    from tests.triton.decoded import decoded_kernel
    from tq_vllm.triton_kernels.codes import key_codes, sketch_codes, value_codes

    batch = Batch(preset=preset, head_dim=head_dim, seq_lens=(64,), query_lens=(1,), block_size=64).fill()
    page, W = get_page(preset, head_dim), triton.next_power_of_2(head_dim // 8)
    blocks = batch.block_table[:, :1].long()
    key, value, key_scale, value_scale = read_tokens(batch.kv_cache, page, blocks, torch.float32)
    parts = [(False, key_codes, key, key_scale), (True, value_codes, value, value_scale)]
    if page.config.key_sketch:
        signs = read_sketches(batch.kv_cache, page, blocks.expand(-1, 4), torch.arange(4), torch.float32)
        parts.append((False, sketch_codes, *signs))
    cache = batch.kv_cache[batch.block_table[0, 0].item() :][:1].contiguous().to(DEVICE)
    table = torch.zeros(1, 1, dtype=torch.int32, device=DEVICE)
    for values, codes_of, centroids, scale in parts:
        expected = centroids[0] * scale[0][..., None]
        for dtype in (tl.float16, tl.bfloat16) if DEVICE == "cuda" else (None,):
            codes = codes_of(page, dtype)
            out = torch.zeros(2, 64, 8 * W, device=DEVICE)
            planes = torch.zeros_like(out)
            decoded_kernel[(2,)](
                cache, table, out, planes, cache.stride(0) // 16, cache.stride(1) // 16,
                codes, values, page.tile_bytes, W, dtype or tl.float32,
            )  # fmt: skip
            assert torch.equal(out[..., :head_dim].cpu(), expected)
            if codes.asm:
                assert torch.equal(planes[..., :head_dim].cpu(), expected)
