"""TurboQuant_mse and TurboQuant_prod: distortion and bias against theory, estimates from codes against dense ones."""

import math

import numpy as np
import pytest
import torch

from tq_vllm.core import codebook_generator as generator
from tq_vllm.core.qjl import TurboQuantProd
from tq_vllm.core.quantizers import TurboQuantMSE
from tq_vllm.core.rotations import Rotation

GAUSSIAN_MSE = {0: 1.0, 1: 0.3634, 2: 0.1175, 3: 0.03455, 4: 0.00950}
BETA_MSE = {64: (0.3584, 0.1145, 0.0334, 0.00913), 128: (0.3609, 0.1160, 0.0340, 0.00931)}


def unit_vectors(count: int, dim: int, seed: int = 0) -> torch.Tensor:
    x = torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))
    return x / x.norm(dim=-1, keepdim=True)


def mse_distortion(dim: int, bits: int, count: int) -> float:
    quantizer = TurboQuantMSE(dim, bits)
    x = unit_vectors(count, dim, seed=bits)
    return (quantizer.dequantize(quantizer.quantize(x)) - x).double().square().sum(-1).mean().item()


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_mse_distortion_of_a_large_dimension_is_the_gaussian_one(bits):
    distortion = mse_distortion(2048, bits, 300)
    assert distortion == pytest.approx(GAUSSIAN_MSE[bits], rel=0.01)
    assert 4.0**-bits <= distortion <= math.sqrt(3) * math.pi / 2 * 4.0**-bits  # TurboQuant theorems 3 and 1


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("dim", [64, 128])
def test_mse_distortion_of_a_head_is_the_beta_one(dim, bits):
    distortion = mse_distortion(dim, bits, 8000)
    assert distortion == pytest.approx(BETA_MSE[dim][bits - 1], rel=0.01)
    assert 4.0**-bits <= distortion <= math.sqrt(3) * math.pi / 2 * 4.0**-bits


@pytest.mark.parametrize("dim, bits", [(100, 3), (36, 2), (80, 4), (64, 8), (64, 6)])
def test_mse_distortion_of_any_dimension_and_width(dim, bits):
    theory = generator.Density(dim).mse(generator.lloyd_max(bits, dim if dim in generator.TABLE_DIMS else None))
    assert mse_distortion(dim, bits, 6000) == pytest.approx(theory, rel=0.015)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_mse_inner_products_are_short_by_the_distortion(bits):
    """E <x, x^> = 1 - D because every level is the mean of its cell; 2/pi at 1 bit."""
    quantizer = TurboQuantMSE(128, bits)
    x = unit_vectors(8000, 128, seed=7)
    shrink = (quantizer.dequantize(quantizer.quantize(x)) * x).sum(-1).double().mean().item()
    assert shrink == pytest.approx(1 - BETA_MSE[128][bits - 1], rel=2e-3)
    if bits == 1:
        assert shrink == pytest.approx(2 / math.pi, rel=0.01)


def bias_in_standard_errors(make_quantizer, trials: int = 300) -> float:
    """Mean error of <q, x^> over independent random quantizers, in units of its own standard error."""
    x = unit_vectors(32, 64, seed=1)
    query = 0.8 * x + 0.6 * unit_vectors(32, 64, seed=2)  # inner products far from 0, so that shrinking shows
    exact = (query * x).sum(-1)
    errors = []
    for seed in range(trials):
        quantizer = make_quantizer(seed)
        estimate = quantizer.inner_product(query, quantizer.quantize(x)).diagonal()
        errors.append((estimate - exact).mean().item())
    return np.mean(errors) / (np.std(errors, ddof=1) / math.sqrt(trials))


@pytest.mark.parametrize("sketch", ["gaussian", "orthogonal"])
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_prod_is_unbiased(bits, sketch):
    def quantizer(seed):
        return TurboQuantProd(64, bits, sketch, Rotation(64, "dense", seed=1000 + seed), sketch_seed=seed)

    assert abs(bias_in_standard_errors(quantizer)) < 4


def test_the_bias_test_sees_the_bias_of_mse():
    assert bias_in_standard_errors(lambda seed: TurboQuantMSE(64, 4, Rotation(64, "dense", seed=seed))) < -20


