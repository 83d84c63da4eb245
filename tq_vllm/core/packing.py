"""Dense bit packing of 1 to 8 bit codes, one little-endian stream per vector (pages have their own: format.py)."""

import torch


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ValueError(f"Codes of {bits} bits; widths are 1 to 8.")


def packed_size(count: int, bits: int) -> int:
    """Return the bytes that `count` codes of `bits` bits take."""
    return (count * bits + 7) // 8


def pack_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack codes uint8 [..., count], all below 2**bits, into uint8 [..., packed_size(count, bits)].

    Code i is bits i*bits .. i*bits + bits - 1 of the stream, bit k of the stream is bit k % 8 of byte k // 8, unused
    bits of the last byte are 0. ValueError for bits outside 1..8.
    """
    _check_bits(bits)
    count = codes.shape[-1]
    groups = torch.nn.functional.pad(codes, (0, -count % 8)).unflatten(-1, (-1, 8)).to(torch.int64)
    shifts = torch.arange(8, device=codes.device)
    words = (groups << (bits * shifts)).sum(-1)  # [..., groups]
    stream = (words[..., None] >> (8 * shifts[:bits])) & 255  # [..., groups, bits]
    return stream.to(torch.uint8).flatten(-2)[..., : packed_size(count, bits)]


def unpack_codes(packed: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """Return the codes uint8 [..., count] of `pack_codes`; ValueError if packed doesn't hold `count` codes' bytes."""
    _check_bits(bits)
    size = packed_size(count, bits)
    if packed.shape[-1] != size:
        raise ValueError(f"{packed.shape[-1]} bytes given for {count} codes of {bits} bits, which take {size}.")
    groups = -(-count // 8)
    stream = torch.nn.functional.pad(packed, (0, groups * bits - size)).unflatten(-1, (groups, bits)).to(torch.int64)
    shifts = torch.arange(8, device=packed.device)
    words = (stream << (8 * shifts[:bits])).sum(-1)  # [..., groups]
    codes = (words[..., None] >> (bits * shifts)) & ((1 << bits) - 1)  # [..., groups, 8]
    return codes.to(torch.uint8).flatten(-2)[..., :count]
