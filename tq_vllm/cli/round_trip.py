"""One real trip through the cache on a device: store, then attention from the codes, against the dense reference."""

import torch

import tq_vllm.ops  # noqa: F401  defines torch.ops.tq_vllm
from tq_vllm.config import get_config
from tq_vllm.core.attention import attention_reference
from tq_vllm.core.cache import kv_roundtrip
from tq_vllm.format import TurboQuantPage
from tq_vllm.ops.select import Call, select

NUM_HEADS, NUM_KV_HEADS, BLOCK_SIZE = 8, 2, 64
SEQ_LEN, CHUNK = 200, 48  # tokens of the one request; the last CHUNK are its prefill chunk
INPUT_DTYPE = {"cpu": torch.float32, "cuda": torch.bfloat16}
# Largest error allowed, relative to the largest output: rounding of the inputs' dtype, and on CUDA codes at a near-tie.
TOLERANCE = {"cpu": 1e-4, "cuda": 2e-2}


def kernel_choices(device: torch.device, preset: str, head_dim: int) -> dict[str, tuple[str, str]]:
    """Which kernel serves each operation on `device`, and why: {operation: (kernel, reason)}.

    Raises:
        tq_vllm.ops.select.NoKernelError: none serves one of them.
    """
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    common = (device.type, capability, preset, head_dim, INPUT_DTYPE[device.type], BLOCK_SIZE)
    group = NUM_HEADS // NUM_KV_HEADS
    calls = {
        "store": Call("store_kv", *common),
        "decode": Call("attention", *common, group),
        "prefill": Call("attention", *common, group, max_query_len=2048, fresh=True),
    }
    choices = {name: select(call) for name, call in calls.items()}
    return {name: (choice.name, choice.reason) for name, choice in choices.items()}


def round_trip_error(device: torch.device, preset: str, head_dim: int) -> float:
    """Largest error of a decode and of a chunked prefill on `device`, relative to the largest output."""
    config = get_config(preset)
    generator = torch.Generator().manual_seed(0)
    dtype = INPUT_DTYPE[device.type]

    def random(num_heads: int) -> torch.Tensor:
        return torch.randn(SEQ_LEN, num_heads, head_dim, generator=generator).to(dtype)

    query, key, value = random(NUM_HEADS), random(NUM_KV_HEADS), random(NUM_KV_HEADS)  # [seq_len, heads, head_dim]
    num_blocks = -(-SEQ_LEN // BLOCK_SIZE)
    slot_bytes = TurboQuantPage(config, head_dim).slot_bytes
    kv_cache = torch.zeros(num_blocks, NUM_KV_HEADS, BLOCK_SIZE, slot_bytes, dtype=torch.uint8, device=device)
    block_table = torch.randperm(num_blocks, generator=generator)
    tokens = torch.arange(SEQ_LEN)
    slots = block_table[tokens // BLOCK_SIZE] * BLOCK_SIZE + tokens % BLOCK_SIZE
    torch.ops.tq_vllm.store_kv(key.to(device), value.to(device), kv_cache, slots.to(device), None, None, preset)

    def attend(num_queries: int, fresh: bool) -> torch.Tensor:
        """Output of the last `num_queries` tokens, [num_queries, num_heads, head_dim], f64 on the CPU."""
        out = torch.empty(num_queries, NUM_HEADS, head_dim, dtype=dtype, device=device)
        raw = [x[-num_queries:].to(device) if fresh else None for x in (key, value)]
        ints = [block_table[None], torch.tensor([SEQ_LEN]), torch.tensor([0, num_queries])]
        table, seq_lens, query_start_loc = (x.to(device, torch.int32) for x in ints)
        torch.ops.tq_vllm.attention(
            query[-num_queries:].to(device), *raw, kv_cache, table, seq_lens, query_start_loc, None, None, out, None,
            head_dim**-0.5, num_queries, SEQ_LEN, SEQ_LEN, 0, 0.0, preset,
        )  # fmt: skip
        return out.cpu().double()

    key_hat, value_hat = kv_roundtrip(key, value, config)
    prefix = SEQ_LEN - CHUNK
    seen = {  # keys and values as a decode token sees them, and as a chunk does: codes before it, itself raw
        (1, False): (key_hat, value_hat),
        (CHUNK, True): tuple(
            torch.cat((x_hat[:prefix], x[prefix:].float())) for x_hat, x in ((key_hat, key), (value_hat, value))
        ),
    }
    worst = 0.0
    for (num_queries, fresh), (k, v) in seen.items():
        bounds = torch.tensor([0, num_queries])
        expected, _ = attention_reference(query[-num_queries:], [k], [v], bounds, head_dim**-0.5)
        error = (attend(num_queries, fresh) - expected).abs().max() / expected.abs().max()
        worst = max(worst, float(error)) if error == error else float("nan")
    return worst
