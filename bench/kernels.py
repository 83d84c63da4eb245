"""Times attention to a TurboQuant cache on a GPU, one row a case: `python bench/kernels.py --json results.json`.

Every figure is the median of CUDA-graph replays over caches that are several times the L2, on random codes. A case is
timed only after its output agreed with float64 attention on the same codes. Rivals are timed in the same run where
their packages can be imported: FlashAttention 3 of vLLM on a bf16 and an fp8 cache, and vLLM's turboquant_4bit_nc.
"""

import argparse
import importlib.util
import json
import math
import statistics
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from kernel_plot import plot

from tq_vllm.core.qjl import page_sketch
from tq_vllm.core.rotations import get_rotation
from tq_vllm.format import SEGMENT_TOKENS
from tq_vllm.ops import cuda_attention, cuda_ops, triton_ops
from tq_vllm.ops.torch_pages import get_page, read_sketches, read_tokens

BYTES_PER_REPLAY = 400 << 20  # of distinct cache read by one replay, at least
MAX_RELATIVE_ERROR = 1e-2  # of bf16 outputs: rounding of the output alone is 2e-3
COPY_BYTES = 4 << 30


class WrongResultError(RuntimeError):
    """A kernel gave another result than the reference: its time means nothing."""


@dataclass(frozen=True)
class Case:
    """Decode of `batch` requests of `context` tokens, query_len tokens each."""

    batch: int
    context: int
    preset: str = "turboquant"
    head_dim: int = 128
    num_heads: int = 32
    num_kv_heads: int = 8
    query_len: int = 1
    block_size: int = 64
    key_offset: int = 0  # 1: keys are centred
    kernel: str = "cuda"  # or "triton"
    step: int = 0  # 1: what write and attention add to the kernels of the model before them, which leave cold caches
    split: int = 0  # 1: with the write in a launch of its own

    @property
    def cache_bytes(self) -> int:
        slot_bytes = get_page(self.preset, self.head_dim).slot_bytes
        return self.batch * self.context * self.num_kv_heads * slot_bytes

    @property
    def name(self) -> str:
        heads = f"{self.num_heads}/{self.num_kv_heads}"
        options = "" if self.kernel == "cuda" else f" {self.kernel}"
        options += " offset" if self.key_offset else ""
        options += " step" if self.step else ""
        options += " split" if self.split else ""
        options += "" if self.block_size == 64 else f" page{self.block_size}"
        return f"{self.preset:16} d{self.head_dim:<3} {heads:5} q{self.query_len} {self.batch}x{self.context}{options}"


HEADLINE = [(32, 8192), (8, 32768), (64, 4096), (1, 131072), (1, 32768), (256, 1024), (1, 2048), (8, 1024)]
WIDTHS = ("k8v8", "k8v4", "k5v4", "k4v3", "k3v3", "k3v2", "k2v2", "t3", "t2", "prod")


def default_cases() -> list[Case]:
    cases = [Case(batch, context) for batch, context in HEADLINE]
    cases += [Case(32, 8192, preset=f"turboquant:{widths}") for widths in WIDTHS]
    cases += [Case(32, 8192, num_heads=64), Case(32, 8192, num_heads=8), Case(32, 8192, block_size=16)]
    cases += [Case(32, 8192, num_heads=8, num_kv_heads=1), Case(32, 8192, num_kv_heads=1)]
    cases += [Case(32, 8192, head_dim=64), Case(32, 8192, head_dim=256, num_heads=16, num_kv_heads=4)]
    cases += [Case(32, 8192, key_offset=1), Case(1, 2048, key_offset=1)]
    cases += [Case(32, 8192, kernel="triton"), Case(8, 32768, kernel="triton")]
    for batch, context in ((1, 1024), (8, 1024), (32, 8192)):
        cases += [Case(batch, context, step=1, split=split) for split in (0, 1)]
    return cases + [Case(8, 32768, query_len=n) for n in (2, 4, 5, 6, 8, 12, 16)]


