"""Times prefill chunks over a compressed prefix on a GPU, a row a case: `python bench/prefill.py --json results.json`.

Ours is the whole operation (layout, dequantized prefix, FlashAttention, merges), the rival vLLM's FlashAttention on a
paged bf16 cache that holds the same tokens. A case is timed only after its output agreed with float64 attention.
"""

import argparse
import json
import math
from dataclasses import asdict, dataclass

import torch
from kernels import MAX_RELATIVE_ERROR, WrongResultError, median_us

from tq_vllm.core.rotations import get_rotation
from tq_vllm.ops import flash_ops, triton_ops
from tq_vllm.ops.torch_pages import get_page, read_tokens

CHECKED_TOKENS = 64  # the last ones of the first and last request


@dataclass(frozen=True)
class Case:
    """`batch` requests, each with query_len new tokens after `prefix` tokens in codes."""

    batch: int
    query_len: int
    prefix: int
    preset: str = "turboquant"
    head_dim: int = 128
    num_heads: int = 32
    num_kv_heads: int = 8
    block_size: int = 64
    key_offset: bool = False

    @property
    def flops(self) -> float:
        seen = self.query_len * self.prefix + self.query_len * (self.query_len + 1) / 2
        return 4 * self.batch * self.num_heads * self.head_dim * seen


CASES = [Case(1, 8192, 32768), Case(1, 8192, 0), Case(1, 8192, 131072 - 8192), Case(1, 512, 32768), Case(1, 2048, 8192),
         Case(8, 1024, 0), Case(4, 2048, 4096), Case(1, 8192, 32768, key_offset=True),
         Case(1, 8192, 32768, preset="turboquant:k3v3"), Case(1, 8192, 32768, preset="turboquant:k8v4")]  # fmt: skip


