"""The write of keys and values by the compiled kernel (csrc/store_kv.cuh)."""

import ctypes
import functools
import math

import torch

from tq_vllm.config import SCALE_RULES, TRELLIS, get_config
from tq_vllm.core.codebook_tables import PAGE_LEVELS, PAGE_UNIT, TRELLIS_UNIT
from tq_vllm.core.qjl import orthogonal_gain
from tq_vllm.format import TILE_TOKENS, Section, TurboQuantPage
from tq_vllm.ops.cuda_library import DTYPES, check, library, stream_of
from tq_vllm.ops.select import Call

MAX_CANDIDATES = 16  # of csrc/store_kv.h
MAX_TABLE_ROWS = 448  # 56 KiB of shared memory
TRELLIS_HEAD_DIMS = (64, 128, 256)  # a lane of the write kernel holds a block of the trellis


def refuse_store(call: Call) -> str | None:
    """Return None, or why the compiled kernel can't write keys and values of a call."""
    config = get_config(call.preset)
    if config.trellis and call.head_dim not in TRELLIS_HEAD_DIMS:
        return f"got head size {call.head_dim} with trellis codes, allowed {', '.join(map(str, TRELLIS_HEAD_DIMS))}"
    if len(config.scale_search) > MAX_CANDIDATES:
        return f"got {len(config.scale_search)} scale candidates, allowed {MAX_CANDIDATES}"
    for bits in {config.key_width, config.value_width} & PAGE_LEVELS.keys():
        rows = _level_table(bits, config.scale_search)[0]
        if rows > MAX_TABLE_ROWS:
            return f"scale candidates {config.scale_search} need {rows} table rows, allowed {MAX_TABLE_ROWS}"
    return None


