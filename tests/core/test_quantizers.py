"""The cache's numeric contract: encode_vectors against a plain loop in float64, its scale rules and edges."""

import math

import pytest
import torch

from tq_vllm.config import SCALE_RULES, SCALE_SEARCH, TRELLIS
from tq_vllm.core.codebooks import page_centroids, page_thresholds
from tq_vllm.core.quantizers import FLOAT16_MAX, _search_codes, decode_vectors, encode_vectors

WIDTHS = (2, 3, 4, 5, 8)
ALL_WIDTHS = (*WIDTHS, TRELLIS + 2, TRELLIS + 3)  # codes of trellises: test_trellis.py


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def contract_codes(y: list[float], bits: int, scale_search: tuple[float, ...]) -> list[int]:
    """Codes of one vector as the contract says them, coordinate by coordinate."""
    unit = math.sqrt(len(y)) / math.sqrt(sum(v * v for v in y))
    u = [v * unit for v in y]
    if bits == 8:
        largest = max(map(abs, u))
        return [round(v * 127 / largest) & 255 for v in u]
    centroids = page_centroids(bits).double().tolist()
    best, best_cosine = [], -1.0
    for s in scale_search:
        codes = [min(range(2**bits), key=lambda k, v=v / s: abs(v - centroids[k])) for v in u]
        c = [centroids[k] for k in codes]
        cosine = sum(a * b for a, b in zip(u, c, strict=True)) / math.sqrt(sum(b * b for b in c))
        if cosine > best_cosine:
            best, best_cosine = codes, cosine
    return best


@pytest.mark.parametrize("scale_search", [(1.0,), SCALE_SEARCH], ids=["one", "search"])
@pytest.mark.parametrize("bits", WIDTHS)
def test_codes_are_the_contracts(bits, scale_search):
    y = gaussian(12, 64, seed=bits) * gaussian(12, 1).exp()
    codes, _ = encode_vectors(y, bits, "norm", scale_search)
    assert codes.dtype == torch.uint8
    assert codes.tolist() == [contract_codes(row, bits, scale_search) for row in y.double().tolist()]


@pytest.mark.parametrize("bits", ALL_WIDTHS)
def test_scale_rules(bits):
    y = gaussian(200, 128, seed=bits) * 3
    norm = y.double().norm(dim=-1)
    tolerance = {"rtol": 2**-10, "atol": 0}  # of a float16
    codes, scale = encode_vectors(y, bits, "norm")
    decoded = decode_vectors(codes, scale, bits).double()
    torch.testing.assert_close(decoded.norm(dim=-1), norm, **tolerance)
    if bits == 8:
        for rule in SCALE_RULES:  # width 8 has one rule
            assert torch.equal(encode_vectors(y, bits, rule)[1], scale)
        return
    codes, scale = encode_vectors(y, bits, "unbiased")
    decoded = decode_vectors(codes, scale, bits).double()
    torch.testing.assert_close((decoded * y).sum(-1), norm**2, **tolerance)
    _, scale = encode_vectors(y, bits, "raw", (1.0,))
    torch.testing.assert_close(scale.double(), norm / math.sqrt(128), **tolerance)


@pytest.mark.parametrize("bits", ALL_WIDTHS)
def test_scale_is_a_float16_number(bits):
    _, scale = encode_vectors(gaussian(50, 64), bits, "norm")
    assert scale.dtype == torch.float32
    assert torch.equal(scale, scale.to(torch.float16).float())


@pytest.mark.parametrize(
    "bits, head_dim, gain",
    [(2, 64, 0.012), (3, 64, 0.08), (4, 64, 0.19), (5, 64, 0.24), (3, 128, 0.045), (4, 128, 0.12), (5, 128, 0.18)],
)
def test_scale_search_gains_and_never_loses(bits, head_dim, gain):
    """1 - cosine^2 falls by what config.SCALE_SEARCH says (a little is left for the sample)."""
    y = gaussian(4000, head_dim, seed=bits)

    def error(scale_search):
        decoded = decode_vectors(*encode_vectors(y, bits, "norm", scale_search), bits)
        return 1 - torch.cosine_similarity(y.double(), decoded.double(), dim=-1) ** 2

    one, search = error((1.0,)), error(SCALE_SEARCH)
    assert (search <= one + 1e-6).all()
    assert search.mean() < (1 - gain) * one.mean()


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
def test_a_magnitude_on_a_threshold_goes_up(bits):
    thresholds = page_thresholds(bits)
    below = torch.nextafter(thresholds, torch.tensor(0.0))
    u = torch.cat((thresholds, -thresholds, below, -below))[None]
    codes = _search_codes(u, bits, (1.0,))[0]
    index, negative = torch.arange(len(thresholds)), 1 << (bits - 1)
    assert codes[0].tolist() == torch.cat((index + 1, index + 1 + negative, index, index + negative)).tolist()


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
def test_zero_coordinates_are_positive(bits):
    y = gaussian(64)
    y[0], y[1] = 0.0, -0.0
    assert encode_vectors(y, bits, "norm")[0][:2].tolist() == [0, 0]


