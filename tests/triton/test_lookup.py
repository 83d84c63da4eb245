"""The PTX of `lookup`, run by a small interpreter: every code of every width gives its number."""

import re

import pytest
import torch

from tq_vllm.config import TRELLIS
from tq_vllm.core.codebook_tables import PAGE_UNIT, TRELLIS_UNIT
from tq_vllm.core.codebooks import page_centroids, trellis_centroids


def prmt(a: int, b: int, selector: int) -> int:
    both, found = a | b << 32, 0
    for i in range(4):
        pick = selector >> 4 * i & 15
        byte = both >> 8 * (pick & 7) & 255
        found |= (255 * (byte >> 7) if pick & 8 else byte) << 8 * i
    return found


OPERATIONS = {  # as PTX ISA 8 defines them, for the immediates in use
    "mov.u32": lambda a: a,
    "xor.b32": lambda a, b: a ^ b,
    "and.b32": lambda a, b: a & b,
    "shl.b32": lambda a, b: a << b & 0xFFFFFFFF,
    "shr.u32": lambda a, b: a >> b,
    "prmt.b32": prmt,
    "lop3.b32": lambda a, b, c, table: {0x78: a ^ (b & c)}[table],
}


def run(asm: str, inputs: dict[str, int]) -> dict[str, int]:
    """Registers after the instructions of `asm`."""
    registers = {"%lanemask_lt": 0, **inputs}
    for instruction in re.sub(r"\.reg[^;]*;", "", asm.strip("{ }")).split(";"):
        if not instruction.strip():
            continue
        name, operands = instruction.split(maxsplit=1)
        target, *sources = (x.strip() for x in operands.split(","))
        values = [int(x, 0) if x[0].isdigit() else registers[x] for x in sources]
        registers[target] = OPERATIONS[name](*values)
    return registers


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width", [2, 3, 4, 5, TRELLIS + 2, TRELLIS + 3])
def test_numbers(triton_ops, width, dtype):
    import triton.language as tl

    from tq_vllm.triton_kernels.codes import lookup_asm

    asm = lookup_asm(width, tl.float16 if dtype == torch.float16 else tl.bfloat16)
    bits = width % TRELLIS
    # What a nibble with an index and a sign bit (and of 5 bits, a lowest bit) stands for, in units.
    numbers, unit = (
        (trellis_centroids(bits), TRELLIS_UNIT[bits]) if width > TRELLIS else (page_centroids(bits), PAGE_UNIT[bits])
    )
    numbers = (numbers.double() / unit).tolist()
    index_bits = {2: 2, 3: 2, 4: 3, 5: 3, TRELLIS + 2: 3, TRELLIS + 3: 3}[width]
    signs = 1 if width in (2, TRELLIS + 2) else 2
    for first in range(16):
        nibbles, lows, expected = [0, 0], [0, 0], [[], []]
        for word in range(2):
            for k in range(8):
                index, sign = (first + 3 * k + word) % 2**index_bits, (first // 8 + k + word) % signs
                low = (first + k // 2) % 2 if width == 5 else 0
                nibbles[word] |= index << 4 * k | sign << (8 * k + 7 if k < 4 else 8 * k - 29)
                lows[word] |= low << 8 * (k % 4) + k // 4
                if width == 5:
                    index = 2 * index + low
                # a trellis counts levels; the others have a sign above the index (2 bits: inside it)
                expected[word].append(numbers[index | sign << (index_bits if width != 5 else 4)])
        found = run(asm, {"$8": nibbles[0], "$9": nibbles[1], "$10": lows[0], "$11": lows[1]})
        for k in range(8):
            pair = torch.tensor([found[f"${k}"] & 0xFFFF, found[f"${k}"] >> 16], dtype=torch.int32)
            pair = pair.to(torch.int16).view(dtype).double().tolist()
            assert pair == [expected[0][k], expected[1][k]]
