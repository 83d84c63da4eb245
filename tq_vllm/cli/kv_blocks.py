"""How vLLM turns memory into KV-cache blocks, tokens and concurrent sequences.

The arithmetic of vllm/v1/core/kv_cache_utils.py (0.32; in 0.33 partly in kv_cache_planning.py, the same numbers) for
models whose layers have pages of one size: `_get_kv_cache_groups_uniform_page_size`, `_get_kv_cache_bytes_per_block`,
`get_max_concurrency_for_kv_cache_config`, `get_kv_cache_capacity`.
"""

from dataclasses import dataclass, replace

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


@dataclass(frozen=True)
class LayerKind:
    """Caches of one shape. `window`: tokens of a sequence that they keep, 0 for all; `groups`: how many block tables of
    their own they are split into."""

    num_layers: int
    block_size: int
    window: int
    groups: int = 1


def layer_kinds(
    shape: ModelShape, block_size: int, recent_tokens: int, recent_block_size: int
) -> tuple[list[LayerKind], int]:
    """Group a model's caches as vLLM does; return them, and the layers of the widest group."""
    every_layer = shape.num_full_layers + shape.num_sliding_layers
    kinds = [
        LayerKind(shape.num_full_layers, block_size, 0),
        LayerKind(shape.num_sliding_layers, block_size, shape.sliding_window),
        LayerKind(every_layer if recent_tokens else 0, recent_block_size, recent_tokens),
    ]
    kinds = [kind for kind in kinds if kind.num_layers]
    smallest, largest = (of(kind.num_layers for kind in kinds) for of in (min, max))
    group_size = largest if largest < 1.5 * smallest else smallest
    kinds = [replace(kind, groups=-(-kind.num_layers // group_size)) for kind in kinds]
    return kinds, max(-(-kind.num_layers // kind.groups) for kind in kinds)


def blocks_of_sequence(kinds: list[LayerKind], num_tokens: int, max_in_flight_tokens: int) -> int:
    """Blocks that a sequence of `num_tokens` holds at most, over all groups; a window frees what it has left behind."""
    blocks = 0
    for kind in kinds:
        if kind.window:
            held = min(kind.window - 1 + max_in_flight_tokens, num_tokens)
            blocks += kind.groups * (-(-held // kind.block_size) + 1)
        else:
            blocks += kind.groups * -(-num_tokens // kind.block_size)
    return blocks


def plan_blocks(
    shape: ModelShape,
    layer_token_bytes: int,
    block_size: int,
    memory_bytes: int,
    max_model_len: int,
    max_in_flight_tokens: int,
    recent_tokens: int = 0,
    recent_block_size: int = 0,
) -> KVBlocks:
    """Plan the block pool of one GPU.

    Args:
        layer_token_bytes: bytes of one token in one layer, all KV heads of this GPU.
        memory_bytes: the KV-cache memory, as of --kv-cache-memory-bytes.
        max_in_flight_tokens: tokens scheduled and not yet settled; matters for sliding windows only.
        recent_tokens, recent_block_size: of a preset whose newest tokens have a cache of their own
            (format.recent_block_size).
    """
    kinds, layers_per_group = layer_kinds(shape, block_size, recent_tokens, recent_block_size)
    bytes_per_block = layers_per_group * block_size * layer_token_bytes
    num_blocks = memory_bytes // bytes_per_block

    def needed(num_tokens: int) -> int:
        return blocks_of_sequence(kinds, num_tokens, max_in_flight_tokens)

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
