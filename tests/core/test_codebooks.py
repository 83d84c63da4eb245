"""Codebooks: the committed tables against the generator, numerical integration and published values."""

import subprocess
import sys

import numpy as np
import pytest
import scipy.integrate
import torch

from tq_vllm.core import codebook_generator as generator
from tq_vllm.core import codebook_tables as tables
from tq_vllm.core import codebooks

GAUSSIAN_MSE = {1: 0.3634, 2: 0.1175, 3: 0.03455, 4: 0.00950}
BETA_MSE = {64: (0.3584, 0.1145, 0.0334, 0.00913), 128: (0.3609, 0.1160, 0.0340, 0.00931)}


def test_tables_are_what_the_generator_gives():
    for (bits, dim), levels in tables.LLOYD_MAX.items():
        np.testing.assert_allclose(levels, generator.lloyd_max(bits, dim), rtol=1e-8, err_msg=f"{bits} bits, {dim}")


def test_tables_are_complete():
    assert set(tables.LLOYD_MAX) == {(b, d) for b in range(1, 9) for d in (None, 64, 80, 96, 112, 128, 192, 256, 512)}
    for (bits, _), levels in tables.LLOYD_MAX.items():
        assert len(levels) == 2 ** (bits - 1)
        assert levels[0] > 0 and all(a < b for a, b in zip(levels, levels[1:], strict=False))


@pytest.mark.parametrize("dim", [None, 64, 80, 512])
def test_every_level_is_the_mean_of_its_cell(dim):
    """Lloyd's second condition, by integrating the density written down anew; the first is the midpoints."""
    levels = np.array(tables.LLOYD_MAX[3, dim])
    end = 12.0 if dim is None else dim**0.5

    def density(u):
        return np.exp(-u * u / 2) if dim is None else (1 - u * u / dim) ** ((dim - 3) / 2)

    edges = [0.0, *(levels[1:] + levels[:-1]) / 2, end]
    for level, low, high in zip(levels, edges, edges[1:], strict=False):
        mass = scipy.integrate.quad(density, low, high)[0]
        mean = scipy.integrate.quad(lambda u: u * density(u), low, high)[0] / mass
        assert level == pytest.approx(mean, rel=1e-7)


def test_published_levels_and_distortions():
    assert tables.LLOYD_MAX[2, None] == pytest.approx((0.4528, 1.510), abs=5e-4)  # Max 1960, table I
    assert tables.LLOYD_MAX[3, None] == pytest.approx((0.2451, 0.7560, 1.344, 2.152), abs=5e-4)
    for bits, mse in GAUSSIAN_MSE.items():
        assert generator.Density(None).mse(np.array(tables.LLOYD_MAX[bits, None])) == pytest.approx(mse, rel=2e-3)
    for dim, expected in BETA_MSE.items():
        for bits, mse in enumerate(expected, start=1):
            assert generator.Density(dim).mse(np.array(tables.LLOYD_MAX[bits, dim])) == pytest.approx(mse, rel=3e-3)


@pytest.mark.parametrize("dim", [None, 64, 100])
def test_density_is_normalised_with_unit_variance(dim):
    density, end = generator.Density(dim), 12.0 if dim is None else dim**0.5
    assert 2 * scipy.integrate.quad(density.pdf, 0, end)[0] == pytest.approx(1, rel=1e-9)
    assert 2 * scipy.integrate.quad(lambda u: u * u * density.pdf(u), 0, end)[0] == pytest.approx(1, rel=1e-9)


def test_gaussian_levels_serve_every_dimension():
    """Under 0.5 % more than the exact levels up to 4 bits from dimension 64 on, as lloyd_max_levels says."""
    for dim in generator.TABLE_DIMS:
        density = generator.Density(dim)
        for bits in (1, 2, 3, 4):
            exact, gaussian = (density.mse(np.array(tables.LLOYD_MAX[bits, d])) for d in (dim, None))
            assert exact < gaussian < 1.005 * exact
    assert torch.equal(codebooks.lloyd_max_levels(4, 100), codebooks.lloyd_max_levels(4, None))
    assert not torch.equal(codebooks.lloyd_max_levels(4, 64), codebooks.lloyd_max_levels(4, None))


@pytest.mark.parametrize("bits, most", [(2, 1e-5), (3, 2e-5), (4, 6e-4), (5, 4e-3)])
def test_page_codebook_costs_almost_nothing(bits, most):
    optimum = generator.Density(None).mse(generator.lloyd_max(bits, None))
    page = generator.Density(None).mse(codebooks.page_levels(bits).double().numpy())
    assert optimum <= page < (1 + most) * optimum