class Prefill:
    """A case with its cache, random codes in random blocks, and this step's tokens."""

    def __init__(self, case: Case):
        self.case, self.page = case, get_page(case.preset, case.head_dim)
        self.seq_len = case.prefix + case.query_len
        blocks = math.ceil(self.seq_len / case.block_size)
        shape = (case.batch * blocks, case.num_kv_heads, case.block_size, self.page.slot_bytes)
        self.kv_cache = torch.empty(shape, dtype=torch.uint8, device="cuda").random_(0, 256)
        records = self.kv_cache.view(shape[0], case.num_kv_heads, case.block_size // 16, self.page.tile_bytes)
        widths = self.page.config.key_bits, self.page.config.value_bits
        for offset, bits in zip((self.page.key_scale_offset, self.page.value_scale_offset), widths, strict=True):
            scales = torch.rand(*records.shape[:3], 16, device="cuda").mul_(0.5).add_(0.75).half()
            scales /= 74 if bits == 8 else 1  # random bytes as 8-bit codes have a deviation of 74
            records[..., offset : offset + 32] = scales.view(torch.uint8)
        self.block_table = torch.randperm(shape[0], device="cuda").int().view(case.batch, blocks)
        self.seq_lens = torch.full((case.batch,), self.seq_len, dtype=torch.int32, device="cuda")
        self.query_start_loc = torch.arange(case.batch + 1, dtype=torch.int32, device="cuda") * case.query_len
        tokens = case.batch * case.query_len
        self.query = torch.randn(tokens, case.num_heads, case.head_dim, device="cuda").bfloat16()
        self.key, self.value = (
            torch.randn(tokens, case.num_kv_heads, case.head_dim, device="cuda").bfloat16() for _ in range(2)
        )
        segments = math.ceil(self.seq_len / 64)
        offset = torch.randn(segments, case.num_kv_heads, case.head_dim, device="cuda").bfloat16()
        self.key_offset = offset if case.key_offset else None
        self.out = torch.empty_like(self.query)
        self.softmax_scale = case.head_dim**-0.5

    def launch(self, module) -> None:
        case = self.case
        module.attention(
            self.query, self.key, self.value, self.kv_cache, self.block_table, self.seq_lens, self.query_start_loc,
            self.key_offset, None, self.out, None, self.softmax_scale, case.query_len, self.seq_len,
            case.batch * self.seq_len, 0, 0.0, case.preset,
        )  # fmt: skip

    def check(self, module) -> float:
        """Relative error of the last tokens of the first and the last request; WrongResultError if it is too large."""
        self.out.fill_(math.nan)
        self.launch(module)
        case, rotation, worst = self.case, get_rotation(self.case.head_dim), 0.0
        for request in {0, case.batch - 1}:
            end = (request + 1) * case.query_len
            n = min(CHECKED_TOKENS, case.query_len)
            rows = slice(end - case.query_len, end)
            blocks = self.block_table[request : request + 1].long()
            key, value, key_scale, value_scale = read_tokens(self.kv_cache, self.page, blocks, torch.float32)
            key, value = (
                rotation.inverse((x[0].double() * s[0, :, :, None].double())[:, : case.prefix])
                for x, s in ((key, key_scale), (value, value_scale))
            )  # [num_kv_heads, prefix, head_dim]
            if self.key_offset is not None:
                segment = torch.arange(case.prefix, device="cuda") // 64
                key += self.key_offset[segment].transpose(0, 1).double()
            key = torch.cat((key, self.key[rows].transpose(0, 1).double()), 1)
            value = torch.cat((value, self.value[rows].transpose(0, 1).double()), 1)
            query = self.query[end - n : end].double().unflatten(1, (case.num_kv_heads, -1)).permute(1, 2, 0, 3)
            scores = self.softmax_scale * query @ key.transpose(1, 2)[:, None]
            row = torch.arange(self.seq_len - n, self.seq_len, device="cuda")[:, None]
            hidden = torch.arange(self.seq_len, device="cuda") > row
            want = scores.masked_fill(hidden, -math.inf).softmax(-1) @ value[:, None]
            want = want.permute(2, 0, 1, 3).flatten(1, 2)
            got = self.out[end - n : end].double()
            worst = max(worst, ((got - want).norm() / want.norm()).item())
        if not worst < MAX_RELATIVE_ERROR or not torch.isfinite(self.out).all():
            raise WrongResultError(f"{case}: relative error {worst:.2e}, allowed {MAX_RELATIVE_ERROR}")
        return worst


def flash_attention_us(case: Case) -> float:
    """Time of vLLM's FlashAttention on a paged bf16 cache with all tokens in it."""
    from vllm.vllm_flash_attn import flash_attn_varlen_func
    from vllm.vllm_flash_attn.flash_attn_interface import is_fa_version_supported

    seq_len, block_size = case.prefix + case.query_len, 16
    blocks = math.ceil(seq_len / block_size)
    key, value = (
        torch.randn(case.batch * blocks, block_size, case.num_kv_heads, case.head_dim, device="cuda").bfloat16()
        for _ in range(2)
    )
    table = torch.randperm(case.batch * blocks, device="cuda").int().view(case.batch, blocks)
    seq_lens = torch.full((case.batch,), seq_len, dtype=torch.int32, device="cuda")
    query_start_loc = torch.arange(case.batch + 1, dtype=torch.int32, device="cuda") * case.query_len
    query = torch.randn(case.batch * case.query_len, case.num_heads, case.head_dim, device="cuda").bfloat16()
    out = torch.empty_like(query)
    version = 3 if is_fa_version_supported(3) else 2

    def launch(_: int) -> None:
        flash_attn_varlen_func(
            q=query, k=key, v=value, out=out, cu_seqlens_q=query_start_loc, max_seqlen_q=case.query_len,
            seqused_k=seq_lens, max_seqlen_k=seq_len, softmax_scale=case.head_dim**-0.5, causal=True,
            block_table=table, fa_version=version,
        )  # fmt: skip

    return median_us(launch, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", help="write the rows here")
    parser.add_argument("--triton", action="store_true", help="time the Triton kernel too")
    arguments = parser.parse_args()
    from tq_vllm.plugin.flash import provide_flash_attention

    provide_flash_attention()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    rows = []
    for case in CASES:
        row = asdict(case)
        prefill = Prefill(case)
        row["error"] = prefill.check(flash_ops)
        row["us"] = median_us(lambda _, p=prefill: p.launch(flash_ops), 1)
        if arguments.triton:
            row["triton_error"] = prefill.check(triton_ops)
            row["triton_us"] = median_us(lambda _, p=prefill: p.launch(triton_ops), 1, replays=5)
        del prefill
        torch.cuda.empty_cache()
        row["flash_attention_us"] = flash_attention_us(case)
        row["ratio"] = row["us"] / row["flash_attention_us"]
        torch.cuda.empty_cache()
        rows.append(row)
        name = f"{case.preset:16} {case.batch}x{case.query_len} on {case.prefix}{' offset' if case.key_offset else ''}"
        triton = f"  Triton {row['triton_us']:9.1f} us" if arguments.triton else ""
        print(
            f"{name:44} {row['us']:9.1f} us {case.flops / row['us'] * 1e-6:5.0f} TFLOP/s  error {row['error']:.1e}"
            f"  bf16 {row['flash_attention_us']:9.1f} us  ours/bf16 {row['ratio']:.2f}{triton}", flush=True,
        )  # fmt: skip
    if arguments.json:
        with open(arguments.json, "w") as file:
            head = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
            json.dump({**head, "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
