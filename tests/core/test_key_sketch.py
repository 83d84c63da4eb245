"""The key sketch of the cache (TurboQuant Alg. 2): against a float64 oracle, its bias over seeds, and its error."""

import math
from dataclasses import replace

import pytest
import torch

from tq_vllm.config import get_config
from tq_vllm.core import cache, qjl
from tq_vllm.core.cache import decode_kv, encode_kv, kv_roundtrip
from tq_vllm.core.codebooks import page_centroids
from tq_vllm.core.qjl import encode_residuals, orthogonal_gain, page_sketch
from tq_vllm.core.quantizers import FLOAT16_MAX
from tq_vllm.core.rotations import Rotation, get_rotation
from tq_vllm.format import SUPPORTED_HEAD_DIMS

PROD = get_config("turboquant:prod")
MSE = replace(PROD, key_sketch=False)


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("head_dim", SUPPORTED_HEAD_DIMS)
def test_codes_and_estimates_are_the_algorithms(head_dim):
    """Every line of Alg. 2 in float64, on the codes and the stored scale of the mse stage."""
    key, query = 3 * gaussian(40, 2, head_dim, seed=1), gaussian(5, head_dim, seed=2).double()
    encoded = encode_kv(key, key, PROD)
    mse = encode_kv(key, key, MSE)
    assert torch.equal(encoded.key_codes, mse.key_codes) and torch.equal(encoded.key_scale, mse.key_scale)
    matrix, sketch = get_rotation(head_dim).matrix(), page_sketch(head_dim).matrix()
    identity = torch.eye(head_dim, dtype=torch.float64)
    torch.testing.assert_close(sketch @ sketch.t(), identity)
    assert (sketch - matrix).abs().max() > 0.1
    decoded = page_centroids(3).double()[encoded.key_codes.int()] * encoded.key_scale.double()[..., None]
    residual = key.double() @ matrix.t() - decoded
    sketched = residual @ sketch.t()
    clear = sketched.abs() > 1e-5
    assert clear.float().mean() > 0.999
    assert torch.equal(encoded.sketch_signs[clear], (sketched < 0)[clear].to(torch.uint8))
    scale = residual.norm(dim=-1) * orthogonal_gain(head_dim)
    torch.testing.assert_close(encoded.sketch_scale.double(), scale, rtol=2**-10, atol=0)
    signs = 1.0 - 2.0 * encoded.sketch_signs.double()
    rotated = query @ matrix.t()
    scores = torch.einsum("qd,thd->qth", rotated, decoded)
    scores += torch.einsum("qd,thd->qth", rotated @ sketch.t(), signs) * encoded.sketch_scale.double()
    dense, _ = decode_kv(encoded, PROD, dtype=torch.float64)
    torch.testing.assert_close(torch.einsum("qd,thd->qth", query, dense), scores, rtol=1e-12, atol=1e-12)


def test_the_gain_is_the_papers_for_rows_of_its_length():
    """sqrt(pi/2) / dim for rows of length sqrt(dim), up to 1 - 1 / (4 dim)."""
    for dim in (64, 128, 256):
        assert orthogonal_gain(dim) == pytest.approx(math.sqrt(math.pi / (2 * dim)) * (1 - 1 / (4 * dim)), rel=1e-4)


def bias(config, monkeypatch, kind: str, trials: int = 200) -> tuple[float, float]:
    """Mean relative error of q . k over independent rotations and sketches, and its standard error.

    q = k: nothing hides what shrinks. kind: of the sketches, "hadamard" as in the cache, or "dense": a random
    orthogonal S.
    """
    key = gaussian(64, 1, 64, seed=3)
    key /= key.norm(dim=-1, keepdim=True)
    errors = []
    for seed in range(trials):
        monkeypatch.setattr(cache, "get_rotation", lambda d, seed=seed: Rotation(d, "hadamard", 3, 2 * seed + 10))
        sketch = Rotation(64, kind, seed=1000 + seed)
        monkeypatch.setattr(qjl, "page_sketch", lambda d, sketch=sketch: sketch)
        decoded, _ = kv_roundtrip(key, key, config)
        errors.append(((decoded * key).sum(-1) - 1).mean().item())
    errors = torch.tensor(errors, dtype=torch.float64)
    return errors.mean().item(), errors.std().item() / math.sqrt(trials)


