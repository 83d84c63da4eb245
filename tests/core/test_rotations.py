"""Rotations: exact Hadamard matrices, orthonormality for every head size, dtypes, determinism and refusals."""

import hashlib
import math

import pytest
import scipy.linalg
import torch

from tq_vllm.core.hadamard import hadamard_factors, hadamard_matrix
from tq_vllm.core.rotations import Rotation, default_rotation, get_rotation

HEAD_DIMS = (64, 80, 96, 112, 128, 192, 256, 512)


@pytest.mark.parametrize("dim", [1, 2, 12, 20, 24, 28, 40, *HEAD_DIMS])
def test_hadamard_matrix_is_exact(dim):
    matrix = hadamard_matrix(dim)
    assert matrix.abs().eq(1).all()
    assert torch.equal(matrix @ matrix.t(), dim * torch.eye(dim, dtype=torch.int64))


@pytest.mark.parametrize("dim", [2, 64, 512])
def test_power_of_two_is_sylvesters_matrix(dim):
    assert hadamard_matrix(dim).tolist() == scipy.linalg.hadamard(dim).tolist()


def test_factors():
    assert [hadamard_factors(d) for d in HEAD_DIMS] == [
        (1, 6), (20, 2), (12, 3), (28, 2), (1, 7), (12, 4), (1, 8), (1, 9),
    ]  # fmt: skip


@pytest.mark.parametrize("dim", [0, -4, 3, 36, 100, 160 + 8])
def test_impossible_dimension_is_refused_with_what_to_use(dim):
    with pytest.raises(ValueError, match=rf"No Hadamard rotation of dimension {dim}.*dense"):
        Rotation(dim)


def cases():
    for dim in HEAD_DIMS:
        yield from ((dim, "hadamard", rounds) for rounds in (1, 2, 3))
    yield from ((dim, "dense", 1) for dim in (2, 7, 64, 100))
    yield 33, "identity", 1


@pytest.mark.parametrize("dim, kind, rounds", list(cases()))
def test_orthonormal_and_invertible(dim, kind, rounds):
    rotation = Rotation(dim, kind, rounds, seed=5)
    matrix = rotation.matrix()
    torch.testing.assert_close(matrix @ matrix.t(), torch.eye(dim, dtype=torch.float64), rtol=0, atol=1e-12)
    x = torch.randn(3, 5, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    y = rotation.forward(x)
    assert y.dtype == torch.float64
    torch.testing.assert_close(y, x @ matrix.t(), rtol=0, atol=1e-12)
    torch.testing.assert_close(rotation.inverse(y), x, rtol=0, atol=1e-12)


def test_rounds_are_the_documented_product():
    """y = H(s_1 * (H (s_0 * x) / sqrt d)) / sqrt d, with round r's signs after those of round r - 1."""
    rotation = Rotation(96, rounds=2, seed=9)
    signs = rotation.signs().double()
    assert signs.shape == (2, 96)
    x = torch.randn(96, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    expected = x
    for r in range(2):
        expected = hadamard_matrix(96).double() @ (signs[r] * expected) / math.sqrt(96)
    torch.testing.assert_close(rotation.forward(x), expected, rtol=0, atol=1e-12)


def test_default_seed_is_pinned():
    assert Rotation(64).signs()[0, :16].tolist() == [-1, 1, 1, -1, 1, 1, 1, -1, 1, -1, 1, -1, -1, -1, -1, -1]
    assert torch.equal(Rotation(64).signs()[0], Rotation(128).signs()[0, :64])


@pytest.mark.parametrize(
    "dim, digest",
    [
        (64, "30b9b1b26e690dcb"), (80, "ff29d3a3df3baa36"), (96, "df0eec0967386c91"), (112, "270ea974902a069d"),
        (128, "bd9ca4a1b57c4d8c"), (192, "d42c52db4174d55a"), (256, "fbfe19982cb97261"), (512, "2d35c6db433c851f"),
    ],
)  # fmt: skip
def test_the_caches_rotation_is_pinned(dim, digest):
    """The signs of every entry: a change here changes what every stored cache means, on every machine."""
    signs = Rotation(dim).matrix().sign().to(torch.int8)
    assert hashlib.sha256(signs.numpy().tobytes()).hexdigest()[:16] == digest


def test_dense_rotation_is_pinned():
    """To the last digits that LAPACK and libm leave open; the signs of Q are fixed by R's diagonal."""
    expected = [
        [-0.634459594953552, 0.066017246449775, 0.770131641696771],
        [-0.687240525162434, -0.504206500158731, -0.522949582438064],
        [0.353781688256807, -0.861056054138680, 0.365268378983577],
    ]
    actual = Rotation(3, "dense").matrix()
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_inputs_are_computed_in_full_precision(dtype):
    x = torch.randn(50, 80, generator=torch.Generator().manual_seed(3)).to(dtype)
    rotation = Rotation(80)
    y = rotation.forward(x)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y.double(), x.double() @ rotation.matrix().t(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dim", [64, 96, 128])
def test_a_vectors_result_does_not_depend_on_its_batch(dim):
    x = torch.randn(300, dim, generator=torch.Generator().manual_seed(4))
    rotation, whole = Rotation(dim), Rotation(dim).forward(x)
    for count in (1, 2, 7, 100):
        assert torch.equal(rotation.forward(x[:count]), whole[:count])


def test_one_hot_input_is_spread_over_all_coordinates_by_one_round():
    y = Rotation(128).forward(torch.eye(128, dtype=torch.float64))
    torch.testing.assert_close(y.abs(), torch.full_like(y, 128**-0.5), rtol=0, atol=1e-12)


def test_dense_rotation_of_another_seed_differs_and_is_not_a_reflection_of_the_same():
    a, b = Rotation(32, "dense", seed=0).matrix(), Rotation(32, "dense", seed=1).matrix()
    assert (a @ b.t()).abs().max() < 0.9


def test_default_rotation_rule():
    assert [default_rotation(d) for d in (64, 80, 112, 100, 7, 36)] == ["hadamard"] * 3 + ["dense"] * 3


def test_rotations_are_shared():
    assert get_rotation(64) is get_rotation(64)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"kind": "fourier"}, "'fourier'; it must be one of hadamard, dense, identity"),
        ({"rounds": 4}, "4 rounds"),
        ({"rounds": 0}, "0 rounds"),
        ({"kind": "dense", "rounds": 2}, "2 rounds of a dense rotation"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        Rotation(64, **arguments)


def test_wrong_vector_size_and_signs_of_a_dense_rotation():
    with pytest.raises(ValueError, match="80 coordinates given to a rotation of 64"):
        Rotation(64).forward(torch.zeros(80))
    with pytest.raises(ValueError, match="no signs"):
        Rotation(64, "dense").signs()