@pytest.mark.parametrize("bits", [2, 3])
def test_page_tables_are_what_the_generator_gives(bits):
    assert generator.page_codebook(bits) == (tables.PAGE_LEVELS[bits], tables.PAGE_UNIT[bits])


@pytest.mark.parametrize("bits, gain", [(2, 0.265), (3, 0.317)])
def test_trellis_codebook_gains_over_lloyd_max(bits, gain):
    """On N(0, 1): what docs/design.md says, less three standard deviations of this sample; and levels are means."""
    levels = codebooks.trellis_centroids(bits).double().numpy()
    y = generator.trellis_sample(1 << 13, seed=2)
    index = generator.trellis_assignment(y, levels).ravel()
    y = y.double().numpy().ravel()
    assert np.mean((y - levels[index]) ** 2) < (1 - gain) * generator.Density(None).mse(generator.lloyd_max(bits, None))
    means = np.bincount(index, weights=y) / np.bincount(index)
    np.testing.assert_allclose(means, levels, atol=0.03)


@pytest.mark.parametrize("bits", [2, 3])
def test_trellis_levels_are_exact_integers(bits):
    m, unit = tables.TRELLIS_LEVELS[bits], tables.TRELLIS_UNIT[bits]
    assert len(m) == 2**bits and m[0] >= 0 and 64 <= m[-1] <= 127 and list(m) == sorted(set(m))
    magnitudes = [(2 * v + 1) * unit for v in m]
    assert codebooks.trellis_centroids(bits).double().tolist() == [*(-v for v in magnitudes[::-1]), *magnitudes]


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
def test_page_levels_are_exact_integers(bits):
    m, unit = tables.PAGE_LEVELS[bits], tables.PAGE_UNIT[bits]
    assert len(m) == 2 ** (bits - 1) and m[0] >= 0 and 64 <= m[-1] <= 127 and list(m) == sorted(set(m))
    odd = torch.tensor([2 * v + 1 for v in m])
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(odd.to(dtype).to(torch.int64), odd)
        assert torch.equal((odd / 2).to(dtype).float(), odd / 2)
    centroids = codebooks.page_centroids(bits)
    assert centroids.double().tolist() == [v * unit for v in (*odd.tolist(), *(-odd).tolist())]
    steps = [a + b + 1 for a, b in zip(m, m[1:], strict=False)]
    assert codebooks.page_thresholds(bits).double().tolist() == [v * unit for v in steps]


def test_page_codebook_is_pinned():
    """A change here changes what every stored cache means, and every kernel's tables."""
    assert tables.PAGE_LEVELS == {
        2: (35, 118),
        3: (12, 38, 68, 109),
        4: (5, 16, 27, 39, 52, 67, 86, 114),
        5: (2, 7, 12, 17, 22, 27, 33, 39, 45, 52, 59, 67, 76, 87, 101, 122),
    }
    assert [tables.PAGE_UNIT[b].hex() for b in (2, 3, 4, 5)] == [
        "0x1.a1a0000000000p-8",
        "0x1.41e0000000000p-7",
        "0x1.8760000000000p-7",
        "0x1.b2e0000000000p-7",
    ]
    assert tables.TRELLIS_LEVELS == {2: (11, 35, 63, 111), 3: (5, 14, 25, 36, 49, 65, 87, 123)}
    assert [tables.TRELLIS_UNIT[b].hex() for b in (2, 3)] == ["0x1.11f0000000000p-7", "0x1.4680000000000p-7"]


NO_SCIPY = """
import sys
sys.modules["scipy"] = None  # an import of it now fails
import torch
import tq_vllm.ops
from tq_vllm.cli.__main__ import main
from tq_vllm.cli.round_trip import round_trip_error
from tq_vllm.core import quantizers, qjl
x = torch.ones(2, 80)
for quantizer in (quantizers.TurboQuantMSE(80, 8), qjl.TurboQuantProd(80, 3)):
    quantizer.dequantize(quantizer.quantize(x))
assert round_trip_error(torch.device("cpu"), "turboquant", 64) < 1e-4
assert main(["presets"]) == 0
"""


def test_nothing_but_the_generator_needs_scipy():
    done = subprocess.run([sys.executable, "-c", NO_SCIPY], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_unsupported_widths():
    for bits in (0, 9):
        with pytest.raises(ValueError, match=f"codebook of {bits} bits; widths are 1 to 8"):
            codebooks.lloyd_max_levels(bits)
    for bits in (1, 6, 8):
        with pytest.raises(ValueError, match=f"page codebook of {bits} bits; widths are 2, 3, 4, 5"):
            codebooks.page_levels(bits)
