"""Attention to codes by the compiled kernel (csrc/decode.cuh): decode, and short queries such as speculative verify.

A step of one token a request can write that token's key and value in the same launch (csrc/newest_token.cuh).
"""

import ctypes

import torch

from tq_vllm.config import get_config
from tq_vllm.format import TILE_TOKENS
from tq_vllm.ops.cuda_library import DTYPES, check, library, stream_of
from tq_vllm.ops.cuda_store import StoreParams, store_params
from tq_vllm.ops.select import Call
from tq_vllm.ops.torch_pages import get_page

MAX_QUERY_ROWS = 64  # of a request and KV head; they are read in blocks, each of which reads the cache
ROWS = {64: (4, 8, 16, 24, 32), 128: (4, 8, 16, 24, 32), 256: (4, 16)}  # query rows of a unit of work, by head size
MAX_SKETCH_ROWS = 8  # the same with a key sketch


def refuse_attention(call: Call) -> str | None:
    """Return None, or why the compiled kernel can't serve an attention call."""
    if call.fresh:
        return "it reads every token from codes, and this step has raw keys and values"
    if call.recent:
        return "it reads one cache at a time"
    if call.head_dim not in ROWS:
        return f"got head size {call.head_dim}, allowed {', '.join(map(str, ROWS))}"
    if call.group * call.max_query_len > MAX_QUERY_ROWS:
        return f"got {call.group * call.max_query_len} query rows a KV head, allowed {MAX_QUERY_ROWS}"
    return None


def refuse_one_launch(call: Call) -> str | None:
    """Return None, or why one launch can't both write the newest tokens and attend."""
    config = get_config(call.preset)
    if call.max_query_len != 1:
        return f"got up to {call.max_query_len} tokens a request, allowed 1"
    if config.trellis or config.key_sketch:
        return "got trellis codes or a key sketch, whose write has a kernel of its own"
    return None