class _Role(ctypes.Structure):
    """StoreRole of csrc/store_kv.h."""

    _fields_ = [
        ("x", ctypes.c_void_p),  # [num_tokens, num_kv_heads, head_dim]
        ("token_stride", ctypes.c_int64),
        ("head_stride", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
        ("bits", ctypes.c_int32),
        ("scale_rule", ctypes.c_int32),
        ("vector_loads", ctypes.c_int32),
        ("plane", ctypes.c_int32 * 3),
        ("token_bytes", ctypes.c_int32 * 3),
        ("word_bytes", ctypes.c_int32),
        ("scale", ctypes.c_int32),
        ("num_candidates", ctypes.c_int32),
        ("table_rows", ctypes.c_int32),
        ("sketch_scale", ctypes.c_int32),
        ("sketch_gain", ctypes.c_float),
        ("magnitude_cap", ctypes.c_float),
        ("cells_per_unit", ctypes.c_float * MAX_CANDIDATES),
    ]


class StoreParams(ctypes.Structure):
    """StoreParams of csrc/store_kv.h."""

    _fields_ = [
        ("role", _Role * 2),
        ("kv_cache", ctypes.c_void_p),  # uint8 [num_blocks, num_kv_heads, block_size, slot_bytes]
        ("block_stride", ctypes.c_int64),
        ("head_stride", ctypes.c_int64),
        ("slot_mapping", ctypes.c_void_p),  # int64 [num_slots]
        ("positions", ctypes.c_void_p),  # int32 or int64 [num_tokens]
        ("key_offset", ctypes.c_void_p),  # [num_segments, num_kv_heads, head_dim]
        ("offset_segment_stride", ctypes.c_int64),
        ("offset_head_stride", ctypes.c_int64),
        ("offset_dtype", ctypes.c_int32),
        ("vector_offsets", ctypes.c_int32),
        ("positions_are_int64", ctypes.c_int32),
        ("num_segments", ctypes.c_int32),
        ("num_slots", ctypes.c_int32),
        ("num_kv_heads", ctypes.c_int32),
        ("head_dim", ctypes.c_int32),
        ("block_size", ctypes.c_int32),
        ("tile_bytes", ctypes.c_int32),
    ]


def _level_table(bits: int, scale_search: tuple[float, ...]) -> tuple[int, float, list[float]]:
    """Return (rows of the level table, magnitude from which every candidate has the last level, cells per unit of
    magnitude of each candidate)."""
    units = (torch.tensor(scale_search, dtype=torch.float32) * PAGE_UNIT[bits]).tolist()
    levels = PAGE_LEVELS[bits]
    cap = (levels[-2] + levels[-1] + 1) * max(units) * (1 + 1e-5)
    return math.floor(cap / min(units)) + 2, cap, [1 / unit for unit in units]


def _role(
    bits: int, rule: str, sections: tuple[Section, ...], scale: int, scale_search: tuple[float, ...], is_key: bool
) -> _Role:
    """Fill in what a preset and head size fix of a role."""
    role = _Role(bits=bits, scale_rule=SCALE_RULES.index(rule), scale=scale)
    role.word_bytes = 4 if is_key else 4 * TILE_TOKENS
    for i, section in enumerate(sections):
        role.plane[i] = section.offset
        role.token_bytes[i] = 4 * section.words if is_key else 4
    if bits > TRELLIS:
        cells = (1 / (torch.tensor(scale_search, dtype=torch.float32) * TRELLIS_UNIT[bits - TRELLIS])).tolist()
    elif bits != 8:
        role.table_rows, role.magnitude_cap, cells = _level_table(bits, scale_search)
    if bits != 8:
        role.num_candidates = len(cells)
        role.cells_per_unit[: len(cells)] = cells
    return role


@functools.cache
def _template(preset: str, head_dim: int) -> tuple[TurboQuantPage, bytes]:
    """Return (page, the bytes of a StoreParams with what the preset and head size fix)."""
    config = get_config(preset)
    page = TurboQuantPage(config, head_dim)
    params = StoreParams(head_dim=head_dim, tile_bytes=page.tile_bytes)
    key = config.key_width, config.key_scale_rule, page.key_sections, page.key_scale_offset
    value = config.value_width, config.value_scale_rule, page.value_sections, page.value_scale_offset
    params.role[0] = _role(*key, config.scale_search, is_key=True)
    for section in page.sketch_sections:
        role = params.role[0]
        role.plane[2], role.token_bytes[2] = section.offset, 4 * section.words
        role.sketch_scale, role.sketch_gain = page.sketch_scale_offset, orthogonal_gain(head_dim)
    params.role[1] = _role(*value, config.scale_search, is_key=False)
    return page, bytes(params)


def check_pages(kv_cache: torch.Tensor, page: TurboQuantPage) -> None:
    """Raise ValueError if kv_cache does not hold pages of this format."""
    block_size, slot_bytes = kv_cache.shape[2:]
    strides = kv_cache.stride()
    if (
        kv_cache.dtype != torch.uint8
        or slot_bytes != page.slot_bytes
        or block_size % TILE_TOKENS
        or strides[2:] != (slot_bytes, 1)
        or (strides[0] | strides[1] | kv_cache.data_ptr()) % 16
    ):
        raise ValueError(
            f"kv_cache of {page.config.name} at head size {page.head_dim}: got {kv_cache.dtype} "
            f"{tuple(kv_cache.shape)} with strides {strides}, allowed uint8 [num_blocks, num_kv_heads, "
            f"a multiple of {TILE_TOKENS}, {page.slot_bytes}], the last two dimensions contiguous, the others at "
            f"multiples of 16 bytes."
        )


def _rows_are_aligned(x: torch.Tensor) -> bool:
    """Say whether every row of x [a, b, head_dim] starts at a multiple of 16 bytes."""
    return (x.data_ptr() | x.stride(0) * x.element_size() | x.stride(1) * x.element_size()) % 16 == 0


def store_params(key, value, kv_cache, slot_mapping, positions, key_offset, preset: str) -> StoreParams:
    """Check and describe a write, arguments in schema.py. Raises ValueError for what the kernel would read wrongly."""
    num_slots = slot_mapping.shape[0]
    page, template = _template(preset, key.shape[-1])
    check_pages(kv_cache, page)
    if slot_mapping.dtype != torch.int64 or not slot_mapping.is_contiguous() or num_slots > key.shape[0]:
        raise ValueError(
            f"slot_mapping: got {slot_mapping.dtype} {tuple(slot_mapping.shape)} with strides {slot_mapping.stride()}, "
            f"allowed a contiguous int64 [at most {key.shape[0]} tokens]."
        )
    params = StoreParams.from_buffer_copy(template)
    for role, x in zip(params.role, (key, value), strict=True):
        if x.stride(2) != 1 or x.shape != key.shape or x.shape[1] != kv_cache.shape[1] or x.dtype not in DTYPES:
            raise ValueError(
                f"key and value: got {x.dtype} {tuple(x.shape)} with strides {x.stride()}, allowed float32, bfloat16 "
                f"or float16 [num_tokens, {kv_cache.shape[1]}, {key.shape[2]}], the last dimension contiguous."
            )
        role.x, role.dtype = x.data_ptr(), DTYPES[x.dtype]
        role.token_stride, role.head_stride = x.stride(0), x.stride(1)
        role.vector_loads = _rows_are_aligned(x)
    params.kv_cache = kv_cache.data_ptr()
    params.block_stride, params.head_stride = kv_cache.stride()[:2]
    params.slot_mapping, params.num_slots = slot_mapping.data_ptr(), num_slots
    params.num_kv_heads, params.block_size = kv_cache.shape[1:3]
    if key_offset is not None:
        if positions is None or positions.dtype not in (torch.int32, torch.int64) or positions.stride() != (1,):
            got = "None" if positions is None else f"{positions.dtype} with strides {positions.stride()}"
            raise ValueError(f"positions with key_offset: got {got}, allowed a contiguous int32 or int64 [num_tokens].")
        if positions.shape[0] < num_slots:
            raise ValueError(f"positions with key_offset: got {positions.shape[0]}, allowed {num_slots} or more.")
        if key_offset.stride(2) != 1 or key_offset.shape[1:] != key.shape[1:] or key_offset.dtype not in DTYPES:
            raise ValueError(
                f"key_offset: got {key_offset.dtype} {tuple(key_offset.shape)} with strides {key_offset.stride()}, "
                f"allowed float32, bfloat16 or float16 [num_segments, {key.shape[1]}, {key.shape[2]}], the last "
                f"dimension contiguous."
            )
        params.positions, params.positions_are_int64 = positions.data_ptr(), positions.dtype == torch.int64
        params.vector_offsets = _rows_are_aligned(key_offset)
        params.key_offset, params.offset_dtype = key_offset.data_ptr(), DTYPES[key_offset.dtype]
        params.offset_segment_stride, params.offset_head_stride, params.num_segments = (
            key_offset.stride(0), key_offset.stride(1), key_offset.shape[0],
        )  # fmt: skip
    return params


def store_kv(key, value, kv_cache, slot_mapping, positions, key_offset, preset: str) -> None:
    """Quantize keys and values and write them to their slots in one launch; arguments in schema.py."""
    if slot_mapping.shape[0] == 0:
        return
    params = store_params(key, value, kv_cache, slot_mapping, positions, key_offset, preset)
    with torch.cuda.device(key.device):
        check(library().tq_store_kv(ctypes.byref(params), stream_of(key)), "store_kv")