@pytest.mark.parametrize("rule", ["norm", "unbiased", "raw"])
def test_scores_are_unbiased_over_seeds_whatever_the_scale_rule(rule, monkeypatch):
    """The residual is that of what a reader decodes, so the rule of the mse scale does not matter."""
    mean, standard_error = bias(replace(PROD, key_scale_rule=rule), monkeypatch, "dense")
    assert abs(mean) < 4 * standard_error


@pytest.mark.parametrize("rule", ["norm", "raw"])
def test_the_hadamard_sketch_leaves_a_tenth_of_the_bias_of_mse_at_most(rule, monkeypatch):
    """One round mixes by signs alone, which gives large coordinates of a residual a little too much weight."""
    of_mse, standard_error = bias(replace(MSE, key_scale_rule=rule), monkeypatch, "hadamard")
    assert of_mse < -8 * standard_error
    assert abs(bias(replace(PROD, key_scale_rule=rule), monkeypatch, "hadamard")[0]) < 0.1 * abs(of_mse)


def test_a_wrong_gain_is_seen(monkeypatch):
    monkeypatch.setattr(qjl, "orthogonal_gain", lambda dim: 0.8 * orthogonal_gain(dim))
    mean, standard_error = bias(PROD, monkeypatch, "dense")
    assert abs(mean) > 4 * standard_error


@pytest.mark.parametrize("head_dim", [64, 128])
def test_error_of_scores(head_dim):
    """dim * E (q . k^ - q . k)^2 is pi/2 - 1 times the residual's energy (orthogonal S), and above 4-bit mse's."""
    key, query = (x / x.norm(dim=-1, keepdim=True) for x in gaussian(2, 3000, 1, head_dim, seed=5))
    _, mse_error, prod_error, four_error = (
        head_dim * ((kv_roundtrip(key, key, config)[0] - key) @ query[:400, 0].t()).square().mean().item()
        for config in (MSE, MSE, PROD, get_config("turboquant"))
    )
    energy = (kv_roundtrip(key, key, MSE)[0] - key).square().sum(-1).mean().item()
    assert prod_error == pytest.approx((math.pi / 2 - 1) * energy, rel=0.03)
    assert mse_error == pytest.approx(energy, rel=0.03)
    assert prod_error > 1.8 * four_error


def test_codes_do_not_depend_on_the_batch():
    residual = gaussian(500, 3, 64)
    signs, scale = encode_residuals(residual)
    for part in (slice(0, 1), slice(5, 7)):
        part_signs, part_scale = encode_residuals(residual[part])
        assert torch.equal(part_signs, signs[part]) and torch.equal(part_scale, scale[part])


def test_zero_and_non_finite_vectors_decode_to_zero_and_hurt_nobody():
    key = gaussian(8, 1, 64)
    clean = encode_kv(key, key, PROD)
    bad = key.clone()
    bad[1], bad[2, 0, 5], bad[3, 0, 0], bad[4, 0] = 0.0, math.nan, math.inf, 1e30
    bad[5] *= 1e10
    encoded = encode_kv(bad, bad, PROD)
    assert not encoded.sketch_signs[1:5].any() and not encoded.sketch_scale[1:5].any()
    assert encoded.sketch_scale[5] == FLOAT16_MAX
    decoded, _ = decode_kv(encoded, PROD)
    assert not decoded[1:5].any() and decoded.isfinite().all()
    for row in (0, 6, 7):
        assert torch.equal(encoded.sketch_signs[row], clean.sketch_signs[row])
        assert torch.equal(encoded.sketch_scale[row], clean.sketch_scale[row])


def test_codes_are_pinned():
    """A change here changes what every stored cache of the preset means."""
    key = torch.arange(64).float().sub(11.3).mul(0.37)[None, None]
    encoded = encode_kv(key, key, PROD)
    word = "".join(map(str, encoded.sketch_signs[0, 0].tolist()))
    assert (f"{int(word, 2):016x}", encoded.sketch_scale.item()) == ("ad32ce560066fcae", 2.357421875)