@pytest.mark.parametrize("sketch, factor", [("gaussian", math.pi / 2), ("orthogonal", math.pi / 2 - 1)])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_prod_distortion(bits, sketch, factor):
    """dim * E (<q, x^> - <q, x>)^2 is pi/2 (orthogonal S: pi/2 - 1) times the mse distortion of one bit less."""
    dim = 128
    x, query = unit_vectors(400, dim, seed=3), unit_vectors(400, dim, seed=4)
    errors = []
    for seed in range(12):
        quantizer = TurboQuantProd(dim, bits, sketch, sketch_seed=seed)
        errors.append(quantizer.inner_product(query, quantizer.quantize(x)) - query @ x.t())
    distortion = dim * torch.stack(errors).double().square().mean().item()
    mse = 1.0 if bits == 1 else BETA_MSE[dim][bits - 2]
    assert distortion == pytest.approx(factor * mse, rel=0.03)
    assert 4.0**-bits <= distortion <= math.sqrt(3) * math.pi**2 * 4.0**-bits  # TurboQuant theorems 3 and 2


@pytest.mark.parametrize("make", [TurboQuantMSE, TurboQuantProd])
@pytest.mark.parametrize("dim, bits", [(64, 4), (96, 1), (100, 3), (7, 2), (80, 8)])
def test_inner_products_from_codes_equal_those_of_the_dequantized(make, dim, bits):
    quantizer = make(dim, bits)
    generator_ = torch.Generator().manual_seed(5)
    x = 10 * torch.randn(2, 3, 20, dim, generator=generator_)
    query = torch.randn(2, 3, 4, dim, generator=generator_)
    quantized = quantizer.quantize(x)
    assert quantized.codes.dtype == torch.uint8 and quantized.norm.shape == (2, 3, 20)
    expected = query.double() @ quantizer.dequantize(quantized).double().transpose(-1, -2)
    estimate = quantizer.inner_product(query, quantized)
    assert estimate.shape == (2, 3, 4, 20)
    torch.testing.assert_close(estimate.double(), expected, rtol=0, atol=2e-5 * expected.abs().max().item())


@pytest.mark.parametrize("make", [TurboQuantMSE, TurboQuantProd])
def test_zero_and_non_finite_vectors_decode_to_zero(make):
    quantizer = make(64, 3)
    x = unit_vectors(5, 64)
    clean = quantizer.dequantize(quantizer.quantize(x))
    x[1], x[2, 3], x[3, 0] = 0.0, math.nan, math.inf
    decoded = quantizer.dequantize(quantizer.quantize(x))
    assert not decoded[1:4].any()
    assert torch.equal(decoded[[0, 4]], clean[[0, 4]])


def test_code_sizes():
    x = unit_vectors(3, 80)
    for bits in range(1, 9):
        assert TurboQuantMSE(80, bits).quantize(x).codes.shape == (3, 10 * bits)
        prod = TurboQuantProd(80, bits).quantize(x)
        assert prod.codes.shape == (3, 10 * (bits - 1)) and prod.signs.shape == (3, 10)


def test_codes_are_pinned():
    """The same bytes on every machine: hash, rotation, codebook and packing in one."""
    x = torch.arange(64).float().sub(20).square().sub(300)
    codes = TurboQuantMSE(64, 4).quantize(x).codes
    assert bytes(codes.tolist()).hex() == "08c58b51a82292dcb23f82e83ba83952b33bb0d919bc08521ba52950913283e8"
    prod = TurboQuantProd(64, 2).quantize(x)
    assert bytes(prod.codes.tolist()).hex() == "39e3e61de61d19e2"
    assert bytes(prod.signs.tolist()).hex() == "62a9fbe795376a6f"


def test_bad_arguments():
    with pytest.raises(ValueError, match="9 bits; widths are 1 to 8"):
        TurboQuantProd(64, 9)
    with pytest.raises(ValueError, match="'sparse'; it must be one of gaussian, orthogonal"):
        TurboQuantProd(64, 4, "sparse")
    with pytest.raises(ValueError, match="0 bits; widths are 1 to 8"):
        TurboQuantMSE(64, 0)
