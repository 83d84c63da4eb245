"""The hash behind every seed: published outputs, an independent implementation, and the law of what is made of it."""

import math

import pytest
import torch

from tq_vllm.core.splitmix import random_gaussian, random_signs, splitmix64

MASK = 2**64 - 1


def splitmix64_of_python_ints(seed: int, count: int) -> list[int]:
    outputs, state = [], seed
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & MASK
        z = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        outputs.append(z ^ (z >> 31))
    return outputs


def test_published_outputs_of_seed_0():
    assert [z & MASK for z in splitmix64(0, 4).tolist()] == [
        0xE220A8397B1DCDAF,
        0x6E789E6AA1B965F4,
        0x06C45D188009454F,
        0xF88BB8A8724C81EC,
    ]


@pytest.mark.parametrize("seed", [0, 1, 12345, 2**63 - 1])
def test_equals_arithmetic_on_python_integers(seed):
    assert [z & MASK for z in splitmix64(seed, 100).tolist()] == splitmix64_of_python_ints(seed, 100)


def test_first_signs_are_pinned():
    assert random_signs(0, 16).tolist() == [-1, 1, 1, -1, 1, 1, 1, -1, 1, -1, 1, -1, -1, -1, -1, -1]


def test_signs_are_a_prefix_of_longer_ones_and_balanced():
    signs = random_signs(3, 100_000)
    assert torch.equal(random_signs(3, 64), signs[:64])
    assert abs(signs.double().mean().item()) < 4 / 100_000**0.5


def test_gaussian_is_box_muller_on_pairs():
    uniform = [((z >> 11) + 1) / 2**53 for z in splitmix64_of_python_ints(1, 6)]
    expected = []
    for a, b in zip(uniform[0::2], uniform[1::2], strict=True):
        radius = math.sqrt(-2 * math.log(a))
        expected += [radius * math.cos(2 * math.pi * b), radius * math.sin(2 * math.pi * b)]
    assert random_gaussian(1, 5).tolist() == pytest.approx(expected[:5], rel=1e-12)


def test_gaussian_has_the_moments_of_a_gaussian():
    sample = random_gaussian(2, 200_001)
    assert sample.shape == (200_001,)
    for power, moment, spread in ((1, 0, 1), (2, 1, 2), (4, 3, 96)):
        assert (sample**power).mean().item() == pytest.approx(moment, abs=4 * (spread / 200_000) ** 0.5)


def test_seed_outside_63_bits_is_refused():
    with pytest.raises(ValueError, match=r"seed is -1"):
        splitmix64(-1, 1)
