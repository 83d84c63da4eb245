"""Writes csrc/codebook.cuh and csrc/rotation_tables.cuh from tq_vllm.core: `python csrc/generate_tables.py`."""

from pathlib import Path

from tq_vllm.config import TRELLIS
from tq_vllm.core.codebook_tables import PAGE_LEVELS, PAGE_UNIT, TRELLIS_LEVELS, TRELLIS_UNIT
from tq_vllm.core.hadamard import base_matrix
from tq_vllm.core.qjl import page_sketch
from tq_vllm.core.rotations import Rotation, get_rotation
from tq_vllm.format import SUPPORTED_HEAD_DIMS

HEADER = """// Written by csrc/generate_tables.py from tq_vllm/core; do not edit.
#pragma once

#include <cstdint>

namespace tq {
"""

WORD = "uint32_t"


def _tables(name: str, comment: str, rows: dict[int, list[str]], value_type: str) -> str:
    """Structs {name}Table<KEY> with COUNT and a constexpr at(i), one for each key of `rows`."""
    cases = "".join(
        f"template <> struct {name}Table<{key}> {{\n  static constexpr int COUNT = {len(row)};\n"
        f"  __host__ __device__ static constexpr {value_type} at(int i) {{\n"
        f"    constexpr {value_type} table[] = {{{', '.join(row)}}};\n    return i < COUNT ? table[i] : 0;\n  }}\n}};\n"
        for key, row in rows.items()
    )
    return f"\n// {comment}\ntemplate <int KEY> struct {name}Table;\n{cases}"


def codebook() -> str:
    trellis_levels = {TRELLIS + bits: row for bits, row in TRELLIS_LEVELS.items()}
    trellis_units = {TRELLIS + bits: unit for bits, unit in TRELLIS_UNIT.items()}
    levels = {width: [str(m) for m in row] for width, row in (PAGE_LEVELS | trellis_levels).items()}
    steps = {
        bits: [str(a + b + 1) for a, b in zip(row[:-1], row[1:], strict=True)] for bits, row in PAGE_LEVELS.items()
    }
    units = "".join(
        f"template <> struct Unit<{bits}> {{ static constexpr float VALUE = {unit.hex()}f; }};\n"
        for bits, unit in (PAGE_UNIT | trellis_units).items()
    )
    return (
        HEADER
        + _tables("Level", "m of each magnitude, KEY = width: magnitude = (2m + 1) * Unit<KEY>::VALUE.", levels, "int")
        + _tables("Step", "Thresholds between magnitudes in units, KEY = bits; on a threshold goes up.", steps, "int")
        + "\n// The unit of a width: 12 significant bits.\ntemplate <int BITS> struct Unit;\n"
        + units
        + "\n}  // namespace tq\n"
    )


def _sign_words(rotation: Rotation) -> list[str]:
    negative = (rotation.signs()[0] < 0).tolist()  # [head_dim]
    words = [sum(negative[i + b] << b for b in range(min(32, len(negative) - i))) for i in range(0, len(negative), 32)]
    return [f"0x{word:08x}u" for word in words]


def rotation_tables() -> str:
    signs = {head_dim: _sign_words(get_rotation(head_dim)) for head_dim in SUPPORTED_HEAD_DIMS}
    sketch = {head_dim: _sign_words(page_sketch(head_dim)) for head_dim in SUPPORTED_HEAD_DIMS}
    mixes = {}
    for order in (12, 20, 28):
        rows = base_matrix(order).tolist()
        mixes[order] = [f"0x{sum((entry < 0) << c for c, entry in enumerate(row)):08x}u" for row in rows]
    return (
        HEADER
        + _tables(
            "Sign",
            "Random signs of the rotation, KEY = head_dim: bit c % 32 of word c / 32 set = coordinate c is negated.",
            signs,
            WORD,
        )
        + _tables("SketchSign", "The same of the second rotation, that of key sketches.", sketch, WORD)
        + _tables("Base", "Base Hadamard matrix, KEY = order: bit c of word r set = entry (r, c) is -1.", mixes, WORD)
        + "\n}  // namespace tq\n"
    )


if __name__ == "__main__":
    here = Path(__file__).parent
    (here / "codebook.cuh").write_text(codebook())
    (here / "rotation_tables.cuh").write_text(rotation_tables())
