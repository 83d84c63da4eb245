"""How vLLM turns memory into KV-cache blocks, tokens and concurrent sequences.

The arithmetic of vllm/v1/core/kv_cache_utils.py (0.32; in 0.33 partly in kv_cache_planning.py, the same numbers) for
models whose layers have pages of one size: `_get_kv_cache_groups_uniform_page_size`, `_get_kv_cache_bytes_per_block`,
`get_max_concurrency_for_kv_cache_config`, `get_kv_cache_capacity`.
"""

from dataclasses import dataclass

from tq_vllm.cli.model_config import ModelShape

# Tokens a block when --block-size is not given: vLLM's for its own formats, the plugin's for TurboQuant.
DEFAULT_BLOCK_SIZE = {"cpu": {"stock": 128, "turboquant": 128}, "cuda": {"stock": 16, "turboquant": 64}}
# Batches in flight: asynchronous scheduling is on by default on GPUs, off on CPUs.
BATCHES_IN_FLIGHT = {"cpu": 1, "cuda": 2}


@dataclass(frozen=True)
class KVBlocks:
    """What vLLM reports for one format.

    Attributes:
        num_blocks: blocks of the pool, the null block included ("num_gpu_blocks").
        num_tokens, max_concurrency: "GPU KV cache size: N tokens, Maximum concurrency for M tokens per request".
        fits: a sequence of max_model_len fits; otherwise vLLM refuses to start.
        longest_sequence: the longest sequence that fits, at most max_model_len, tokens.
    """

    block_size: int
    bytes_per_block: int
    num_blocks: int
    blocks_per_sequence: int
    num_tokens: int
    max_concurrency: float
    fits: bool
    longest_sequence: int


def layer_groups(shape: ModelShape) -> tuple[int, int, int]:
    """Split layers into groups with block tables of their own: (full groups, sliding groups, layers in the widest)."""
    counts = [n for n in (shape.num_full_layers, shape.num_sliding_layers) if n]
    smallest, largest = min(counts), max(counts)
    group_size = largest if largest < 1.5 * smallest else smallest
    full_groups = -(-shape.num_full_layers // group_size)
    sliding_groups = -(-shape.num_sliding_layers // group_size)
    widths = [
        -(-layers // groups)
        for layers, groups in ((shape.num_full_layers, full_groups), (shape.num_sliding_layers, sliding_groups))
        if groups
    ]
    return full_groups, sliding_groups, max(widths)


def blocks_of_sequence(shape: ModelShape, block_size: int, num_tokens: int, max_in_flight_tokens: int) -> int:
    """Blocks that a sequence of `num_tokens` holds at most, over all groups; a window frees what it has left behind."""
    full_groups, sliding_groups, _ = layer_groups(shape)
    full = -(-num_tokens // block_size)
    windowed = min(shape.sliding_window - 1 + max_in_flight_tokens, num_tokens)
    return full_groups * full + sliding_groups * (-(-windowed // block_size) + 1)


def plan_blocks(
    shape: ModelShape,
    layer_token_bytes: int,
    block_size: int,
    memory_bytes: int,
    max_model_len: int,
    max_in_flight_tokens: int,
) -> KVBlocks:
    """Plan the block pool of one GPU.

    Args:
        layer_token_bytes: bytes of one token in one layer, all KV heads of this GPU.
        memory_bytes: the KV-cache memory, as of --kv-cache-memory-bytes.
        max_in_flight_tokens: tokens scheduled and not yet settled; matters for sliding windows only.
    """
    _, _, layers_per_group = layer_groups(shape)
    bytes_per_block = layers_per_group * block_size * layer_token_bytes
    num_blocks = memory_bytes // bytes_per_block

    def needed(num_tokens: int) -> int:
        return blocks_of_sequence(shape, block_size, num_tokens, max_in_flight_tokens)

    usable = num_blocks - 1  # vLLM keeps one null block back
    low, high = 0, max_model_len
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if needed(middle) <= usable else (low, middle - 1)
    max_concurrency = num_blocks / needed(max_model_len)
    return KVBlocks(
        block_size=block_size,
        bytes_per_block=bytes_per_block,
        num_blocks=num_blocks,
        blocks_per_sequence=needed(max_model_len),
        num_tokens=int(max_concurrency * max_model_len),  # vLLM's float arithmetic, rounding included
        max_concurrency=max_concurrency,
        fits=low == max_model_len,
        longest_sequence=low,
    )
