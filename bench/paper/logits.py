"""Attention logits q . k alone, from 4-bit keys against keys in float32, bf16 and fp8: `python bench/paper/logits.py`.

TurboQuant is said to compute attention logits up to 8 times as fast from 4-bit keys as from 32-bit keys on an H100.
Here the same queries meet the same number of keys, all in one run: codes by this repository's Triton product, 16 and
32-bit keys by torch.matmul and by a Triton kernel of the same shape, whichever is faster, fp8 keys (no scale) by that
kernel. A time is printed only if its logits agree with float64 logits of what the keys mean.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
import triton
import triton.language as tl

sys.path.insert(0, str(Path(__file__).parents[1]))

from kernels import WrongResultError, copy_bandwidth, median_us

from tq_vllm.cli.table import print_table
from tq_vllm.core.rotations import get_rotation
from tq_vllm.ops.torch_ops import store_kv
from tq_vllm.ops.torch_pages import get_page, read_tokens
from tq_vllm.triton_kernels.codes import column_tokens, key_codes, load_scales, lookup, numbers, tile_records
from tq_vllm.triton_kernels.dot import INTERPRETED, dot

PRESET, BLOCK = "turboquant", 64
BYTES_PER_REPLAY = 400 << 20  # of distinct keys, at least
TOLERANCE = {"4-bit codes": 5e-3, "fp8": 5e-3, "bf16": 5e-3, "float32": 2e-3}  # relative error of the logits


@triton.jit
def codes_kernel(query, cache, block_table, out, num_keys, stride_block, stride_head,
                 KEYS: tl.constexpr, LOOKUP: tl.constexpr, TILE_BYTES: tl.constexpr, BLOCK_SIZE: tl.constexpr,
                 W: tl.constexpr, ROWS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, TILES: tl.constexpr,
                 STAGES: tl.constexpr):  # fmt: skip
    """query f16 [heads, BM, 8 W], rotated; out f32 [heads, ROWS, num_keys]; a program takes TILES tiles of BN keys."""
    head = tl.program_id(1)
    row = tl.arange(0, BM)
    q = query + (head * BM + row[:, None]) * (8 * W)
    group = 8 * tl.arange(0, W)[None, :]
    if LOOKUP:
        q0, q1, q2, q3 = tl.load(q + group), tl.load(q + group + 1), tl.load(q + group + 2), tl.load(q + group + 3)
        q4, q5, q6, q7 = tl.load(q + group + 4), tl.load(q + group + 5), tl.load(q + group + 6), tl.load(q + group + 7)
    else:
        whole = tl.load(q + tl.arange(0, 8 * W)[None, :])
    words = cache.to(tl.pointer_type(tl.int32))
    in_record, in_tile = column_tokens(BN)
    first = tl.program_id(0) * TILES
    for tile in tl.range(first, first + TILES, num_stages=STAGES):
        start = tile * BN
        record = tile_records(block_table, start, num_keys, head, stride_block, stride_head, BLOCK_SIZE, TILE_BYTES, BN,
                              BN)  # fmt: skip
        pairs = tile_records(block_table, start, num_keys, head, stride_block, stride_head, BLOCK_SIZE, TILE_BYTES, BN,
                             BN // 2)  # fmt: skip
        scale = load_scales(words, pairs, KEYS, BN)
        zero = tl.zeros([BM, BN], tl.float32)
        if LOOKUP:
            k0, k1, k2, k3, k4, k5, k6, k7 = lookup(words, record, in_record, KEYS, W, True)
            logits = dot(q3, k3, dot(q2, k2, dot(q1, k1, dot(q0, k0, zero))))
            logits = dot(q7, k7, dot(q6, k6, dot(q5, k5, dot(q4, k4, logits))))
        else:
            logits = dot(whole, tl.trans(numbers(words, record, in_record, KEYS, W, BN, query.dtype.element_ty)), zero)
        at = out + (head.to(tl.int64) * ROWS + row[:, None]) * num_keys + start + in_tile[None, :]
        tl.store(at, logits * (scale * KEYS.unit)[None, :], mask=(row < ROWS)[:, None])


@triton.jit
def dense_kernel(query, keys, out, num_keys, D: tl.constexpr, ROWS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                 TILES: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """The same for keys [heads, num_keys, D] of any float; query [heads, BM, D] is what they are multiplied as."""
    head = tl.program_id(1)
    row, column, d = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, D)
    q = tl.load(query + (head * BM + row[:, None]) * D + d[None, :])
    first = tl.program_id(0) * TILES
    for tile in tl.range(first, first + TILES, num_stages=STAGES):
        token = head.to(tl.int64) * num_keys + tile * BN + column
        k = tl.load(keys + token[None, :] * D + d[:, None]).to(q.dtype)
        zero = tl.zeros([BM, BN], tl.float32)
        logits = dot(q, k, zero) if INTERPRETED else tl.dot(q, k, zero, input_precision="tf32x3")
        at = out + (head.to(tl.int64) * ROWS + row[:, None]) * num_keys + tile * BN + column[None, :]
        tl.store(at, logits, mask=(row < ROWS)[:, None])


class Logits:
    """Keys of `heads` heads and queries, `rows` a head, that all formats see; `copies` caches, read in turns."""

    def __init__(self, heads: int, num_keys: int, head_dim: int, rows: int, device: str):
        self.heads, self.num_keys, self.head_dim, self.rows = heads, num_keys, head_dim, rows
        generator = torch.Generator(device).manual_seed(0)
        self.keys = torch.randn(heads, num_keys, head_dim, device=device, generator=generator)
        self.query = torch.randn(heads, rows, head_dim, device=device, generator=generator)
        self.out = torch.empty(heads, rows, num_keys, device=device)
        self.BM, self.BN = max(16, triton.next_power_of_2(rows)), 64
        self.grid = (num_keys // (self.BN * self.tiles), heads)

    @property
    def tiles(self) -> int:
        return 16 if self.num_keys % 1024 == 0 else 1

    def padded_query(self, dtype: torch.dtype, rotate: bool = False) -> torch.Tensor:
        query = get_rotation(self.head_dim).forward(self.query.double()).float() if rotate else self.query
        return torch.nn.functional.pad(query, (0, 0, 0, self.BM - self.rows)).to(dtype)

    def codes(self, copies: int):
        """launch(i), and the keys that the codes mean, float64, rotated back."""
        page = get_page(PRESET, self.head_dim)
        device, blocks = self.keys.device, self.num_keys // BLOCK
        cache = torch.zeros(copies * blocks, self.heads, BLOCK, page.slot_bytes, dtype=torch.uint8, device=device)
        tokens = self.keys.transpose(0, 1)
        positions = torch.arange(self.num_keys, device=device)
        for part in positions.split(16384):
            store_kv(tokens[part], tokens[part], cache, part, part, None, PRESET)
        cache.view(copies, -1)[1:] = cache.view(copies, -1)[0]
        tables = torch.arange(copies * blocks, dtype=torch.int32, device=device).view(copies, blocks)
        key, _, scale, _ = read_tokens(cache, page, tables[:1].long(), torch.float32)
        meant = get_rotation(self.head_dim).inverse(key[0].double() * scale[0, ..., None].double())
        facts = key_codes(page, None if INTERPRETED else tl.float16)
        query = self.padded_query(torch.float32 if INTERPRETED else torch.float16, rotate=True)
        lookups = facts.asm != "" and self.head_dim >= 128

        def launch(i: int) -> None:
            codes_kernel[self.grid](
                query, cache, tables[i], self.out, self.num_keys, cache.stride(0) // 16, cache.stride(1) // 16, facts,
                lookups, page.tile_bytes, BLOCK, self.head_dim // 8, self.rows, self.BM, self.BN, self.tiles,
                STAGES=1 if INTERPRETED else 5, num_warps=2,
            )  # fmt: skip

        return launch, meant, self.keys[0, 0].numel() // 2 + 2

    def dense(self, dtype: torch.dtype, copies: int):
        """launches(i) that give the same, and the keys, float64."""
        keys = self.keys.to(dtype).expand(copies, -1, -1, -1).contiguous()
        computed = torch.bfloat16 if dtype.itemsize == 1 else dtype
        query, short = self.padded_query(computed), self.query.to(computed)

        def kernel(i: int) -> None:
            dense_kernel[self.grid](query, keys[i], self.out, self.num_keys, self.head_dim, self.rows, self.BM, self.BN,
                                    self.tiles, STAGES=3, num_warps=4)  # fmt: skip

        def matmul(i: int) -> None:
            self.result = torch.matmul(short, keys[i].transpose(1, 2))

        launches = [kernel] if dtype.itemsize == 1 else [kernel, matmul]
        return launches, keys[0].double(), self.head_dim * dtype.itemsize

    def check(self, name: str, launch, keys: torch.Tensor, query: torch.Tensor) -> None:
        """WrongResultError if the logits of launch(0) are not those of the float64 keys."""
        self.out.fill_(torch.nan)
        self.result = self.out
        launch(0)
        want = query.double() @ keys.transpose(1, 2)
        error = ((self.result.double() - want).norm() / want.norm()).item()
        if not error < TOLERANCE[name]:
            raise WrongResultError(f"{name}: relative error {error:.2e}, allowed {TOLERANCE[name]}")


def run(heads: int, num_keys: int, head_dim: int, rows: int, device: str, time) -> list[dict]:
    """One row a format: its time by time(launch, copies), in microseconds, after its check."""
    case = Logits(heads, num_keys, head_dim, rows, device)
    found = []
    for name, dtype in (("float32", torch.float32), ("bf16", torch.bfloat16), ("fp8", torch.float8_e4m3fn),
                        ("4-bit codes", None)):  # fmt: skip
        width = 8 * dtype.itemsize if dtype else 4
        copies = 1 if device == "cpu" else max(1, -(-BYTES_PER_REPLAY // (heads * num_keys * head_dim * width // 8)))
        if dtype is None:
            launch, keys, key_bytes = case.codes(copies)
            launches = [launch]
        else:
            launches, keys, key_bytes = case.dense(dtype, copies)
        times = []
        for launch in launches:
            rounded = case.query if dtype in (None, torch.float32) else case.query.bfloat16()
            case.check(name, launch, keys, rounded)
            times.append(time(launch, copies))
        facts = {"heads": heads, "keys": num_keys, "queries": rows, "format": name}
        found.append(facts | {"bytes": key_bytes, "us": min(times)})
        del launches, launch, keys
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", help="write the rows and the device here")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("got no CUDA device; this benchmark needs one.")
    copy, rows = copy_bandwidth(), []
    for num_keys, queries in ((131072, 1), (131072, 4), (16384, 4)):
        rows += run(8, num_keys, 128, queries, "cuda", median_us)
    cells, of = [], {}
    for row in rows:
        of[row["format"]] = row["us"]
        rate = row["heads"] * row["keys"] * (row["bytes"] + 4 * row["queries"]) / row["us"] * 1e6
        cells.append([f"{row['keys']:,} x {row['heads']}", str(row["queries"]), row["format"], str(row["bytes"]),
                      f"{row['us']:.1f}", f"{rate / copy:.0%}",
                      f"{of['float32'] / row['us']:.2f}"])  # fmt: skip
    header = ["keys x heads", "queries", "format", "bytes a key", "us", "of copy bandwidth", "x float32"]
    device = torch.cuda.get_device_name()
    print_table(f"Attention logits, head size 128, {device}, copy {copy / 1e12:.2f} TB/s", header, cells)
    if options.json:
        Path(options.json).write_text(json.dumps({"device": device, "copy": copy, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