def median_us(launch, count: int, replays: int = 15) -> float:
    """Median time of launch(i), i < count, in microseconds: all of them captured in one graph, replayed."""
    for i in range(min(count, 3)):
        launch(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(count):
            launch(i)
    times = []
    for _ in range(replays + 3):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / count)
    return statistics.median(times[3:])


def newest_slots(block_tables: torch.Tensor, case: Case, block_size: int | None = None) -> torch.Tensor:
    """Where the query tokens stand in every replica: int64 [replicas, batch * query_len]."""
    block_size = block_size or case.block_size
    positions = torch.arange(case.context - case.query_len, case.context, device="cuda")
    return (block_tables[:, :, positions // block_size].long() * block_size + positions % block_size).flatten(1)


def copy_bandwidth(copies: int = 10) -> float:
    """Bytes read and written per second by a device-to-device copy."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda").random_(0, 255)
    target = torch.empty_like(source)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    target.copy_(source)
    start.record()
    for _ in range(copies):
        target.copy_(source)
    end.record()
    end.synchronize()
    return 2 * COPY_BYTES * copies / (start.elapsed_time(end) * 1e-3)


class ModelKernels:
    """What runs before a layer's write: a product with more weights than the L2 holds, and an elementwise kernel."""

    def __init__(self, query: torch.Tensor):
        self.weights = torch.randn(24_576, 4096, device="cuda", dtype=torch.bfloat16)
        self.x, self.y = self.weights[0].clone(), self.weights[:, 0].clone()
        self.source, self.query = query.clone(), query

    def launch(self) -> None:
        torch.mv(self.weights, self.x, out=self.y)
        torch.abs(self.source, out=self.query)

    def added_us(self, launch, count: int) -> float:
        """Microseconds that launch(i) takes beyond these."""
        return median_us(launch, count) - median_us(lambda i: self.launch(), count)


class Decode:
    """A case with its cache: `replicas` sets of blocks, so that a replay reads more than the L2 holds."""

    def __init__(self, case: Case):
        self.case = case
        self.page = get_page(case.preset, case.head_dim)
        self.replicas = max(1, math.ceil(BYTES_PER_REPLAY / case.cache_bytes))
        blocks_each = case.batch * math.ceil(case.context / case.block_size)
        shape = (blocks_each * self.replicas, case.num_kv_heads, case.block_size, self.page.slot_bytes)
        self.kv_cache = torch.empty(shape, dtype=torch.uint8, device="cuda").random_(0, 256)
        records = self.kv_cache.view(shape[0], case.num_kv_heads, case.block_size // 16, self.page.tile_bytes)
        offsets = self.page.key_scale_offset, self.page.value_scale_offset, self.page.sketch_scale_offset
        for offset in offsets[: 3 if self.page.config.key_sketch else 2]:
            scales = torch.rand(*records.shape[:3], 16, device="cuda").mul_(0.5).add_(0.75).half()
            if offset == self.page.sketch_scale_offset:
                scales *= 0.2  # what 3-bit codes miss
            records[..., offset : offset + 32] = scales.view(torch.uint8)
        order = torch.randperm(shape[0], device="cuda").to(torch.int32)
        self.block_tables = order.view(self.replicas, case.batch, -1)
        self.seq_lens = torch.full((case.batch,), case.context, dtype=torch.int32, device="cuda")
        self.query_start_loc = torch.arange(case.batch + 1, device="cuda", dtype=torch.int32) * case.query_len
        num_tokens = case.batch * case.query_len
        self.query = torch.randn(num_tokens, case.num_heads, case.head_dim, device="cuda").bfloat16()
        self.out = torch.empty_like(self.query)
        self.softmax_scale = case.head_dim**-0.5
        self.attention = {"cuda": cuda_attention.attention, "triton": triton_ops.attention}[case.kernel]
        if case.step:
            self.before = ModelKernels(self.query)
            self.key, self.value = torch.randn(2, num_tokens, *shape[1:2], case.head_dim, device="cuda").bfloat16()
            self.slots = newest_slots(self.block_tables, case)
            self.positions = torch.full((num_tokens,), case.context - 1, dtype=torch.int32, device="cuda")
        self.key_offset = None
        if case.key_offset:
            shape = (math.ceil(case.context / SEGMENT_TOKENS), case.num_kv_heads, case.head_dim)
            self.key_offset = torch.randn(shape, device="cuda").bfloat16()

    def launch(self, i: int) -> None:
        case = self.case
        attention = (
            self.block_tables[i], self.seq_lens, self.query_start_loc, self.key_offset, None, self.out, None,
            self.softmax_scale, case.query_len, case.context, case.batch * case.context, 0, 0.0, case.preset,
        )  # fmt: skip
        if case.step:
            self.before.launch()
            new = self.key, self.value, self.kv_cache, self.slots[i]
            if not case.split:
                cuda_ops.store_and_attend(self.query, *new, self.positions, *attention)
                return
            cuda_ops.store_kv(*new, self.positions, self.key_offset, case.preset)
        self.attention(self.query, None, None, self.kv_cache, *attention)

    def reference(self, request: int) -> torch.Tensor:
        """Float64 attention of one request to what its codes mean: [query_len, num_heads, head_dim]."""
        case, rotation = self.case, get_rotation(self.case.head_dim)
        blocks = self.block_tables[0][request : request + 1].long()
        key, value, key_scale, value_scale = read_tokens(self.kv_cache, self.page, blocks, torch.float32)
        key, value = (x[0, :, : case.context] for x in (key, value))  # [num_kv_heads, context, head_dim]
        key = key.double() * key_scale[0, :, : case.context, None].double()
        value = value.double() * value_scale[0, :, : case.context, None].double()
        if self.page.config.key_sketch:
            tiles = torch.arange(case.block_size // 16, device="cuda").repeat(blocks.shape[1])
            blocks = blocks.repeat_interleave(case.block_size // 16, 1)
            signs, scale = read_sketches(self.kv_cache, self.page, blocks, tiles, torch.float64)
            key += page_sketch(case.head_dim).inverse(signs * scale[..., None])[0, :, : case.context]
        if case.key_offset:
            offset = rotation.forward(self.key_offset.double()).repeat_interleave(SEGMENT_TOKENS, 0)[: case.context]
            key += offset.transpose(0, 1)
        first = request * case.query_len
        query = rotation.forward(self.query[first : first + case.query_len].double())
        query = query.unflatten(1, (case.num_kv_heads, -1)).permute(1, 2, 0, 3)  # [num_kv_heads, group, query_len, d]
        scores = self.softmax_scale * (query @ key.transpose(1, 2)[:, None])
        position = torch.arange(case.context - case.query_len, case.context, device="cuda")[:, None]
        hidden = torch.arange(case.context, device="cuda") > position
        out = scores.masked_fill(hidden, -math.inf).softmax(-1) @ value[:, None]
        return rotation.inverse(out.permute(2, 0, 1, 3).flatten(1, 2))

    def check(self) -> float:
        """Relative error of the first and the last request; WrongResultError if it is too large."""
        self.out.fill_(math.nan)
        self.launch(0)
        worst = 0.0
        for request in {0, self.case.batch - 1}:
            want = self.reference(request)
            first = request * self.case.query_len
            got = self.out[first : first + self.case.query_len].double()
            worst = max(worst, ((got - want).norm() / want.norm()).item())
        if not worst < MAX_RELATIVE_ERROR or not torch.isfinite(self.out).all():
            raise WrongResultError(f"{self.case.name}: relative error {worst:.2e}, allowed {MAX_RELATIVE_ERROR}")
        return worst


def flash_attention_us(case: Case, fp8: bool) -> float:
    """Time of FlashAttention 3 of vLLM on a paged bf16 or fp8 cache of the same tokens."""
    from vllm._custom_ops import reshape_and_cache_flash
    from vllm.vllm_flash_attn import flash_attn_varlen_func, get_scheduler_metadata

    dtype = torch.float8_e4m3fn if fp8 else torch.bfloat16
    cache_bytes = case.batch * case.context * case.num_kv_heads * case.head_dim * 2 * dtype.itemsize
    replicas = max(1, math.ceil(BYTES_PER_REPLAY / cache_bytes))
    block_size = 16
    blocks = case.batch * math.ceil(case.context / block_size)
    shape = (blocks * replicas, block_size, case.num_kv_heads, case.head_dim)
    key, value = (torch.empty(shape, dtype=dtype, device="cuda") for _ in range(2))
    for cache in (key, value):
        for part in cache.split(4096):
            part.copy_(torch.randn(part.shape, device="cuda"))
    tables = torch.randperm(shape[0], device="cuda").to(torch.int32).view(replicas, case.batch, -1)
    seq_lens = torch.full((case.batch,), case.context, dtype=torch.int32, device="cuda")
    query_start_loc = torch.arange(case.batch + 1, device="cuda", dtype=torch.int32) * case.query_len
    num_tokens = case.batch * case.query_len
    query = torch.randn(num_tokens, case.num_heads, case.head_dim, device="cuda").to(dtype)
    out = torch.empty(query.shape, dtype=torch.bfloat16, device="cuda")
    scale = torch.ones(case.batch, case.num_kv_heads, device="cuda") if fp8 else None
    if case.step:
        before, one = ModelKernels(query.view(torch.int8 if fp8 else torch.int16)), torch.ones(1, device="cuda")
        newest = torch.randn(2, num_tokens, case.num_kv_heads, case.head_dim, device="cuda").bfloat16()
        slots = newest_slots(tables, case, block_size)
        caches = (key.view(torch.uint8), value.view(torch.uint8)) if fp8 else (key, value)
    metadata = get_scheduler_metadata(
        batch_size=case.batch, max_seqlen_q=case.query_len, max_seqlen_k=case.context, num_heads_q=case.num_heads,
        num_heads_kv=case.num_kv_heads, headdim=case.head_dim, cache_seqlens=seq_lens, qkv_dtype=dtype,
        cu_seqlens_q=query_start_loc, page_size=block_size, causal=True,
    )  # fmt: skip

    def launch(i: int) -> None:
        if case.step:
            before.launch()
            reshape_and_cache_flash(*newest, *caches, slots[i], "fp8" if fp8 else "auto", one, one)
        flash_attn_varlen_func(
            q=query, k=key, v=value, out=out, cu_seqlens_q=query_start_loc, max_seqlen_q=case.query_len,
            seqused_k=seq_lens, max_seqlen_k=case.context, softmax_scale=case.head_dim**-0.5, causal=True,
            block_table=tables[i], fa_version=3, scheduler_metadata=metadata, q_descale=scale, k_descale=scale,
            v_descale=scale,
        )  # fmt: skip

    return before.added_us(launch, replicas) if case.step else median_us(launch, replicas)


def turboquant_4bit_nc_us(case: Case) -> float:
    """Time of vLLM's own turboquant_4bit_nc on as many tokens of finite random codes."""
    from vllm.model_executor.layers.quantization.turboquant.config import TurboQuantConfig
    from vllm.v1.attention.ops.triton_turboquant_decode import triton_turboquant_decode_attention

    config = TurboQuantConfig.from_cache_dtype("turboquant_4bit_nc", case.head_dim)
    slot_bytes = config.slot_size_aligned
    replicas = max(1, math.ceil(BYTES_PER_REPLAY / (case.batch * case.context * case.num_kv_heads * slot_bytes)))
    block_size = 16
    shape = (case.batch * math.ceil(case.context / block_size) * replicas, block_size, case.num_kv_heads, slot_bytes)
    kv_cache = torch.empty(shape, dtype=torch.uint8, device="cuda").random_(0, 0x3C)  # as float16: 0 to 1
    tables = torch.randperm(shape[0], device="cuda").to(torch.int32).view(replicas, case.batch, -1)
    seq_lens = torch.full((case.batch,), case.context, dtype=torch.int32, device="cuda")
    query = torch.randn(case.batch, case.num_heads, case.head_dim, device="cuda").bfloat16()
    rotation = torch.linalg.qr(torch.randn(case.head_dim, case.head_dim, device="cuda"))[0].contiguous()
    transposed = rotation.T.contiguous()
    centroids = torch.randn(config.n_centroids, device="cuda").sort().values

    def launch(i: int) -> torch.Tensor:
        return triton_turboquant_decode_attention(
            query, kv_cache, tables[i], seq_lens, rotation, centroids, case.head_dim**-0.5, config.key_mse_bits,
            config.key_packed_size, config.effective_value_quant_bits, key_fp8=config.key_fp8,
            norm_correction=config.norm_correction, PiT=transposed,
        )  # fmt: skip

    if not torch.isfinite(launch(0)).all():
        raise WrongResultError(f"turboquant_4bit_nc at {case.name}: numbers that are not finite")
    return median_us(launch, replicas)


def measure(case: Case, copy: float, rivals: bool) -> dict:
    """One row: microseconds, bytes per second and their share of the copy bandwidth, ratios to rivals."""
    decode = Decode(case)
    row = {"name": case.name, **asdict(case), "relative_error": decode.check()}
    time = decode.before.added_us if case.step else median_us
    row["us"] = time(decode.launch, decode.replicas)
    row["gb_per_s"] = case.cache_bytes / row["us"] * 1e-3
    row["of_copy"] = row["gb_per_s"] * 1e9 / copy
    del decode
    torch.cuda.empty_cache()
    if rivals:
        for name, fp8 in (("fa3_bf16", False), ("fa3_fp8", True)):
            row[f"{name}_us"] = flash_attention_us(case, fp8)
            row[f"{name}_ratio"] = row[f"{name}_us"] / row["us"]
            torch.cuda.empty_cache()
        if case == Case(case.batch, case.context) and case.context > 2048:
            row["tq4_us"] = turboquant_4bit_nc_us(case)
            row["tq4_ratio"] = row["tq4_us"] / row["us"]
            torch.cuda.empty_cache()
    return row


def parse(text: str) -> Case:
    """`batch x context [,field=value ...]`, as in 32x8192,preset=turboquant:k3v3,num_heads=64."""
    size, *fields = text.split(",")
    batch, context = map(int, size.split("x"))
    values = dict(field.split("=") for field in fields)
    return Case(batch, context, **{k: v if k in ("preset", "kernel") else int(v) for k, v in values.items()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("cases", nargs="*", type=parse, help="BATCHxCONTEXT[,preset=..,head_dim=..]; none: all")
    parser.add_argument("--json", help="write the rows, the device, versions and the commit here, a plot beside it")
    parser.add_argument("--no-rivals", action="store_true", help="leave FlashAttention 3 out")
    arguments = parser.parse_args()
    copy = copy_bandwidth()
    torch.cuda.empty_cache()
    rivals = not arguments.no_rivals and importlib.util.find_spec("vllm") is not None
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, commit {commit}, copy {copy * 1e-12:.3f} TB/s")
    rows = []
    for case in arguments.cases or default_cases():
        row = measure(case, copy, rivals)
        rows.append(row)
        ratios = "".join(f"  {k[:-6]} {row[k]:.2f}x" for k in row if k.endswith("_ratio"))
        print(
            f"{case.name:44} {row['us']:9.1f} us {row['gb_per_s']:7.0f} GB/s {row['of_copy']:6.1%} of copy"
            f"  error {row['relative_error']:.1e}{ratios}",
            flush=True,
        )
    if arguments.json:
        head = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "commit": commit, "copy": copy}
        with open(arguments.json, "w") as file:
            json.dump({**head, "rows": rows}, file, indent=1)
        print(plot(Path(arguments.json)))


if __name__ == "__main__":
    main()
