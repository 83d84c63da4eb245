"""Packing: round trip for every width and length, and the bit stream's layout against Python integers."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from tq_vllm.core.packing import pack_codes, packed_size, unpack_codes


@pytest.mark.parametrize("bits", range(1, 9))
@settings(max_examples=100, deadline=None)
@given(rows=st.integers(0, 3), count=st.integers(0, 600), seed=st.integers(0, 2**32))
def test_round_trip_and_layout(bits, rows, count, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (rows, count), dtype=torch.uint8, generator=generator)
    packed = pack_codes(codes, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (rows, packed_size(count, bits))
    assert torch.equal(unpack_codes(packed, bits, count), codes)
    for row in range(rows):
        stream = sum(code << (bits * i) for i, code in enumerate(codes[row].tolist()))
        assert bytes(packed[row].tolist()) == stream.to_bytes(packed_size(count, bits), "little")


@pytest.mark.parametrize("bits", range(1, 9))
def test_every_length_up_to_two_groups(bits):
    for count in range(0, 18):
        codes = torch.arange(3 * count).view(3, count).mul(37).remainder(2**bits).to(torch.uint8)
        assert torch.equal(unpack_codes(pack_codes(codes, bits), bits, count), codes)


def test_leading_dimensions_are_kept():
    codes = torch.randint(0, 8, (2, 3, 4, 80), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    packed = pack_codes(codes, 3)
    assert packed.shape == (2, 3, 4, 30)
    assert torch.equal(unpack_codes(packed, 3, 80), codes)


def test_bad_width_and_bad_size():
    with pytest.raises(ValueError, match="9 bits"):
        pack_codes(torch.zeros(8, dtype=torch.uint8), 9)
    with pytest.raises(ValueError, match="5 bytes given for 8 codes of 4 bits, which take 4"):
        unpack_codes(torch.zeros(5, dtype=torch.uint8), 4, 8)
