"""Times the fused write against vLLM's reshape_and_cache_flash into a bf16 cache: one row a case.

python bench/store.py [--json FILE]: median of CUDA-graph replays over buffers several times the L2, microseconds, GB/s
(bytes read and written once) and percent of the copy bandwidth of the same run. A case whose bytes differ from those
of the PyTorch write is not timed; near-ties, below 1e-4 of the codes, are allowed. Needs vLLM for the rival.
"""

import argparse
import json
import statistics

import torch

from tq_vllm.config import get_config
from tq_vllm.format import TurboQuantPage
from tq_vllm.ops import cuda_ops, torch_ops

BLOCK_SIZE = 16
CASES = [
    (preset, num_tokens, 8, head_dim)
    for preset, head_dim, lengths in (
        ("turboquant", 128, (1, 8, 64, 1024, 8192)),
        ("turboquant:k8v8", 128, (64, 8192)),
        ("turboquant:k8v4", 128, (64, 8192)),
        ("turboquant:k5v4", 128, (64, 8192)),
        ("turboquant:k3v3", 128, (8192,)),
        ("turboquant:k2v2", 128, (8192,)),
        ("turboquant", 64, (8192,)),
        ("turboquant", 80, (8192,)),
        ("turboquant", 96, (8192,)),
        ("turboquant", 112, (8192,)),
        ("turboquant", 192, (8192,)),
        ("turboquant", 256, (8192,)),
    )
    for num_tokens in lengths
]


def microseconds(functions, launches: int, replays: int = 15) -> float:
    """Median time of one call, microseconds: `launches` calls, taking turns in `functions`, in one CUDA graph."""
    for function in functions:
        function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(launches):
            functions[i % len(functions)]()
    times = []
    for _ in range(replays + 3):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(1000 * start.elapsed_time(end) / launches)
    return statistics.median(times[3:])


def copy_bandwidth() -> float:
    """Bytes read plus bytes written a second, of a kernel that writes 2 GiB from 2 GiB."""
    source = torch.empty(1 << 29, dtype=torch.int32, device="cuda").random_()
    target = torch.empty_like(source)
    return 2 * source.nbytes / (microseconds([lambda: torch.bitwise_not(source, out=target)], 4) * 1e-6)


def measure(preset: str, num_tokens: int, num_kv_heads: int, head_dim: int) -> dict:
    from vllm._custom_ops import reshape_and_cache_flash

    page = TurboQuantPage(get_config(preset), head_dim)
    one = torch.ones(1, device="cuda")
    bytes_in = 2 * num_tokens * num_kv_heads * head_dim * 2
    bytes_out = num_tokens * num_kv_heads * page.slot_bytes
    sets = max(2, min(64, (300 << 20) // (bytes_in + bytes_out)))
    num_blocks = -(-num_tokens // BLOCK_SIZE)
    slots = torch.randperm(num_blocks, device="cuda")[:, None] * BLOCK_SIZE + torch.arange(BLOCK_SIZE, device="cuda")
    slots = slots.flatten()[:num_tokens].contiguous()  # whole blocks in any order, as in a long prefill
    ours, copies = [], []
    for _ in range(sets):
        key, value = (
            torch.randn(num_tokens, num_kv_heads, head_dim, device="cuda", dtype=torch.bfloat16) for _ in range(2)
        )
        cache = torch.zeros(num_blocks, num_kv_heads, BLOCK_SIZE, page.slot_bytes, dtype=torch.uint8, device="cuda")
        ours.append(lambda k=key, v=value, c=cache: cuda_ops.store_kv(k, v, c, slots, None, None, preset))
        plain = torch.zeros(2, num_blocks, BLOCK_SIZE, num_kv_heads, head_dim, dtype=torch.bfloat16, device="cuda")

        def copy(k=key, v=value, p=plain):
            reshape_and_cache_flash(k, v, p[0], p[1], slots, "auto", one, one)

        copies.append(copy)
    ours[-1]()
    expected = torch.zeros_like(cache)
    torch_ops.store_kv(key, value, expected, slots, None, None, preset)
    differing = (cache != expected).float().mean().item()
    one_vector = head_dim / cache.numel()  # a tie of two scale candidates changes about this share
    copies[-1]()
    if not torch.equal(plain[0].view(-1, num_kv_heads, head_dim)[slots], key):
        raise SystemExit("reshape_and_cache_flash did not write the keys: its time means nothing")
    if differing > max(4e-4, 2 * one_vector):  # a byte holds several codes
        raise SystemExit(f"{preset}, {num_tokens} x {head_dim}: {differing:.1e} of the bytes are not the reference's")
    launches = 20 if num_tokens > 2000 else 200
    time, bf16_time = microseconds(ours, launches), microseconds(copies, launches)
    return {
        "preset": preset, "num_tokens": num_tokens, "num_kv_heads": num_kv_heads, "head_dim": head_dim,
        "us": time, "gb_s": (bytes_in + bytes_out) / time * 1e-3, "bf16_us": bf16_time,
        "differing_bytes": differing,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", help="write the rows to this file")
    parser.add_argument("--tokens", type=int, help="only cases with this many tokens")
    parser.add_argument("--head-dim", type=int, help="only cases with this head size")
    arguments = parser.parse_args()
    copy = copy_bandwidth()
    rows = []
    print(f"{torch.cuda.get_device_name()}, copy {copy * 1e-9:.0f} GB/s")
    print(f"{'preset':16} tokens head_dim       us   GB/s % copy  bf16 us  ratio  differ")
    for case in CASES:
        if arguments.tokens not in (None, case[1]) or arguments.head_dim not in (None, case[3]):
            continue
        row = measure(*case)
        rows.append(row)
        print(
            f"{row['preset']:16} {row['num_tokens']:6} {row['head_dim']:8} {row['us']:8.2f} {row['gb_s']:6.0f} "
            f"{1e11 * row['gb_s'] / copy:6.1f} {row['bf16_us']:8.2f} {row['us'] / row['bf16_us']:6.2f} "
            f"{row['differing_bytes']:.0e}",
            flush=True,
        )
    if arguments.json:
        with open(arguments.json, "w") as file:
            about = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "copy_gb_s": copy * 1e-9}
            json.dump(about | {"rows": rows}, file)


if __name__ == "__main__":
    main()