@pytest.mark.parametrize("rule", SCALE_RULES)
@pytest.mark.parametrize("bits", ALL_WIDTHS)
def test_zero_and_non_finite_vectors_decode_to_zero_and_hurt_nobody(bits, rule):
    y = gaussian(7, 64)
    clean = encode_vectors(y, bits, rule)
    bad = y.clone()
    bad[1], bad[2, 5], bad[3, 0], bad[4, 63] = 0.0, math.nan, math.inf, -math.inf
    codes, scale = encode_vectors(bad, bits, rule)
    assert not codes[1:5].any() and not scale[1:5].any()
    assert not decode_vectors(codes, scale, bits)[1:5].any()
    for row in (0, 5, 6):
        assert torch.equal(codes[row], clean[0][row]) and scale[row] == clean[1][row]


@pytest.mark.parametrize("rule", SCALE_RULES)
@pytest.mark.parametrize("bits", ALL_WIDTHS)
def test_sizes_from_tiny_to_huge(bits, rule):
    """1e10 is clamped to float16's largest, 1e30 has no float32 norm, 1e-30 has no float16 scale: all decode finite."""
    y = gaussian(64) * torch.tensor([1e10, 1e30, 1e-30, 1e3])[:, None]
    codes, scale = encode_vectors(y, bits, rule)
    assert scale[0] == FLOAT16_MAX and scale[1] == 0 and scale[2] == 0 and 0 < scale[3] < FLOAT16_MAX
    assert decode_vectors(codes, scale, bits).isfinite().all()
    assert torch.equal(codes[0], codes[3])


@pytest.mark.parametrize("bits", ALL_WIDTHS)
def test_codes_do_not_depend_on_the_batch(bits):
    y = gaussian(2000, 3, 64, seed=1)
    codes, scale = encode_vectors(y, bits, "norm")
    assert codes.shape == (2000, 3, 64) and scale.shape == (2000, 3)
    for part in (slice(0, 1), slice(5, 7), slice(100, 1100)):
        part_codes, part_scale = encode_vectors(y[part], bits, "norm")
        assert torch.equal(part_codes, codes[part]) and torch.equal(part_scale, scale[part])
    empty_codes, empty_scale = encode_vectors(y[:0], bits, "norm")
    assert empty_codes.shape == (0, 3, 64) and empty_scale.shape == (0, 3)


@pytest.mark.parametrize("bits", WIDTHS)
def test_decoding_is_the_code_order_of_the_codebook(bits):
    codes = torch.arange(2**bits, dtype=torch.uint8)[None]
    decoded = decode_vectors(codes, torch.tensor([2.0]), bits)[0]
    if bits == 8:
        assert decoded.tolist() == [2.0 * (v - 256 if v > 127 else v) for v in range(256)]
    else:
        assert torch.equal(decoded, 2 * page_centroids(bits))


def test_codes_are_pinned():
    """A change here changes what every stored cache means."""
    y = torch.arange(64).float().sub(11.3).mul(0.37)
    y[32:] = y[:32].flip(0) * 1.7
    codes, scale = encode_vectors(y, 4, "norm")
    assert bytes(codes[:32].tolist()).hex() == "0b0b0b0a0a0a0909090808080000000101010202020303030404040405050505"
    assert scale == 4.234375
    codes, scale = encode_vectors(y, 8, "norm")
    assert bytes(codes[:32].tolist()).hex() == "d5d9dde1e4e8ecf0f3f7fbff03060a0e1216191d2125292c3034383c3f43474b"
    assert scale == 0.0975341796875


def test_unknown_width_and_rule():
    with pytest.raises(ValueError, match="6 bits; widths are 2, 3, 4, 5 and 8"):
        encode_vectors(torch.zeros(64), 6, "norm")
    with pytest.raises(ValueError, match="'median'; it must be one of norm, unbiased, raw"):
        encode_vectors(torch.zeros(64), 4, "median")