class _Params(ctypes.Structure):
    """DecodeParams of csrc/decode.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in (
            "query", "kv_cache", "block_table", "seq_lens", "query_start_loc", "key_offset", "sinks", "out", "lse",
            "workspace",
        )),
        *((name, ctypes.c_int64) for name in (
            "query_stride_token", "query_stride_head", "out_stride_token", "out_stride_head", "lse_stride_head",
            "cache_stride_block", "cache_stride_head", "offset_stride_segment", "offset_stride_head",
            "block_table_stride",
        )),
        *((name, ctypes.c_int32) for name in (
            "num_reqs", "num_kv_heads", "group_size", "tiles_per_block", "num_segments", "sliding_window",
        )),
        ("block_magic", ctypes.c_uint32),
        ("softmax_scale", ctypes.c_float),
        ("logits_soft_cap", ctypes.c_float),
        *((name, ctypes.c_int32) for name in ("dtype", "offset_dtype", "sinks_dtype", "vector_rows", "vector_offsets")),
        ("store", StoreParams),
    ]  # fmt: skip


class _Launch(ctypes.Structure):
    """DecodeLaunch of csrc/decode.h."""

    _fields_ = [
        (name, ctypes.c_int32)
        for name in (
            "key_bits",
            "value_bits",
            "head_dim",
            "key_sketch",
            "rows",
            "max_query_len",
            "num_ctas",
            "shared_bytes",
            "workspace_bytes",
        )
    ]


def _rows_of(preset: str, head_dim: int, query_rows: int) -> int:
    """Query rows of a unit of work, for so many of a request and KV head: what fits a warp's registers."""
    allowed = [rows for rows in ROWS[head_dim] if rows <= MAX_SKETCH_ROWS or not get_config(preset).key_sketch]
    blocks = -(-query_rows // allowed[-1])
    return next(rows for rows in allowed if query_rows <= blocks * rows)


def _launch_of(preset: str, head_dim: int, rows: int, max_query_len: int) -> _Launch:
    config = get_config(preset)
    return _Launch(
        key_bits=config.key_width, value_bits=config.value_width, head_dim=head_dim, key_sketch=config.key_sketch,
        rows=rows, max_query_len=max_query_len,
    )  # fmt: skip


_workspaces: dict[tuple, dict[int, torch.Tensor]] = {}  # (preset, head_dim, rows, device) -> stream -> workspace


def _workspace(preset: str, head_dim: int, rows: int, device: torch.device, stream: int) -> torch.Tensor:
    """Return uint8 [bytes]: what calls on one stream need for partial results; it depends on the device, not the batch.

    A graph under capture takes the workspace of the calls that warmed it up: it will be replayed in their place.
    """
    of_stream = _workspaces.setdefault((preset, head_dim, rows, device), {})
    if stream not in of_stream and of_stream and torch.cuda.is_current_stream_capturing():
        return next(iter(of_stream.values()))
    if stream not in of_stream:
        assert library().tq_decode_params_bytes() == ctypes.sizeof(_Params), "libtq_cuda.so is of another version"
        launch = _launch_of(preset, head_dim, rows, 0)
        check(library().tq_attention(None, ctypes.byref(launch), ctypes.c_void_p(stream)), "attention")
        of_stream[stream] = torch.empty(launch.workspace_bytes, dtype=torch.uint8, device=device)
    return of_stream[stream]


def attention(
    query, key, value, kv_cache, block_table, seq_lens, query_start_loc, key_offset, sinks, out, lse,
    softmax_scale: float, max_query_len: int, max_seq_len: int, total_seq_len: int, sliding_window: int,
    logits_soft_cap: float, preset: str,
) -> None:  # fmt: skip
    """Attend queries to the cache and merge partial results: two launches. Arguments in schema.py; key, value: None."""
    _attend(
        query, kv_cache, block_table, seq_lens, query_start_loc, key_offset, sinks, out, lse, softmax_scale,
        max_query_len, sliding_window, logits_soft_cap, preset, None,
    )  # fmt: skip


def store_and_attend(
    query, key, value, kv_cache, slot_mapping, positions, block_table, seq_lens, query_start_loc, key_offset, sinks,
    out, lse, softmax_scale: float, max_query_len: int, max_seq_len: int, total_seq_len: int, sliding_window: int,
    logits_soft_cap: float, preset: str,
) -> None:  # fmt: skip
    """Write the one new token of every request, attend and merge: two launches. Arguments in schema.py."""
    if slot_mapping.shape[0] < query.shape[0]:
        raise ValueError(f"slot_mapping: got {slot_mapping.shape[0]} slots, allowed one for each of {query.shape[0]} "
                         "tokens; -1 stores nothing.")  # fmt: skip
    _attend(
        query, kv_cache, block_table, seq_lens, query_start_loc, key_offset, sinks, out, lse, softmax_scale,
        max_query_len, sliding_window, logits_soft_cap, preset,
        store_params(key, value, kv_cache, slot_mapping, positions, key_offset, preset),
    )  # fmt: skip


def _attend(
    query, kv_cache, block_table, seq_lens, query_start_loc, key_offset, sinks, out, lse, softmax_scale: float,
    max_query_len: int, sliding_window: int, logits_soft_cap: float, preset: str, store: StoreParams | None,
) -> None:  # fmt: skip
    """Launch both kernels; store: what to write first.

    Safe in a CUDA graph: nothing waits for the device, and the grid and the buffers follow from the device alone.
    """
    num_reqs, head_dim = len(seq_lens), query.shape[-1]
    if num_reqs == 0 or max_query_len == 0:
        return
    num_kv_heads, block_size = kv_cache.shape[1:3]
    group = query.shape[1] // num_kv_heads
    _check_arguments(query, kv_cache, block_table, seq_lens, query_start_loc, key_offset, out, lse, preset)
    tiles_per_block = block_size // TILE_TOKENS
    with torch.cuda.device(query.device):
        stream = stream_of(query)
        rows = _rows_of(preset, head_dim, group * max_query_len)
        workspace = _workspace(preset, head_dim, rows, query.device, stream.value or 0)
        params = _Params(
            query=query.data_ptr(), kv_cache=kv_cache.data_ptr(), block_table=block_table.data_ptr(),
            seq_lens=seq_lens.data_ptr(), query_start_loc=query_start_loc.data_ptr(), out=out.data_ptr(),
            workspace=workspace.data_ptr(),
            query_stride_token=query.stride(0), query_stride_head=query.stride(1),
            out_stride_token=out.stride(0), out_stride_head=out.stride(1),
            cache_stride_block=kv_cache.stride(0), cache_stride_head=kv_cache.stride(1),
            block_table_stride=block_table.stride(0), num_reqs=num_reqs, num_kv_heads=num_kv_heads, group_size=group,
            tiles_per_block=tiles_per_block, block_magic=-(-(1 << 32) // tiles_per_block) & 0xFFFFFFFF,
            sliding_window=sliding_window, softmax_scale=softmax_scale, logits_soft_cap=logits_soft_cap,
            dtype=DTYPES[query.dtype], vector_rows=_has_aligned_rows(query) and _has_aligned_rows(out),
        )  # fmt: skip
        if key_offset is not None:
            params.key_offset, params.offset_dtype = key_offset.data_ptr(), DTYPES[key_offset.dtype]
            params.vector_offsets = _has_aligned_rows(key_offset)
            params.num_segments, params.offset_stride_segment, params.offset_stride_head = (
                key_offset.shape[0], key_offset.stride(0), key_offset.stride(1),
            )  # fmt: skip
        if sinks is not None:
            params.sinks, params.sinks_dtype = sinks.data_ptr(), DTYPES[sinks.dtype]
        if lse is not None:
            params.lse, params.lse_stride_head = lse.data_ptr(), lse.stride(0)
        if store is not None:
            params.store = store
        launch = _launch_of(preset, head_dim, rows, max_query_len)
        check(library().tq_attention(ctypes.byref(params), ctypes.byref(launch), stream), "attention")


def _has_aligned_rows(x: torch.Tensor) -> bool:
    return (x.data_ptr() | (x.stride(0) | x.stride(1)) * x.element_size()) % 16 == 0


def _check_arguments(query, kv_cache, block_table, seq_lens, query_start_loc, key_offset, out, lse, preset) -> None:
    """Raise ValueError for tensors that the kernel would read wrongly."""
    page = get_page(preset, query.shape[-1])
    strides = kv_cache.stride()
    wrong = {
        "query": query.stride(-1) != 1 or query.dtype not in DTYPES,
        "out": out.stride(-1) != 1 or out.shape != query.shape or out.dtype != query.dtype,
        "lse": lse is not None and (lse.stride(-1) != 1 or lse.dtype != torch.float32),
        "kv_cache": kv_cache.dtype != torch.uint8
        or kv_cache.shape[3] != page.slot_bytes
        or strides[2:] != (page.slot_bytes, 1)
        or bool((strides[0] | strides[1] | kv_cache.data_ptr()) % 16),
        "block_table": block_table.dtype != torch.int32 or block_table.stride(1) != 1,
        "seq_lens": seq_lens.dtype != torch.int32 or seq_lens.stride(0) != 1,
        "query_start_loc": query_start_loc.dtype != torch.int32 or query_start_loc.stride(0) != 1,
        "key_offset": key_offset is not None and key_offset.stride(-1) != 1,
    }
    if names := [name for name, is_wrong in wrong.items() if is_wrong]:
        raise ValueError(
            f"{', '.join(names)}: got dtype, shape or strides that tq_vllm.ops.schema does not allow; "
            f"int32 tables, contiguous last dimensions and pages at multiples of 16 bytes are needed."
        )
